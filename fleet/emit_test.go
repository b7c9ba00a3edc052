package fleet_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
)

const emitQueue = 16_384 // as the package has it

func verdict(v policy.Verdict) event.Event {
	e := event.New(event.Access, "decision")
	e.Verdict = v
	return e
}

func TestPermittedReadsDoNotCostADenial(t *testing.T) {
	w := newWorld(t, nil)
	for range 2 * emitQueue {
		w.fleet.Emit(verdict(policy.Permit))
	}
	if n := w.fleet.Dropped(); n != emitQueue || w.meter.get("fleet_events_dropped queue routine") != emitQueue {
		t.Errorf("%d dropped", n)
	}
	w.fleet.Emit(verdict(policy.Deny))
	w.fleet.Emit(event.New(event.Control, "policy.applied"))
	if n := w.fleet.Dropped(); n != emitQueue {
		t.Errorf("%d dropped: what matters did not find room", n)
	}
	w.run()
	eventually(t, "what matters is stored first", func() bool {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Limit: 2})
		return err == nil && len(list) == 2 && list[0].Event.Verdict == policy.Deny && list[1].Event.Kind == "policy.applied"
	})
}

func TestTheQueueOfWhatMattersIsBounded(t *testing.T) {
	w := newWorld(t, nil)
	for range emitQueue + 7 {
		w.fleet.Emit(verdict(policy.Deny))
	}
	if n := w.fleet.Dropped(); n != 7 || w.meter.get("fleet_events_dropped queue notable") != 7 {
		t.Errorf("%d dropped", n)
	}
}

func TestOwnEventsAreStoredInBatches(t *testing.T) {
	w := newWorld(t, nil)
	for range 1000 {
		w.fleet.Emit(verdict(policy.Deny))
	}
	commits := 0
	w.store.FailCommit = func() error {
		if commits++; commits == 1 {
			return errors.New("disk full")
		}
		return nil
	}
	// A server that ends at once stores what waits, or counts it.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.fleet.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if n := w.fleet.Dropped(); n != 1000 || commits != 1 {
		t.Errorf("%d dropped in %d commits", n, commits)
	}
	w.open()
	for range 1000 {
		w.fleet.Emit(verdict(policy.Deny))
	}
	commits = 1
	if err := w.fleet.Run(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Verdict: policy.Deny})
	if err != nil || len(list) != 1000 || commits != 1+2 || w.fleet.Dropped() != 0 {
		t.Errorf("%d stored in %d commits, %d dropped, %v", len(list), commits-1, w.fleet.Dropped(), err)
	}
}

func TestWhatTheStoreDidNotTakeIsTriedAgain(t *testing.T) {
	w := newWorld(t, nil)
	var full atomic.Bool
	full.Store(true)
	w.store.FailCommit = func() error {
		if full.Load() {
			return errors.New("disk full")
		}
		return nil
	}
	w.fleet.Emit(verdict(policy.Deny))
	w.run()
	eventually(t, "it failed", func() bool { return w.meter.get("fleet_events_delayed") > 0 })
	full.Store(false)
	eventually(t, "it is stored", func() bool {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Verdict: policy.Deny})
		return err == nil && len(list) == 1
	})
}
