package fleet

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

const maxStreamName = 64

// Ingest stores events of a machine's stream, each once: what was stored before (by number) is passed over, so that an
// agent whose acknowledgement was lost may send again. It returns the number up to which all is stored.
//
// The caller has authenticated the machine, whose name replaces what the events say. Numbers rise within a batch; gaps
// are counted and accepted (a queue that overflowed says so in an event of its own). A machine that sends faster than
// [EventRate] waits. Errors: [ErrEvents]; [ErrEventRate], of which nothing was stored.
// Durability: on disk when it returns.
func (f *Fleet) Ingest(ctx context.Context, machine, stream string, batch []Numbered) (uint64, error) {
	what := "events of machine " + machine
	if len(batch) > MaxEventBatch || len(stream) > maxStreamName {
		f.meter.Count("fleet_events_refused", int64(len(batch)), "code", ErrEvents.Code)
		return 0, refuse(ErrEvents, refusal.Exhausted, what, fmt.Sprintf("a batch has more than %d, or its stream's name more than %d bytes", MaxEventBatch, maxStreamName),
			"send smaller batches")
	}
	for i := range batch {
		if batch[i].Seq == 0 || i > 0 && batch[i].Seq <= batch[i-1].Seq {
			f.meter.Count("fleet_events_refused", int64(len(batch)), "code", ErrEvents.Code)
			return 0, refuse(ErrEvents, refusal.Invalid, what, "their numbers do not rise from 1", "send them in the order of the queue")
		}
	}
	if err := f.pace(ctx, machine, len(batch)); err != nil {
		return 0, err
	}
	var last uint64
	var stored, doubles, gaps int64
	err := f.cfg.Store.Update(ctx, func(tx Tx) error {
		stored, doubles, gaps = 0, 0, 0
		at, err := tx.Events.Stream(ctx, machine)
		if err != nil {
			return err
		}
		if at.Stream != stream {
			at = EventStream{Stream: stream}
		}
		at.Machine = machine
		for _, n := range batch {
			if n.Seq <= at.Last {
				doubles++
				continue
			}
			if n.Seq != at.Last+1 {
				gaps++
			}
			n.Event.Machine = machine
			if _, err := tx.Events.AppendEvent(ctx, StoredEvent{Machine: machine, Seq: n.Seq, Event: f.fitting(n.Event)}); err != nil {
				return err
			}
			at.Last = n.Seq
			stored++
		}
		last = at.Last
		if err := tx.Events.PutStream(ctx, at); err != nil {
			return err
		}
		_, err = f.trim(ctx, tx.Events, 2*MaxEventBatch)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("store events: %w", err)
	}
	f.meter.Count("fleet_events_stored", stored)
	f.meter.Count("fleet_events_doubled", doubles)
	f.meter.Count("fleet_event_gaps", gaps)
	f.mu.Lock()
	defer f.mu.Unlock()
	if stored > 0 {
		close(f.told)
		f.told = make(chan struct{})
	}
	return last, nil
}

// fitting returns e within [event.MaxBytes]: without its detail if need be, and else reduced to what it was about.
func (f *Fleet) fitting(e event.Event) event.Event {
	if e.Detail != nil && !json.Valid(e.Detail) {
		e.Detail = nil
	}
	raw, err := json.Marshal(e)
	if err == nil && len(raw) <= event.MaxBytes {
		return e
	}
	f.meter.Count("fleet_events_oversize", 1)
	size := len(raw)
	e.Detail = nil
	attrs := map[string]any{"oversize.bytes": size}
	if raw, err = json.Marshal(e); err == nil && len(raw) < event.MaxBytes-64 {
		maps.Copy(attrs, e.Attrs)
		e.Attrs = attrs
		return e
	}
	return event.Event{
		ID: clip(e.ID, 64), Time: e.Time, Layer: event.Layer(clip(string(e.Layer), 32)), Kind: clip(e.Kind, 64), Machine: e.Machine,
		Workload: clip(e.Workload, maxInstance), Decision: policy.ID(clip(string(e.Decision), 64)), Verdict: policy.Verdict(clip(string(e.Verdict), 16)),
		Mode: policy.Mode(clip(string(e.Mode), 16)), Message: clip(e.Message, 1024), Attrs: attrs,
	}
}

// EventsStored returns a channel that is closed when an event is next stored: take it before [Fleet.Events].
func (f *Fleet) EventsStored() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.told
}

// Events answers a query; at most [MaxPage] at once.
func (f *Fleet) Events(ctx context.Context, q EventQuery) ([]StoredEvent, error) {
	q.Limit = page(q.Limit)
	var out []StoredEvent
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Events.Events(ctx, q)
		return err
	})
	return out, err
}

// Told is a decision as one machine told of it.
type Told struct {
	Decision policy.Decision `json:"decision"`
	Event    StoredEvent     `json:"event"`
}

// Decision returns what was told of a decision, oldest first: by the machine that made it and, if it travelled, by others.
// Who told is the server's word ([StoredEvent.Machine]), what it told is not. Errors: [ErrDecision].
func (f *Fleet) Decision(ctx context.Context, id policy.ID) ([]Told, error) {
	events, err := f.Events(ctx, EventQuery{Decision: id, Limit: 16})
	if err != nil {
		return nil, err
	}
	if len(events) == 0 || id == "" {
		return nil, refuse(ErrDecision, refusal.Unknown, "decision", "no machine has told of it, or it is older than the events kept",
			"if its machine is cut off, ask there: redoubt why asks the agent, too")
	}
	out := make([]Told, 0, len(events))
	for _, e := range events {
		told := Told{Event: e}
		if err := json.Unmarshal(e.Event.Detail, &told.Decision); err != nil {
			// It came without its detail (too large), or with a wrong one: what the event says is left.
			told.Decision = policy.Decision{
				ID: id, Time: e.Event.Time, Verdict: e.Event.Verdict, Mode: e.Event.Mode, Machine: e.Machine,
				Explanation: policy.Explanation{Summary: e.Event.Message},
			}
		}
		out = append(out, told)
	}
	return out, nil
}
