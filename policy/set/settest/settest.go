// Package settest has the contracts of policy/set's stores as tests, and stores in memory that keep them.
//
// Trust: for tests only; nothing here is durable.
package settest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy/set"
)

// start is a time as stores keep it.
var start = time.Date(2026, 11, 22, 10, 0, 0, 123456000, time.UTC)

// edition returns the edition of a version, with all fields that a store must keep.
func edition(version uint64) set.Edition {
	return set.Edition{
		Version: version, Digest: fmt.Sprintf("%064d", version), Files: []set.File{
			{Name: "a.cedar", Content: fmt.Sprintf("// edition %d\n", version)}, {Name: "dir/b.yaml", Content: "# é\n---\n"},
		},
		Author: `User::"operator"`, Note: "note", Created: start.Add(time.Duration(version) * time.Minute), State: set.EditionActive, Cause: set.CauseApply,
	}
}

func record(action string) event.Record {
	return event.NewRecord(`User::"operator"`, action, "policy-set")
}

func bare(e set.Edition) set.Edition {
	e.Files = nil
	return e
}

func activate(t *testing.T, s set.Store, e set.Edition) {
	t.Helper()
	if err := s.Activate(t.Context(), e, e.Version-1, record("policy-set.apply")); err != nil {
		t.Fatalf("activate %d: %v", e.Version, err)
	}
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// TestStore holds a store to the contract of [set.Store]. open returns an empty store.
func TestStore(t *testing.T, open func() set.Store) {
	t.Run("an empty store has no edition", func(t *testing.T) {
		s := open()
		if _, err := s.Current(t.Context()); !errors.Is(err, set.ErrNone) {
			t.Errorf("Current: %v, want ErrNone", err)
		}
		if _, err := s.Edition(t.Context(), 1); !errors.Is(err, set.ErrUnknownEdition) {
			t.Errorf("Edition: %v, want ErrUnknownEdition", err)
		}
		if list, err := s.Editions(t.Context(), 0, 10); err != nil || len(list) != 0 {
			t.Errorf("Editions: %v, %v", list, err)
		}
		if err := s.Confirm(t.Context(), 1, record("policy-set.confirm")); !errors.Is(err, set.ErrConflict) {
			t.Errorf("Confirm: %v, want ErrConflict", err)
		}
	})
	t.Run("keeps every field", func(t *testing.T) {
		s := open()
		e := edition(1)
		e.State, e.ConfirmBy, e.Cause, e.Restores = set.EditionPending, start.Add(time.Hour), set.CauseRollback, 7
		activate(t, s, e)
		got, err := s.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		same(t, "current", got, e)
		got, err = s.Edition(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "edition 1", got, e)
		empty := edition(2)
		empty.Files, empty.Author, empty.Note = nil, "", ""
		activate(t, s, empty)
		if got, err = s.Current(t.Context()); err != nil || len(got.Files) != 0 {
			t.Errorf("an edition without files: %+v, %v", got, err)
		}
	})
	t.Run("the former edition is superseded, or returned if it was pending", func(t *testing.T) {
		s := open()
		activate(t, s, edition(1))
		pending := edition(2)
		pending.State, pending.ConfirmBy = set.EditionPending, start.Add(time.Hour)
		activate(t, s, pending)
		activate(t, s, edition(3))
		list, err := s.Editions(t.Context(), 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		first, second := bare(edition(1)), bare(edition(2))
		first.State, second.State = set.EditionSuperseded, set.EditionReturned
		same(t, "editions", list, []set.Edition{bare(edition(3)), second, first})
	})
	t.Run("activates only on what was expected", func(t *testing.T) {
		s := open()
		activate(t, s, edition(1))
		for what, try := range map[string]struct{ version, expect uint64 }{
			"none expected": {1, 0}, "a later one expected": {3, 2}, "a version left out": {3, 1}, "the same version": {1, 1},
		} {
			if err := s.Activate(t.Context(), edition(try.version), try.expect, record("policy-set.apply")); !errors.Is(err, set.ErrConflict) {
				t.Errorf("%s: %v, want ErrConflict", what, err)
			}
		}
		got, err := s.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		same(t, "current", got, edition(1))
	})
	t.Run("of concurrent activations one succeeds", func(t *testing.T) {
		s := open()
		const racers = 16
		errs := make([]error, racers)
		var wg sync.WaitGroup
		for i := range racers {
			wg.Go(func() { errs[i] = s.Activate(t.Context(), edition(1), 0, record("policy-set.apply")) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			switch {
			case err == nil:
				won++
			case !errors.Is(err, set.ErrConflict):
				t.Errorf("loser got %v, want ErrConflict", err)
			}
		}
		if won != 1 {
			t.Errorf("%d activations succeeded, want 1", won)
		}
	})
	t.Run("confirms the pending current edition only", func(t *testing.T) {
		s := open()
		activate(t, s, edition(1))
		if err := s.Confirm(t.Context(), 1, record("policy-set.confirm")); !errors.Is(err, set.ErrConflict) {
			t.Errorf("confirm of an active edition: %v, want ErrConflict", err)
		}
		e := edition(2)
		e.State, e.ConfirmBy = set.EditionPending, start.Add(time.Hour)
		activate(t, s, e)
		if err := s.Confirm(t.Context(), 1, record("policy-set.confirm")); !errors.Is(err, set.ErrConflict) {
			t.Errorf("confirm of a former edition: %v, want ErrConflict", err)
		}
		if err := s.Confirm(t.Context(), 2, record("policy-set.confirm")); err != nil {
			t.Fatal(err)
		}
		got, err := s.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		same(t, "confirmed", got, edition(2))
		if err := s.Confirm(t.Context(), 2, record("policy-set.confirm")); !errors.Is(err, set.ErrConflict) {
			t.Errorf("second confirm: %v, want ErrConflict", err)
		}
	})
	t.Run("pages newest first and keeps the newest", func(t *testing.T) {
		s := open()
		const all = set.KeepEditions + 5
		for v := uint64(1); v <= all; v++ {
			activate(t, s, edition(v))
		}
		var versions []uint64
		for before := uint64(0); ; {
			page, err := s.Editions(t.Context(), before, 7)
			if err != nil {
				t.Fatal(err)
			}
			if len(page) == 0 {
				break
			}
			for _, e := range page {
				if e.Files != nil {
					t.Fatal("a list has files")
				}
				versions = append(versions, e.Version)
			}
			before = page[len(page)-1].Version
		}
		var want []uint64
		for v := uint64(all); v > all-set.KeepEditions; v-- {
			want = append(want, v)
		}
		same(t, "versions", versions, want)
		if _, err := s.Edition(t.Context(), 5); !errors.Is(err, set.ErrUnknownEdition) {
			t.Errorf("edition 5: %v, want ErrUnknownEdition", err)
		}
	})
}

func override(id string) set.Override {
	return set.Override{
		ID: id, Selector: set.Selector{Service: "orders", Machine: "m1", Labels: map[string]string{"a.b/c": "x=y,é"}},
		Expires: start.Add(time.Hour), Author: `User::"operator"`, Note: "why", Created: start,
	}
}

// TestOverrideStore holds a store to the contract of [set.OverrideStore]. open returns an empty store.
func TestOverrideStore(t *testing.T, open func() set.OverrideStore) {
	list := func(t *testing.T, s set.OverrideStore) []set.Override {
		t.Helper()
		got, err := s.Overrides(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	t.Run("keeps every field, in order of id, replaces and deletes", func(t *testing.T) {
		s := open()
		if got := list(t, s); len(got) != 0 {
			t.Fatalf("an empty store has %v", got)
		}
		all := set.Override{ID: "o-1", Selector: set.Selector{All: true}, Expires: start, Created: start}
		for _, o := range []set.Override{override("o-3"), all, override("o-2")} {
			if err := s.PutOverride(t.Context(), o, record("policy-set.observe")); err != nil {
				t.Fatal(err)
			}
		}
		same(t, "overrides", list(t, s), []set.Override{all, override("o-2"), override("o-3")})
		later := override("o-2")
		later.Expires = start.Add(2 * time.Hour)
		if err := s.PutOverride(t.Context(), later, record("policy-set.observe")); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteOverride(t.Context(), "o-3", record("policy-set.end-observe")); err != nil {
			t.Fatal(err)
		}
		same(t, "overrides", list(t, s), []set.Override{all, later})
	})
	t.Run("knows what it does not have", func(t *testing.T) {
		s := open()
		if err := s.DeleteOverride(t.Context(), "o-1", record("policy-set.end-observe")); !errors.Is(err, set.ErrUnknownOverride) {
			t.Errorf("delete: %v, want ErrUnknownOverride", err)
		}
	})
}

// Memory keeps editions and overrides in memory: a [set.Store] and a [set.OverrideStore].
//
// Concurrency: safe. Zero value: ready to use. Fail, if set, is asked before every method and can make it fail; After is
// asked after every writing method and can make it fail although it was done.
type Memory struct {
	Fail, After func(method string) error

	mu        sync.Mutex
	editions  []set.Edition
	overrides []set.Override
	records   []event.Record
}

func (m *Memory) fail(method string) error {
	if m.Fail == nil {
		return nil
	}
	return m.Fail(method)
}

func (m *Memory) done(method string, rec event.Record) error {
	m.records = append(m.records, rec)
	if m.After == nil {
		return nil
	}
	return m.After(method)
}

// Records returns the audit records written so far.
func (m *Memory) Records() []event.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.records)
}

// Current implements [set.Store].
func (m *Memory) Current(context.Context) (set.Edition, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Current"); err != nil {
		return set.Edition{}, err
	}
	if len(m.editions) == 0 {
		return set.Edition{}, set.ErrNone
	}
	return copyOf(m.editions[len(m.editions)-1]), nil
}

func copyOf(e set.Edition) set.Edition {
	e.Files = slices.Clone(e.Files)
	return e
}

// Edition implements [set.Store].
func (m *Memory) Edition(_ context.Context, version uint64) (set.Edition, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Edition"); err != nil {
		return set.Edition{}, err
	}
	for _, e := range m.editions {
		if e.Version == version {
			return copyOf(e), nil
		}
	}
	return set.Edition{}, set.ErrUnknownEdition
}

// Editions implements [set.Store].
func (m *Memory) Editions(_ context.Context, before uint64, limit int) ([]set.Edition, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Editions"); err != nil {
		return nil, err
	}
	var out []set.Edition
	for _, e := range slices.Backward(m.editions) {
		if (before == 0 || e.Version < before) && len(out) < limit {
			out = append(out, bare(e))
		}
	}
	return out, nil
}

// Activate implements [set.Store].
func (m *Memory) Activate(_ context.Context, next set.Edition, expect uint64, rec event.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Activate"); err != nil {
		return err
	}
	var current uint64
	if n := len(m.editions); n > 0 {
		current = m.editions[n-1].Version
	}
	if current != expect || next.Version != expect+1 {
		return set.ErrConflict
	}
	if n := len(m.editions); n > 0 {
		former := &m.editions[n-1]
		if former.State == set.EditionPending {
			former.State = set.EditionReturned
		} else {
			former.State = set.EditionSuperseded
		}
		former.ConfirmBy = time.Time{}
	}
	m.editions = append(m.editions, copyOf(next))
	m.editions = slices.Clone(m.editions[max(0, len(m.editions)-set.KeepEditions):])
	return m.done("Activate", rec)
}

// Confirm implements [set.Store].
func (m *Memory) Confirm(_ context.Context, version uint64, rec event.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Confirm"); err != nil {
		return err
	}
	n := len(m.editions)
	if n == 0 || m.editions[n-1].Version != version || m.editions[n-1].State != set.EditionPending {
		return set.ErrConflict
	}
	m.editions[n-1].State, m.editions[n-1].ConfirmBy = set.EditionActive, time.Time{}
	return m.done("Confirm", rec)
}

// Overrides implements [set.OverrideStore].
func (m *Memory) Overrides(context.Context) ([]set.Override, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("Overrides"); err != nil {
		return nil, err
	}
	return slices.Clone(m.overrides), nil
}

// PutOverride implements [set.OverrideStore].
func (m *Memory) PutOverride(_ context.Context, o set.Override, rec event.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("PutOverride"); err != nil {
		return err
	}
	m.overrides = slices.DeleteFunc(m.overrides, func(x set.Override) bool { return x.ID == o.ID })
	m.overrides = append(m.overrides, o)
	slices.SortFunc(m.overrides, func(a, b set.Override) int { return strings.Compare(a.ID, b.ID) })
	return m.done("PutOverride", rec)
}

// DeleteOverride implements [set.OverrideStore].
func (m *Memory) DeleteOverride(_ context.Context, id string, rec event.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("DeleteOverride"); err != nil {
		return err
	}
	n := len(m.overrides)
	m.overrides = slices.DeleteFunc(m.overrides, func(x set.Override) bool { return x.ID == id })
	if len(m.overrides) == n {
		return set.ErrUnknownOverride
	}
	return m.done("DeleteOverride", rec)
}
