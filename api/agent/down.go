package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

const helloWithin = 10 * time.Second

// Sync implements redoubt.agent.v1: the changes of the domain, from where the agent is, for as long as both last.
//
// Everything of the domain is sent to every agent: any of its workloads may call or be called by any other. At most
// Window messages are on their way; an agent that leaves them unacknowledged for SlowAfter is let go, and resumes.
func (s *Server) Sync(stream agentpb.Agent_SyncServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	c := callerOf(ctx)
	acks := receive(ctx, stream.Recv)
	var at uint64
	select {
	case hello := <-acks:
		if hello.err != nil {
			return hello.err
		}
		at = hello.message.GetRevision()
	case <-time.After(helloWithin):
		return malformed("stream", "the agent did not say from where on")
	}

	gone, leave := s.supersede(c.machine)
	defer leave()

	queue, sent := make(chan *agentpb.SyncResponse, s.cfg.Window+1), make(chan error, 1)
	go send(ctx, stream, queue, sent)
	d := &downstream{server: s, queue: queue, at: at}
	beat, watch := time.NewTicker(s.cfg.Heartbeat), time.NewTicker(min(s.cfg.SlowAfter/4, 250*time.Millisecond))
	defer beat.Stop()
	defer watch.Stop()
	d.heartbeat() // so that the agent knows at once that it is connected
	for {
		changed := s.cfg.Fleet.Changed() // first, so that nothing is missed
		if err := s.good(c); err != nil {
			return err
		}
		if err := d.fill(ctx); err != nil {
			return err
		}
		if d.room() == 0 {
			changed = nil // first the agent must catch up; revocation is seen by the ticker
		}
		var behind <-chan time.Time
		if len(d.flight) > 0 {
			behind = watch.C
		}
		select {
		case <-changed:
		case <-behind:
			if d.slow() {
				s.meter.Count("agentapi_sync_slow", 1)
				s.log.WarnContext(ctx, "an agent does not keep up; its stream is ended and will resume", slog.String("machine", c.machine))
				return refuse(ErrSlow, refusal.Exhausted, "stream of changes", "the agent does not take them in time", "it resumes by itself; look at the load of the machine")
			}
		case ack := <-acks:
			if ack.err != nil {
				return ack.err
			}
			if err := d.acknowledge(ack.message.GetSeq()); err != nil {
				return err
			}
			if err := s.cfg.Fleet.Authenticate(ctx, c.machine, c.spki); err != nil { // it was heard of
				return err
			}
		case <-beat.C:
			d.heartbeat()
		case err := <-sent:
			return err
		case <-gone:
			s.meter.Count("agentapi_sync_superseded", 1)
			return refuse(ErrSuperseded, refusal.Conflict, "stream of changes", "the same machine opened another one",
				"if this goes on, two agents run with one certificate: find the copy and revoke the machine")
		case <-s.drain:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// send is the one goroutine that writes to the stream, so that the handler never waits for a client that does not read.
func send(ctx context.Context, stream agentpb.Agent_SyncServer, queue <-chan *agentpb.SyncResponse, sent chan<- error) {
	for {
		select {
		case m := <-queue:
			if err := stream.Send(m); err != nil {
				sent <- err // buffered
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// supersede makes this the machine's stream; the one before is ended.
func (s *Server) supersede(machine string) (gone <-chan struct{}, leave func()) {
	mine := &supersedes{gone: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.syncing[machine]; old != nil {
		close(old.gone)
	}
	s.syncing[machine] = mine
	return mine.gone, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.syncing[machine] == mine {
			delete(s.syncing, machine)
		}
	}
}

// downstream is the state of one stream. Owned by its handler.
type downstream struct {
	server  *Server
	queue   chan<- *agentpb.SyncResponse
	at      uint64          // the revision that what was queued amounts to
	seq     uint64          // of the last message queued
	acked   uint64          // of the last message acknowledged
	flight  []time.Time     // when each unacknowledged message was queued, oldest first
	parts   *fleet.Snapshot // being sent, or nil
	partsAt int             // how many of its changes have been
}

// room is how many more messages may be on their way.
func (d *downstream) room() int { return d.server.cfg.Window - len(d.flight) }

func (d *downstream) slow() bool {
	return len(d.flight) > 0 && time.Since(d.flight[0]) > d.server.cfg.SlowAfter
}

func (d *downstream) acknowledge(seq uint64) error {
	if seq < d.acked || seq > d.seq {
		return malformed("stream", "the agent acknowledges what it was not sent")
	}
	d.flight = d.flight[seq-d.acked:]
	d.acked = seq
	return nil
}

// fill queues as much as there is, or as there is room for.
func (d *downstream) fill(ctx context.Context) error {
	for d.room() > 0 {
		if d.parts != nil {
			d.part()
			continue
		}
		changes, err := d.server.cfg.Fleet.Changes(ctx, d.at, deltaLimit)
		if errors.Is(err, fleet.ErrCompacted) {
			if d.parts, err = d.server.cfg.Fleet.Snapshot(ctx); err != nil {
				return err
			}
			d.partsAt = 0
			d.server.meter.Count("agentapi_snapshots", 1)
			continue
		}
		if err != nil {
			return err
		}
		if len(changes) == 0 {
			return nil
		}
		n := cut(changes)
		d.at = changes[n-1].Revision
		d.push(&agentpb.SyncResponse{Changes: render(changes[:n]), Revision: d.at})
	}
	return nil
}

// part queues the next part of the snapshot.
func (d *downstream) part() {
	left := d.parts.Changes[d.partsAt:]
	n := 0
	if len(left) > 0 {
		n = cut(left[:min(len(left), deltaLimit)])
	}
	m := &agentpb.SyncResponse{Changes: render(left[:n]), Snapshot: true}
	if d.partsAt += n; d.partsAt == len(d.parts.Changes) {
		// A domain without a change yet is at revision 0, and so is the snapshot: 1 would be the first.
		m.Revision = max(d.parts.Revision, 1)
		d.at, d.parts = d.parts.Revision, nil
	}
	d.push(m)
}

func (d *downstream) push(m *agentpb.SyncResponse) {
	d.seq++
	m.Seq, m.ServerTime = d.seq, d.server.cfg.Now().UnixMilli()
	d.flight = append(d.flight, time.Now())
	d.queue <- m // as long as the window, so there is room
	d.server.meter.Count("agentapi_changes_sent", int64(len(m.GetChanges())))
}

// heartbeat says that the server is there, and its time. One that finds no room is not needed: there is traffic.
func (d *downstream) heartbeat() {
	if len(d.queue) > 0 {
		return
	}
	select {
	case d.queue <- &agentpb.SyncResponse{Revision: d.at, ServerTime: d.server.cfg.Now().UnixMilli()}:
	default:
	}
}

// cut says how many of the changes go into one message.
func cut(changes []fleet.Change) int {
	size := 0
	for i, c := range changes {
		size += len(c.Payload) + len(c.Key) + 32
		if size > partBytes && i > 0 {
			return i
		}
	}
	return len(changes)
}

func render(changes []fleet.Change) []*agentpb.Change {
	out := make([]*agentpb.Change, len(changes))
	for i, c := range changes {
		out[i] = changeTo(c)
	}
	return out
}

// PushEvents implements redoubt.agent.v1: what is acknowledged is stored.
func (s *Server) PushEvents(stream agentpb.Agent_PushEventsServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	c := callerOf(ctx)
	batches := receive(ctx, stream.Recv) // not buffered: an agent that sends faster than is stored waits
	watch := time.NewTicker(s.cfg.Heartbeat)
	defer watch.Stop()
	for {
		changed := s.cfg.Fleet.Changed()
		if err := s.good(c); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-watch.C:
		case <-s.drain:
		case <-ctx.Done():
			return ctx.Err()
		case b := <-batches:
			if b.err != nil {
				return b.err
			}
			events, bad := eventsOf(b.message.GetEvents())
			if bad > 0 {
				s.meter.Count("agentapi_events_malformed", int64(bad))
			}
			if err := s.cfg.Fleet.Authenticate(ctx, c.machine, c.spki); err != nil {
				return err
			}
			last, err := s.cfg.Fleet.Ingest(ctx, c.machine, b.message.GetStream(), events)
			if err != nil {
				return err
			}
			if err := stream.Send(&agentpb.EventAck{Seq: last}); err != nil {
				return err
			}
		}
	}
}
