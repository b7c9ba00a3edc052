package fleet_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
)

func TestOneMachinesEventsDoNotEvictTheOthers(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.KeepEvents = 400 })
	send := func(machine string, from, to uint64) {
		t.Helper()
		if _, err := w.fleet.Ingest(t.Context(), machine, "", numbered(from, to)); err != nil {
			t.Fatal(err)
		}
	}
	send("quiet", 1, 10)
	for range 30 {
		if err := w.fleet.Record(t.Context(), event.New(event.Control, "own")); err != nil {
			t.Fatal(err)
		}
	}
	denied := numbered(1, 1)
	denied[0].Event.Decision, denied[0].Event.Verdict = "d-1", policy.Deny
	if _, err := w.fleet.Ingest(t.Context(), "loud", "", denied); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(10) {
		send("loud", 2+i*500, 1+(i+1)*500)
	}
	for machine, want := range map[string]int{"quiet": 10, fleet.ServerMachine: 30, "loud": 360} {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Machine: machine})
		if err != nil || len(list) != want {
			t.Errorf("%d events of %s are kept, %v, want %d", len(list), machine, err, want)
		}
	}
	if _, err := w.fleet.Decision(t.Context(), "d-1"); err != nil {
		t.Errorf("its decision: %v", err)
	}
}

func TestAnAgentThatSendsTooFastWaitsAndThenIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *fleet.Config) { c.Now = time.Now })
		next := uint64(1)
		send := func() error {
			last, err := w.fleet.Ingest(t.Context(), "m1", "", numbered(next, next+fleet.MaxEventBatch-1))
			if err == nil {
				if next += fleet.MaxEventBatch; last != next-1 {
					t.Errorf("acknowledged %d, want %d", last, next-1)
				}
			}
			return err
		}
		began := time.Now()
		for range fleet.EventBurst / fleet.MaxEventBatch {
			if err := send(); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("the burst waited %s", waited)
		}
		for range 4 { // one stream, one batch after another, is kept to the rate
			if err := send(); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(began); waited != 2*time.Second {
			t.Errorf("waited %s", waited)
		}
		// Many streams at once are refused, and nothing of what is refused is stored.
		results := make(chan error, 6)
		for range 6 {
			go func() {
				_, err := w.fleet.Ingest(t.Context(), "m1", "", numbered(next, next+fleet.MaxEventBatch-1))
				results <- err
			}()
		}
		refused := 0
		for range 6 {
			if err := <-results; err != nil {
				want(t, err, fleet.ErrEventRate)
				refused++
			}
		}
		if refused != 4 || w.meter.get("fleet_events_refused code "+fleet.ErrEventRate.Code) != 4*fleet.MaxEventBatch {
			t.Errorf("%d refused", refused)
		}
		if _, err := w.fleet.Ingest(t.Context(), "m2", "", numbered(1, fleet.MaxEventBatch)); err != nil {
			t.Errorf("another machine: %v", err)
		}
		time.Sleep(time.Second)
		next += fleet.MaxEventBatch
		if err := send(); err != nil {
			t.Errorf("later: %v", err)
		}
	})
}
