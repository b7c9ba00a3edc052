package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
)

const (
	emitQueue = 16_384 // the server's own events, waiting to be stored: so many that matter, and so many routine ones
	emitBatch = 512    // stored in one transaction
)

// Record stores an event of the server's own. Durability: on disk when it returns.
func (f *Fleet) Record(ctx context.Context, e event.Event) error {
	return f.record(ctx, []event.Event{e})
}

// record stores events of the server's own, in one transaction.
func (f *Fleet) record(ctx context.Context, list []event.Event) error {
	err := f.cfg.Store.Update(ctx, func(tx Tx) error {
		for _, e := range list {
			if e.Machine == "" {
				e.Machine = ServerMachine
			}
			if _, err := tx.Events.AppendEvent(ctx, StoredEvent{Machine: ServerMachine, Event: f.fitting(e)}); err != nil {
				return err
			}
		}
		_, err := f.trim(ctx, tx.Events, 2*MaxEventBatch)
		return err
	})
	if err != nil {
		return fmt.Errorf("store event: %w", err)
	}
	f.meter.Count("fleet_events_stored", int64(len(list)))
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.told)
	f.told = make(chan struct{})
	return nil
}

// Emit takes an event of the server's own, to be stored by [Fleet.Run]. It never blocks; what does not fit its queue is
// counted ([Fleet.Dropped]). What was permitted, and what others can cause at will, has a queue of its own, so that no
// amount of it costs the word of a denial or a change. It makes a Fleet an [event.Sink].
func (f *Fleet) Emit(e event.Event) {
	if e.Verdict == policy.Permit || e.Kind == kindIssued {
		f.queue(f.routine, e, "routine")
		return
	}
	f.queue(f.emit, e, "notable")
}

func (f *Fleet) queue(to chan event.Event, e event.Event, name string) {
	select {
	case to <- e:
	default:
		f.dropped.Add(1)
		f.meter.Count("fleet_events_dropped", 1, "queue", name)
	}
}

// Dropped returns how many of the server's own events were lost since it was opened, for want of room or of a store that
// works when it ended.
func (f *Fleet) Dropped() uint64 { return f.dropped.Load() }

// waiting adds what is queued to a batch, up to what one transaction takes; what matters comes first.
func (f *Fleet) waiting(batch []event.Event) []event.Event {
	for _, from := range []chan event.Event{f.emit, f.routine} {
		for more := true; more && len(batch) < emitBatch; {
			select {
			case e := <-from:
				batch = append(batch, e)
			default:
				more = false
			}
		}
	}
	return batch
}

// drain stores what was emitted, until ctx ends, and what is left then. What the store does not take is tried again.
func (f *Fleet) drain(ctx context.Context) {
	var batch []event.Event
	for {
		if batch = f.waiting(batch); len(batch) == 0 {
			select {
			case e := <-f.emit:
				batch = append(batch, e)
			case e := <-f.routine:
				batch = append(batch, e)
			case <-ctx.Done():
			}
			batch = f.waiting(batch)
		}
		if ctx.Err() != nil {
			f.drainRest(ctx, batch)
			return
		}
		if err := f.record(ctx, batch); err != nil {
			f.meter.Count("fleet_events_delayed", 1)
			f.log.ErrorContext(ctx, "events could not be stored; it is tried again", slog.Any("error", err))
			select {
			case <-ctx.Done():
			case <-time.After(retry):
			}
			continue
		}
		batch = batch[:0]
	}
}

// drainRest stores what is left when the server ends, as long as the store takes it.
func (f *Fleet) drainRest(ctx context.Context, batch []event.Event) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainFor)
	defer cancel()
	for batch = f.waiting(batch); len(batch) > 0; batch = f.waiting(batch[:0]) {
		if err := f.record(ctx, batch); err != nil {
			lost := len(batch) + len(f.emit) + len(f.routine)
			f.dropped.Add(uint64(lost))
			f.meter.Count("fleet_events_dropped", int64(lost), "queue", "end")
			f.log.ErrorContext(ctx, "events were not stored before the end", slog.Int("events", lost), slog.Any("error", err))
			return
		}
	}
}
