package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/event/spool"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Receiver takes the changes of the domain. machine.Machine is one.
type Receiver interface {
	// Revision is what was last applied; 0 is nothing.
	Revision() uint64
	// Apply takes changes in order; a snapshot replaces everything. What it took is kept when it returns nil.
	Apply(ctx context.Context, changes []fleet.Change, snapshot bool) error
}

// Spool is where events wait. spool.Spool is one.
type Spool interface {
	// Next returns events after a number, in order, and waits for the first.
	Next(ctx context.Context, after uint64, limit int) ([]spool.Numbered, error)
	// Ack says that everything up to a number has arrived.
	Ack(seq uint64) error
}

// SessionConfig is what a [Session] connects. Receiver and Spool may be nil: then nothing of theirs is carried.
type SessionConfig struct {
	Receiver Receiver
	Spool    Spool
	// Stream names the queue behind Spool, in 64 bytes. If the queue is ever lost and begins to count afresh it must have
	// another name, or the server takes what it sends for what it has.
	Stream string
}

// Session keeps an agent in touch with its server: it connects, and again when that fails; applies what comes down, sends
// up what happened, and renews the agent's certificate at half of its life. What an agent asks in between (it is
// machine.Upstream) goes over the same connection. Concurrency: safe; Run is called once.
type Session struct {
	client *Client
	cfg    SessionConfig

	mu     sync.Mutex // guards what follows
	conn   *connection
	status Status
	why    string        // of status.Error, without what to do
	past   uint64        // the revision last applied here, which a receiver may not keep across snapshots
	skew   time.Duration // server's clock minus ours, as last heard
}

// Status is how a session stands. JSON.
type Status struct {
	Connected bool          `json:"connected"`
	Since     time.Time     `json:"since,omitzero"` // connected or not
	Revision  uint64        `json:"revision"`
	Heard     time.Time     `json:"heard,omitzero"` // when the server last said something
	ClockSkew time.Duration `json:"clock_skew_ns"`  // the server's clock minus ours
	Expires   time.Time     `json:"expires,omitzero"`
	Error     string        `json:"error,omitempty"` // why it is not connected
}

// The terms of reconnecting and calling.
const (
	minBackoff    = 500 * time.Millisecond
	maxBackoff    = 30 * time.Second
	soonAfter     = 5 * time.Second // a renewal so soon after another is not trusted to help
	steadyAfter   = time.Minute     // a connection that held so long was no failure
	askWithin     = 15 * time.Second
	connectWithin = 3 * time.Second
	pushBatch     = 500
	pushBytes     = 1 << 20
	// quietFor is how long a stream may say nothing; the server's heartbeat is 15 s.
	quietFor = 60 * time.Second
)

// Session returns a session of this client, which must have joined when Run is called. It starts nothing.
func (c *Client) Session(cfg SessionConfig) *Session { return &Session{client: c, cfg: cfg} }

// Status returns how the session stands.
func (s *Session) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.ClockSkew = s.skew
	if creds := s.client.current(); creds != nil && len(creds.Chain) > 0 {
		st.Expires = creds.Chain[0].NotAfter
	}
	return st
}

// errRenewed ends a connection whose certificate was replaced: the next one proves the new key.
var errRenewed = errors.New("renewed")

// Run keeps the session until ctx ends; it returns nil then. An agent that has not joined is an error.
func (s *Session) Run(ctx context.Context) error {
	if _, _, err := s.client.Identity(); err != nil {
		return err
	}
	attempt, renewed := 0, time.Time{}
	for ctx.Err() == nil {
		began := time.Now()
		err := s.connected(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errRenewed) && time.Since(renewed) > soonAfter:
			attempt, renewed = 0, time.Now()
			continue
		case time.Since(began) > steadyAfter:
			attempt = 0
		}
		s.told(err)
		wait := backoffOf(attempt, rand.Float64()) //nolint:gosec // jitter is no secret
		attempt++
		s.client.meter.Count("agentclient_reconnects", 1)
		s.client.log.WarnContext(ctx, "not connected to the server; it is tried again", slog.Any("error", err), slog.Duration("in", wait))
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// backoffOf returns how long to wait before an attempt: full jitter, so that the agents of a server that comes back do not
// all come at once; between 0.5 and 30 s.
func backoffOf(attempt int, jitter float64) time.Duration {
	ceiling := min(maxBackoff, minBackoff<<min(attempt, 10))
	return minBackoff + time.Duration(jitter*float64(ceiling-minBackoff))
}

func (s *Session) told(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.Connected || s.status.Since.IsZero() {
		s.status.Since = s.client.cfg.Now()
	}
	s.status.Connected, s.conn = false, nil
	if err != nil {
		s.status.Error, s.why = err.Error(), err.Error()
		if r := refusal.As(err); r != nil {
			s.why = r.Why // whoever asks meanwhile gets a refusal of its own around it
		}
	}
}

// connected holds one connection until something of it ends.
func (s *Session) connected(ctx context.Context) error {
	conn, err := s.client.dial()
	if err != nil {
		return err
	}
	defer conn.close()
	s.mu.Lock()
	s.conn = conn
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.conn == conn {
			s.conn = nil
		}
	}()
	if !s.client.cfg.Now().Before(s.client.renewAt()) { // it slept, or is late: renewing comes first, as nothing else may be answered
		if err := s.renew(ctx, conn); err != nil {
			return err
		}
		return errRenewed
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(ctx, conn) })
	g.Go(func() error { return s.renewInTime(ctx, conn) })
	if s.cfg.Spool != nil {
		g.Go(func() error { return s.push(ctx, conn) })
	}
	err = g.Wait()
	if errors.Is(err, ErrCertExpired) { // the server's clock is what counts
		if rerr := s.renew(context.WithoutCancel(ctx), conn); rerr != nil {
			return rerr
		}
		return errRenewed
	}
	return err
}

func (s *Session) renew(ctx context.Context, conn *connection) error {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	return s.client.renew(ctx, conn)
}

// renewInTime waits until the certificate is due, renews it, and ends the connection.
func (s *Session) renewInTime(ctx context.Context, conn *connection) error {
	attempt := 0
	for {
		wait := s.client.renewAt().Sub(s.client.cfg.Now())
		if attempt > 0 {
			wait = backoffOf(attempt, rand.Float64()) //nolint:gosec // jitter is no secret
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(max(wait, 0), time.Minute)): // the clock may be set meanwhile
		}
		if s.client.cfg.Now().Before(s.client.renewAt()) {
			continue
		}
		err := s.renew(ctx, conn)
		if err == nil {
			return errRenewed
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		attempt++
		s.client.log.WarnContext(ctx, "the agent's certificate was not renewed; it is tried again", slog.Any("error", err))
	}
}

// heard notes that the server is there, and its clock.
func (s *Session) heard(ctx context.Context, at time.Time) {
	now := s.client.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.status.Connected {
		s.status.Connected, s.status.Since, s.status.Error = true, now, ""
	}
	s.status.Heard = now
	if at.IsZero() {
		return
	}
	was := s.skew
	s.skew = at.Sub(now)
	if s.skew.Abs() > maxClockSkew && was.Abs() <= maxClockSkew {
		s.client.meter.Count("agentclient_clock_differs", 1)
		s.client.log.ErrorContext(ctx, "this machine's clock differs from the server's; certificates will not be accepted", slog.String("how", howFar(now, at)))
	}
}

// follow applies what comes down.
func (s *Session) follow(ctx context.Context, conn *connection) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.stub.Sync(ctx)
	if err != nil {
		return s.client.refused(ctx, conn, err)
	}
	at := s.revision()
	if err := stream.Send(&agentpb.SyncRequest{Revision: at}); err != nil && !errors.Is(err, io.EOF) {
		return s.client.refused(ctx, conn, err)
	}
	quiet := time.AfterFunc(quietFor, cancel)
	defer quiet.Stop()
	var parts []fleet.Change
	size, seq := 0, uint64(0)
	for {
		m, err := stream.Recv()
		if err != nil {
			return s.client.refused(context.WithoutCancel(ctx), conn, err)
		}
		quiet.Reset(quietFor)
		s.heard(ctx, fromMillis(m.GetServerTime()))
		if m.GetSeq() != 0 {
			seq = m.GetSeq()
			changes, err := changesOf(m, at)
			if err != nil {
				s.client.meter.Count("agentclient_changes_malformed", 1)
				return err
			}
			switch {
			case !m.GetSnapshot():
				err = s.apply(ctx, changes, false, m.GetRevision())
			default:
				for _, c := range changes {
					size += len(c.Payload) + len(c.Key)
				}
				if size > maxSnapshotBytes {
					return refuse(ErrMessage, refusal.Exhausted, "snapshot from the server", "it is larger than 512 MiB", "report this: the domain has outgrown this agent")
				}
				parts = append(parts, changes...)
				if m.GetRevision() == 0 {
					break // more of it comes
				}
				err = s.apply(ctx, parts, true, m.GetRevision())
				parts, size = nil, 0
			}
			if err != nil {
				return err
			}
			if m.GetRevision() != 0 {
				at = m.GetRevision()
			}
		}
		// A heartbeat is answered too, so that the server hears of this machine.
		if err := stream.Send(&agentpb.SyncRequest{Revision: at, Seq: seq}); err != nil && !errors.Is(err, io.EOF) {
			return s.client.refused(ctx, conn, err)
		}
	}
}

func (s *Session) revision() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.past != 0 || s.cfg.Receiver == nil {
		return s.past
	}
	return s.cfg.Receiver.Revision()
}

func (s *Session) apply(ctx context.Context, changes []fleet.Change, snapshot bool, revision uint64) error {
	if err := s.takeBundle(ctx, changes); err != nil {
		return err
	}
	if s.cfg.Receiver != nil {
		if err := s.cfg.Receiver.Apply(ctx, changes, snapshot); err != nil {
			return err
		}
	}
	s.client.meter.Count("agentclient_changes_applied", int64(len(changes)))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.past, s.status.Revision = revision, revision
	return nil
}

// takeBundle keeps the roots by which this agent knows its server: without them it could not come back.
func (s *Session) takeBundle(ctx context.Context, changes []fleet.Change) error {
	creds := s.client.current()
	for _, c := range changes {
		if c.Kind != fleet.KindBundle || c.Deleted || c.Key != creds.Bundle.TrustDomain.String() {
			continue
		}
		b, err := identity.ParseBundle(creds.Bundle.TrustDomain, c.Payload)
		if err != nil || len(b.X509Authorities) == 0 {
			return malformed("trust bundle from the server", "it cannot be parsed, or is empty")
		}
		if err := s.client.save(ctx, &Credentials{Key: creds.Key, Chain: creds.Chain, Bundle: b}); err != nil {
			return err
		}
	}
	return nil
}

// push sends up what happened. What the server acknowledged is stored there, and leaves the queue; what it did not is sent
// again, and stored once.
func (s *Session) push(ctx context.Context, conn *connection) error {
	stream, err := conn.stub.PushEvents(ctx)
	if err != nil {
		return s.client.refused(ctx, conn, err)
	}
	after := uint64(0)
	for {
		next, err := s.cfg.Spool.Next(ctx, after, pushBatch)
		if err != nil {
			return err
		}
		batch, size := &agentpb.EventBatch{Stream: s.cfg.Stream}, 0
		for _, n := range next {
			x, err := eventTo(n.Seq, n.Event)
			if err != nil {
				return err
			}
			if size += len(x.Event) + 16; size > pushBytes && len(batch.Events) > 0 {
				break
			}
			batch.Events = append(batch.Events, x)
		}
		if len(batch.Events) == 0 {
			continue
		}
		last := batch.Events[len(batch.Events)-1].Seq
		if err := stream.Send(batch); err != nil && !errors.Is(err, io.EOF) {
			return s.client.refused(ctx, conn, err)
		}
		ack, err := stream.Recv()
		if err != nil {
			return s.client.refused(context.WithoutCancel(ctx), conn, err)
		}
		if ack.GetSeq() < last {
			return malformed("acknowledgement of events", "it is of fewer than were sent")
		}
		if err := s.cfg.Spool.Ack(last); err != nil {
			return err
		}
		s.client.meter.Count("agentclient_events_pushed", int64(len(batch.Events)))
		after = last
	}
}

// ask returns the connection for a call and how long it may take, or why there is none.
func (s *Session) ask(ctx context.Context) (*connection, context.Context, context.CancelFunc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		within := askWithin
		if !s.status.Connected { // it may still come about: wait, but not for long
			within = connectWithin
		}
		ctx, cancel := context.WithTimeout(ctx, within)
		return s.conn, ctx, cancel, nil
	}
	why := s.why
	if s.status.Error == "" {
		why = "this agent is not connected to it"
	}
	return nil, nil, nil, refuse(ErrUnreachable, refusal.Unavailable, "server "+s.client.cfg.Server, why, "it is tried again; what was decided and issued here still holds")
}

// SignX509 implements machine.Upstream.
func (s *Session) SignX509(ctx context.Context, instance string, csr []byte) ([]*x509.Certificate, error) {
	conn, ctx, cancel, err := s.ask(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	answer, err := conn.stub.SignX509(ctx, &agentpb.SignX509Request{Instance: instance, Csr: csr})
	if err != nil {
		return nil, s.client.refused(ctx, conn, err)
	}
	return chainOf(answer.GetChain())
}

// SignJWT implements machine.Upstream.
func (s *Session) SignJWT(ctx context.Context, instance string, audience []string) (*identity.JWTSVID, error) {
	conn, ctx, cancel, err := s.ask(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	answer, err := conn.stub.SignJWT(ctx, &agentpb.SignJWTRequest{Instance: instance, Audience: audience})
	if err != nil {
		return nil, s.client.refused(ctx, conn, err)
	}
	id, err := identity.ParseID(answer.GetId())
	if err != nil || answer.GetToken() == "" {
		return nil, malformed("JWT-SVID from the server", "its ID or token is malformed")
	}
	return &identity.JWTSVID{ID: id, Token: answer.GetToken(), Audience: answer.GetAudience(), Expires: fromMillis(answer.GetExpires())}, nil
}

// Report implements machine.Upstream.
func (s *Session) Report(ctx context.Context, r fleet.Report) ([]fleet.Assigned, error) {
	conn, ctx, cancel, err := s.ask(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	stream, err := conn.stub.Report(ctx)
	if err != nil {
		return nil, s.client.refused(ctx, conn, err)
	}
	part, size := &agentpb.ReportRequest{Gone: r.Gone, Full: r.Full}, 0
	for _, o := range r.Present {
		x, err := observedTo(o)
		if err != nil {
			return nil, err
		}
		part.Present = append(part.Present, x)
		if size += len(x.Facts); size < partBytes {
			continue
		}
		if err := stream.Send(part); err != nil {
			break // the answer says why
		}
		part, size = &agentpb.ReportRequest{}, 0
	}
	if err := stream.Send(part); err != nil && !errors.Is(err, io.EOF) {
		return nil, s.client.refused(ctx, conn, err)
	}
	if err := stream.CloseSend(); err != nil {
		return nil, s.client.refused(ctx, conn, err)
	}
	var out []fleet.Assigned
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, s.client.refused(ctx, conn, err)
		}
		for _, x := range answer.GetAssigned() {
			a, err := assignedOf(x)
			if err != nil {
				return nil, err
			}
			out = append(out, a)
		}
	}
}
