package sqlite_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/policy/set/settest"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

func open(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func fresh(t testing.TB) *sqlite.Store {
	return open(t, filepath.Join(t.TempDir(), sqlite.FileName))
}

func rec(action string) event.Record { return event.NewRecord(`User::"op"`, action, "thing") }

func TestKeysKeepTheContract(t *testing.T) {
	catest.TestStore(t, func() ca.Store { return fresh(t).Keys() })
}

func TestEditionsKeepTheContract(t *testing.T) {
	settest.TestStore(t, func() set.Store { return fresh(t).Editions() })
}

func TestOverridesKeepTheContract(t *testing.T) {
	settest.TestOverrideStore(t, func() set.OverrideStore { return fresh(t).Overrides() })
}

func TestFleetKeepsTheContract(t *testing.T) {
	fleettest.TestStores(t, func(t *testing.T) fleet.Store { return fresh(t).Fleet() })
}

func pending(t testing.TB, s *sqlite.Store) []string {
	t.Helper()
	entries, err := s.Outbox().Pending(t.Context(), 0, 1<<20)
	if err != nil {
		t.Fatalf("pending: %v", err)
	}
	ids := []string{}
	for _, e := range entries {
		ids = append(ids, e.RecordID)
	}
	return ids
}

func TestEveryChangeAndItsRecordAreOneTransaction(t *testing.T) {
	override := set.Override{ID: "o-1", Selector: set.Selector{All: true}}
	key := ca.KeyRecord{ID: "k-1", Use: ca.X509, State: ca.Active, Certificate: []byte{1}}
	edition := set.Edition{Version: 1, State: set.EditionPending}
	for _, c := range []struct {
		name   string
		before func(ctx context.Context, s *sqlite.Store) error
		change func(ctx context.Context, s *sqlite.Store, r event.Record) error
		undone func(ctx context.Context, s *sqlite.Store) bool
	}{
		{
			"PutKeys", nil,
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Keys().PutKeys(ctx, []ca.KeyRecord{key}, r)
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				k, err := s.Keys().Keys(ctx)
				return err == nil && len(k) == 0
			},
		},
		{
			"Activate", nil,
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Editions().Activate(ctx, edition, 0, r)
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				_, err := s.Editions().Current(ctx)
				return errors.Is(err, set.ErrNone)
			},
		},
		{
			"Confirm", func(ctx context.Context, s *sqlite.Store) error {
				return s.Editions().Activate(ctx, edition, 0, rec("a"))
			},
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Editions().Confirm(ctx, 1, r)
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				e, err := s.Editions().Current(ctx)
				return err == nil && e.State == set.EditionPending
			},
		},
		{
			"PutOverride", nil,
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Overrides().PutOverride(ctx, override, r)
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				o, err := s.Overrides().Overrides(ctx)
				return err == nil && len(o) == 0
			},
		},
		{
			"DeleteOverride", func(ctx context.Context, s *sqlite.Store) error {
				return s.Overrides().PutOverride(ctx, override, rec("a"))
			},
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Overrides().DeleteOverride(ctx, "o-1", r)
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				o, err := s.Overrides().Overrides(ctx)
				return err == nil && len(o) == 1
			},
		},
		{
			"Update", nil,
			func(ctx context.Context, s *sqlite.Store, r event.Record) error {
				return s.Fleet().Update(ctx, func(tx fleet.Tx) error {
					if err := tx.Machines.PutMachine(ctx, fleet.Machine{ID: "m1"}); err != nil {
						return err
					}
					return tx.Audit.PutRecord(ctx, r)
				})
			},
			func(ctx context.Context, s *sqlite.Store) bool {
				err := s.Fleet().View(ctx, func(tx fleet.Tx) error { _, err := tx.Machines.Machine(ctx, "m1"); return err })
				return errors.Is(err, fleet.ErrNotFound)
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, s := t.Context(), fresh(t)
			if c.before != nil {
				if err := c.before(ctx, s); err != nil {
					t.Fatal(err)
				}
			}
			was := pending(t, s)
			// A record that the outbox refuses takes the change back with it.
			bad := rec("b")
			bad.Detail = map[string]string{"x": string(make([]byte, audit.MaxLeafBytes))}
			if err := c.change(ctx, s, bad); !isCode(err, sqlite.ErrRecord) {
				t.Errorf("a record beyond the bound: got %v, want code %s", err, sqlite.ErrRecord.Code)
			}
			if !c.undone(ctx, s) {
				t.Error("the change stands without its record")
			}
			good := rec("c")
			if err := c.change(ctx, s, good); err != nil {
				t.Fatal(err)
			}
			if c.undone(ctx, s) {
				t.Error("the change was not made")
			}
			if diff := cmp.Diff(append(was, good.ID), pending(t, s)); diff != "" {
				t.Errorf("outbox (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWaitingForTheWriterIsBounded(t *testing.T) {
	ctx, s := t.Context(), fresh(t)
	hold, held := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = s.Fleet().Update(ctx, func(fleet.Tx) error {
			close(held)
			<-hold
			return nil
		})
	})
	<-held
	refused := make(chan error, sqlite.MaxWaiting+8)
	for range sqlite.MaxWaiting + 7 { // with the one at work: 8 too many
		wg.Go(func() {
			if err := s.Fleet().Update(ctx, func(fleet.Tx) error { return nil }); err != nil {
				refused <- err
			}
		})
	}
	for range 8 {
		if err := <-refused; !isCode(err, sqlite.ErrTooMany) {
			t.Errorf("got %v, want code %s", err, sqlite.ErrTooMany.Code)
		}
	}
	close(hold)
	wg.Wait()
	if len(refused) > 0 {
		t.Errorf("%d more were refused", len(refused))
	}
}

func TestOutboxMarksOnceAndDropsTheLeaf(t *testing.T) {
	ctx, s := t.Context(), fresh(t)
	var want []string
	told := 0
	s.OnRecord(func() { told++ })
	for range 3 {
		r := rec("x")
		want = append(want, r.ID)
		if err := s.Overrides().PutOverride(ctx, set.Override{ID: r.ID}, r); err != nil {
			t.Fatal(err)
		}
	}
	if told != 3 {
		t.Errorf("OnRecord was called %d times, want 3", told)
	}
	box := s.Outbox()
	entries, err := box.Pending(ctx, 0, 2)
	if err != nil || len(entries) != 2 || entries[0].RecordID != want[0] || entries[0].Seq >= entries[1].Seq || len(entries[0].Leaf) == 0 {
		t.Fatalf("pending: %+v, %v", entries, err)
	}
	mark := []audit.Placed{{Seq: entries[0].Seq, Index: 7}, {Seq: entries[1].Seq, Index: 8}}
	for range 2 { // again changes nothing
		if err := box.MarkLogged(ctx, mark); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range [][]audit.Placed{
		{{Seq: entries[0].Seq, Index: 9}},                             // marked otherwise
		{{Seq: entries[1].Seq + 1, Index: 10}, {Seq: 999, Index: 11}}, // the second is unknown: none is marked
		{{Seq: entries[1].Seq + 1, Index: 8}},                         // the index is taken
	} {
		if err := box.MarkLogged(ctx, bad); !isCode(err, sqlite.ErrMarked) {
			t.Errorf("marking %v: got %v, want code %s", bad, err, sqlite.ErrMarked.Code)
		}
	}
	if tail, err := box.Tail(ctx); err != nil || tail != (audit.Tail{Next: 9, Pending: 1}) {
		t.Errorf("tail: %+v, %v", tail, err)
	}
	if i, ok, err := box.Placed(ctx, want[1]); err != nil || !ok || i != 8 {
		t.Errorf("placed: %d, %v, %v", i, ok, err)
	}
	for _, id := range []string{want[2], "r-unknown"} {
		if _, ok, err := box.Placed(ctx, id); err != nil || ok {
			t.Errorf("placed of %s: %v, %v", id, ok, err)
		}
	}
	if diff := cmp.Diff(want[2:], pending(t, s)); diff != "" {
		t.Errorf("pending (-want +got):\n%s", diff)
	}
}
