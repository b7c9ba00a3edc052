package fleet_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
)

// many reports n workloads of service orders on a machine that joined.
func (w *world) many(machine string, n int) {
	w.Helper()
	var r fleet.Report
	for i := range n {
		r.Present = append(r.Present, w.observed(fmt.Sprintf("w-%04d", i), "orders"))
	}
	w.report(machine, r)
}

// held counts the workloads present, and those of them that are quarantined.
func (w *world) held() (present, held int) {
	w.Helper()
	list, err := w.fleet.Workloads(w.Context(), fleet.WorkloadQuery{State: fleet.WorkloadPresent})
	if err != nil {
		w.Fatal(err)
	}
	for _, x := range list {
		if _, ok := x.Facts.Get(identity.FactQuarantined); ok {
			held++
		}
	}
	return len(list), held
}

// strict is a store that commits nothing for a caller who has gone, as SQLite does.
type strict struct{ fleet.Store }

func (s strict) Update(ctx context.Context, fn func(fleet.Tx) error) error {
	return s.Store.Update(ctx, func(tx fleet.Tx) error { return errors.Join(fn(tx), ctx.Err()) })
}

// hasty rules end somebody's patience when they are asked.
type hasty struct {
	*rules
	cancel context.CancelFunc
}

func (h hasty) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error) {
	h.cancel()
	return h.rules.Issue(td, facts)
}

func TestAQuarantineIsNotUndoneByTheWorkloadsItIsAbout(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.many("m1", 450)
	ctx, cancel := context.WithCancel(t.Context())
	w.cfg.Store, w.cfg.Rules = strict{w.store}, hasty{w.rules, cancel}
	w.open()
	commits := 0
	w.store.FailCommit = func() error { commits++; return nil }
	q, err := w.fleet.Quarantine(ctx, fleet.Quarantine{Identity: orders, Reason: "x"}, rec())
	if err != nil || ctx.Err() == nil {
		t.Fatalf("Quarantine = %v; the caller's context: %v", err, ctx.Err())
	}
	if present, held := w.held(); present != 450 || held != 450 {
		t.Errorf("%d of %d held", held, present)
	}
	if commits < 4 { // itself, and three pages
		t.Errorf("%d commits", commits)
	}
	if err := w.fleet.Release(t.Context(), q.ID, rec()); err != nil {
		t.Fatal(err)
	}
	if _, held := w.held(); held != 0 {
		t.Errorf("%d held after the release", held)
	}
}

func TestWhatAWithdrawalMakesDueIsDoneAfterARestart(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.many("m1", 250)
	full := errors.New("disk full")
	first := func() func() error { // everything after the withdrawal itself fails
		n := 0
		return func() error {
			if n++; n > 1 {
				return full
			}
			return nil
		}
	}
	w.store.FailCommit = first()
	if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Identity: orders, Reason: "x"}, rec()); err != nil {
		t.Fatalf("the withdrawal itself was committed: %v", err)
	}
	if _, held := w.held(); held != 0 || w.meter.get("fleet_catch_up_delayed") != 1 {
		t.Errorf("%d held, %d delays", held, w.meter.get("fleet_catch_up_delayed"))
	}
	w.store.FailCommit = nil
	w.open()
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-new", "orders")}})
	if _, held := w.held(); held != 1 {
		t.Error("it must hold for those to come, from its commit on")
	}
	w.run()
	eventually(t, "all are held", func() bool { _, held := w.held(); return held == 251 })
}

func TestARevokedMachinesWorkloadsEndAfterARestart(t *testing.T) {
	w := newWorld(t, nil)
	k, _ := w.join("m1")
	w.many("m1", 250)
	n := 0
	w.store.FailCommit = func() error {
		if n++; n > 1 {
			return errors.New("disk full")
		}
		return nil
	}
	if _, err := w.fleet.RevokeMachine(t.Context(), "m1", "stolen", rec()); err != nil {
		t.Fatal(err)
	}
	w.store.FailCommit = nil
	w.open()
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrMachineRevoked)
	_, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Present: []fleet.Observed{w.observed("w-new", "orders")}})
	want(t, err, fleet.ErrMachineRevoked) // one that the door let through just before
	w.run()
	eventually(t, "all are gone", func() bool { present, _ := w.held(); return present == 0 })
}

func TestWhatWasDueIsGoneOnWithWhenTheStoreIsBack(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.many("m1", 3)
	n := 0
	w.store.FailCommit = func() error {
		if n++; n > 1 {
			return errors.New("disk full")
		}
		return nil
	}
	if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Instance: "w-0001", Reason: "x"}, rec()); err != nil {
		t.Fatal(err)
	}
	w.store.FailCommit = nil
	if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Instance: "w-0002", Reason: "x"}, rec()); err != nil {
		t.Fatal(err)
	}
	if _, held := w.held(); held != 2 {
		t.Errorf("%d held", held)
	}
}

func TestTheLastRevocationOutLetsTheMachineIn(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(w *world, good, passing string)
	}{
		{"lifted, then expired", func(w *world, good, _ string) {
			if err := w.fleet.Lift(w.Context(), good, rec()); err != nil {
				w.Fatal(err)
			}
			w.clock.add(time.Minute)
		}},
		{"expired, then lifted", func(w *world, good, _ string) {
			w.clock.add(time.Minute)
			if err := w.fleet.Sweep(w.Context()); err != nil {
				w.Fatal(err)
			}
			if err := w.fleet.Lift(w.Context(), good, rec()); err != nil {
				w.Fatal(err)
			}
		}},
		{"both lifted", func(w *world, good, passing string) {
			for _, id := range []string{good, passing} {
				if err := w.fleet.Lift(w.Context(), id, rec()); err != nil {
					w.Fatal(err)
				}
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, nil)
			k, _ := w.join("m1")
			good, err := w.fleet.RevokeMachine(t.Context(), "m1", "stolen", rec())
			if err != nil {
				t.Fatal(err)
			}
			passing, err := w.fleet.Revoke(t.Context(), fleet.Revocation{Machine: "m1", Reason: "x", Expires: w.clock.now().Add(time.Minute)}, rec())
			if err != nil {
				t.Fatal(err)
			}
			want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrMachineRevoked)
			c.end(w, good.ID, passing.ID)
			if err := w.fleet.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
				t.Errorf("nothing is left to lift, and yet: %v", err)
			}
			if m, err := w.fleet.Machine(t.Context(), "m1"); err != nil || m.State != fleet.MachineJoined {
				t.Errorf("%+v, %v", m, err)
			}
		})
	}
}

func TestQuarantinesOfInstancesThatAreNoMoreAreDropped(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.MaxWorkloads = 2 })
	w.join("m1")
	w.many("m1", 2)
	hold := func(instance string) {
		t.Helper()
		if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Instance: instance, Reason: "x"}, rec()); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (out []string) {
		t.Helper()
		list, err := w.fleet.Quarantines(t.Context(), "", 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range list {
			out = append(out, q.Instance)
		}
		return out
	}
	hold("w-0000")
	hold("w-0001")
	w.report("m1", fleet.Report{Gone: []string{"w-0000", "w-0001"}})
	if got := left(); len(got) != 2 {
		t.Errorf("left %v while they are remembered", got)
	}
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-new", "orders")}}) // makes room
	if got := left(); len(got) != 1 {
		t.Errorf("left %v", got)
	}
	w.clock.add(fleet.DefaultKeepGone + time.Second)
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := left(); len(got) != 0 || w.meter.get("fleet_pruned kind quarantine") != 2 {
		t.Errorf("left %v", got)
	}
}

// doubtful is a store that commits, and then says that it did not, once.
type doubtful struct {
	fleet.Store
	once *bool
}

func (s doubtful) Update(ctx context.Context, fn func(fleet.Tx) error) error {
	err := s.Store.Update(ctx, fn)
	if err == nil && *s.once {
		*s.once = false
		return errors.New("the disk went away")
	}
	return err
}

func TestAWithdrawalCommittedInDoubtIsFollowed(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.many("m1", 3)
	once := true
	w.cfg.Store = doubtful{w.store, &once}
	w.open()
	if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Identity: orders, Reason: "x"}, rec()); err == nil {
		t.Fatal("it cannot know")
	}
	if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Identity: mustID("spiffe://example.org/service/other"), Reason: "x"}, rec()); err != nil {
		t.Fatal(err)
	}
	if _, held := w.held(); held != 3 {
		t.Errorf("%d held", held)
	}
}
