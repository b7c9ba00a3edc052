package set_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/policy/set/settest"
)

// counter is an event.Meter that remembers.
type counter struct {
	mu sync.Mutex
	n  map[string]int64
}

func (c *counter) Count(name string, n int64, labels ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int64{}
	}
	c.n[name+" "+strings.Join(labels, " ")] += n
}

func (c *counter) of(key string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[key]
}

func open(t testing.TB, m *settest.Memory) (*set.Registry, *counter) {
	t.Helper()
	meter := &counter{}
	r, err := set.Open(t.Context(), set.Config{Store: m, Overrides: m, Meter: meter})
	if err != nil {
		t.Fatal(err)
	}
	return r, meter
}

func files(n int) []set.File {
	return []set.File{{Name: "a.cedar", Content: fmt.Sprintf("@id(\"p%d\")\npermit(principal, action == Net::Action::\"connect\", resource);\n", n)}}
}

func rec() event.Record { return event.NewRecord(`User::"operator"`, "policy-set.apply", "policy-set") }

func apply(t testing.TB, r *set.Registry, n int, expect uint64, within time.Duration) set.Edition {
	t.Helper()
	e, _, err := r.Apply(t.Context(), files(n), set.ApplyOptions{Expect: expect, ConfirmWithin: within, Author: "me", Note: "n"}, rec())
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// inForce returns the version in force and the id of its one policy ("" for the built-in set).
func inForce(r *set.Registry) (uint64, string) {
	s, e := r.Current()
	refs := s.Policies()
	if last := refs[len(refs)-1].ID; !strings.HasPrefix(last, "builtin/") {
		return e.Version, last
	}
	return e.Version, ""
}

func wantInForce(t testing.TB, r *set.Registry, version uint64, id string) {
	t.Helper()
	if v, got := inForce(r); v != version || got != id {
		t.Errorf("edition %d with %q is in force, want %d with %q", v, got, version, id)
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestAFreshServerHasTheBuiltinSet(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	wantInForce(t, r, 0, "")
	_, e := r.Current()
	if s := mustParse(t); e.Digest != s.Digest() || e.State != "" {
		t.Errorf("%+v", e)
	}
	d := r.Decide(t.Context(), administer(operator(), "machine"))
	wantDecision(t, d, policy.Permit, policy.Enforce, policy.ReasonPermit)
	if d.Machine != "server" || d.Edition != 0 {
		t.Errorf("%+v", d)
	}
}

func TestAppliesAtomicallyByExpectedVersion(t *testing.T) {
	m := &settest.Memory{}
	r, meter := open(t, m)
	changed := r.Changed()
	e := apply(t, r, 1, 0, 0)
	want := set.Edition{Version: 1, Author: "me", Note: "n", State: set.EditionActive, Cause: set.CauseApply}
	if d := cmp.Diff(want, e, cmpopts.IgnoreFields(set.Edition{}, "Digest", "Created")); d != "" {
		t.Error(d)
	}
	if !closed(changed) || closed(r.Changed()) {
		t.Error("a change must close the channel, and the next one must be open")
	}
	_, _, err := r.Apply(t.Context(), files(2), set.ApplyOptions{Expect: 0}, rec())
	if !errors.Is(err, set.ErrConflict) || !strings.Contains(err.Error(), "edition 1 is in force, not 0") {
		t.Errorf("a stale version: %v", err)
	}
	wantInForce(t, r, 1, "p1")
	apply(t, r, 2, 1, 0)
	wantInForce(t, r, 2, "p2")
	if d := r.Decide(t.Context(), connect(workload("orders", nil), entity("Service", "stock"))); d.Edition != 2 || d.Explanation.Deciding[0].ID != "p2" {
		t.Errorf("%+v", d)
	}
	again, _ := open(t, m)
	wantInForce(t, again, 2, "p2")
	records := m.Records()
	if len(records) != 2 || records[1].Detail["version"] != "2" || records[1].Detail["cause"] != "apply" || records[1].Detail["digest"] == "" {
		t.Errorf("audit: %+v", records)
	}
	if meter.of("policyset_changes verb apply outcome done") != 2 || meter.of("policyset_changes verb apply outcome refused") != 1 {
		t.Errorf("counted: %v", meter.n)
	}
}

func TestConcurrentAppliesOfOneVersion(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { _, _, errs[i] = r.Apply(t.Context(), files(i), set.ApplyOptions{}, rec()) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, set.ErrConflict) {
			t.Error(err)
		}
	}
	if v, _ := inForce(r); won != 1 || v != 1 {
		t.Errorf("%d applied, version %d", won, v)
	}
}

func TestADefectInOneFileChangesNothing(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	apply(t, r, 1, 0, 0)
	bad := append(files(2), set.File{Name: "b.yaml", Content: "kind: Widget\nname: x\nspec: {}\n"})
	_, _, err := r.Apply(t.Context(), bad, set.ApplyOptions{Expect: 1}, rec())
	wantProblem(t, err, set.CodeKind, "Widget/x")
	wantInForce(t, r, 1, "p1")
	if _, _, err := r.Apply(t.Context(), nil, set.ApplyOptions{Expect: 1}, rec()); !errors.Is(err, set.ErrEmptySet) {
		t.Errorf("no files: %v", err)
	}
	for _, opts := range []set.ApplyOptions{{Expect: 1, ConfirmWithin: time.Millisecond}, {Expect: 1, ConfirmWithin: -time.Minute}, {Expect: 1, ConfirmWithin: 8 * 24 * time.Hour}, {Expect: 1, Note: strings.Repeat("n", 1025)}} {
		if _, _, err := r.Apply(t.Context(), files(2), opts, rec()); !errors.Is(err, set.ErrApplyOptions) {
			t.Errorf("%+v: %v", opts, err)
		}
	}
	wantInForce(t, r, 1, "p1")
}

func TestADryRunAndTheSameFilesChangeNothing(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	apply(t, r, 1, 0, 0)
	changed := r.Changed()
	e, d, err := r.Apply(t.Context(), files(2), set.ApplyOptions{Expect: 1, DryRun: true}, rec())
	if err != nil || e.Version != 2 || len(d.Changes) != 2 {
		t.Errorf("dry run: %+v, %+v, %v", e, d, err)
	}
	e, d, err = r.Apply(t.Context(), files(1), set.ApplyOptions{Expect: 1}, rec())
	if err != nil || e.Version != 1 || !d.Empty() {
		t.Errorf("the same: %+v, %+v, %v", e, d, err)
	}
	if closed(changed) || len(m.Records()) != 1 {
		t.Error("something changed")
	}
}

func TestReturnsWhatIsNotConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, meter := open(t, m)
		go func() { _ = r.Run(t.Context()) }()
		apply(t, r, 1, 0, 0)
		e := apply(t, r, 2, 1, 5*time.Minute)
		if e.State != set.EditionPending || time.Until(e.ConfirmBy) != 5*time.Minute {
			t.Errorf("%+v", e)
		}
		time.Sleep(5*time.Minute - time.Second)
		wantInForce(t, r, 2, "p2")
		time.Sleep(time.Second)
		synctest.Wait()
		wantInForce(t, r, 3, "p1")
		list, err := r.Editions(t.Context(), 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		if list[0].Cause != set.CauseReturn || list[0].Restores != 1 || list[0].State != set.EditionActive || list[1].State != set.EditionReturned {
			t.Errorf("%+v", list)
		}
		if records := m.Records(); records[2].Action != "policy-set.return" || records[2].Detail["restores"] != "1" {
			t.Errorf("audit: %+v", records[2])
		}
		if meter.of("policyset_returned ") != 1 {
			t.Error("not counted")
		}
		if _, err := r.Confirm(t.Context(), 2, rec()); !errors.Is(err, set.ErrConflict) {
			t.Errorf("a late confirmation: %v", err)
		}
	})
}

func TestReturnsToTheBuiltinSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := open(t, &settest.Memory{})
		go func() { _ = r.Run(t.Context()) }()
		apply(t, r, 1, 0, time.Minute)
		time.Sleep(time.Minute)
		synctest.Wait()
		wantInForce(t, r, 2, "")
	})
}

func TestKeepsWhatIsConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, _ := open(t, m)
		go func() { _ = r.Run(t.Context()) }()
		apply(t, r, 1, 0, time.Minute)
		if _, err := r.Confirm(t.Context(), 2, rec()); !errors.Is(err, set.ErrConflict) {
			t.Errorf("of another version: %v", err)
		}
		e, err := r.Confirm(t.Context(), 1, rec())
		if err != nil || e.State != set.EditionActive || !e.ConfirmBy.IsZero() {
			t.Errorf("%+v, %v", e, err)
		}
		if _, err := r.Confirm(t.Context(), 1, rec()); !errors.Is(err, set.ErrNotPending) {
			t.Errorf("again: %v", err)
		}
		time.Sleep(time.Hour)
		wantInForce(t, r, 1, "p1")
		again, _ := open(t, m)
		if _, e := again.Current(); e.State != set.EditionActive {
			t.Errorf("after a restart: %+v", e)
		}
	})
}

func TestTheDeadlineSurvivesARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, _ := open(t, m)
		apply(t, r, 1, 0, 0)
		apply(t, r, 2, 1, time.Minute) // no Run: the server died here
		time.Sleep(time.Hour)
		if _, err := r.Confirm(t.Context(), 2, rec()); !errors.Is(err, set.ErrNotPending) {
			t.Errorf("a confirmation after the deadline: %v", err)
		}
		again, _ := open(t, m)
		began := time.Now()
		go func() { _ = again.Run(t.Context()) }()
		synctest.Wait()
		wantInForce(t, again, 3, "p1")
		if time.Since(began) != 0 {
			t.Error("not at once")
		}
	})
}

func TestNothingIsAppliedWhileAnEditionIsPending(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	apply(t, r, 1, 0, 0)
	apply(t, r, 2, 1, time.Hour)
	if _, _, err := r.Apply(t.Context(), files(3), set.ApplyOptions{Expect: 2}, rec()); !errors.Is(err, set.ErrPending) {
		t.Errorf("apply: %v", err)
	}
	if _, _, err := r.Rollback(t.Context(), 1, set.ApplyOptions{Expect: 2, ConfirmWithin: time.Minute}, rec()); !errors.Is(err, set.ErrPending) {
		t.Errorf("rollback to be confirmed: %v", err)
	}
	e, _, err := r.Rollback(t.Context(), 1, set.ApplyOptions{Expect: 2}, rec())
	if err != nil || e.Version != 3 || e.Restores != 1 || e.Cause != set.CauseRollback {
		t.Errorf("%+v, %v", e, err)
	}
	wantInForce(t, r, 3, "p1")
	if e, err := r.Edition(t.Context(), 2); err != nil || e.State != set.EditionReturned {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestRollsBackToAnyEdition(t *testing.T) {
	m := &settest.Memory{}
	r, _ := open(t, m)
	apply(t, r, 1, 0, 0)
	apply(t, r, 2, 1, 0)
	e, d, err := r.Rollback(t.Context(), 1, set.ApplyOptions{Expect: 2, Author: "me"}, rec())
	if err != nil || e.Version != 3 || e.Restores != 1 || len(d.Changes) != 2 {
		t.Errorf("%+v, %+v, %v", e, d, err)
	}
	wantInForce(t, r, 3, "p1")
	if _, _, err := r.Rollback(t.Context(), 0, set.ApplyOptions{Expect: 3}, rec()); err != nil {
		t.Fatal(err)
	}
	wantInForce(t, r, 4, "")
	again, _ := open(t, m)
	wantInForce(t, again, 4, "")
	for to, want := range map[uint64]error{9: set.ErrUnknownEdition} {
		if _, _, err := r.Rollback(t.Context(), to, set.ApplyOptions{Expect: 4}, rec()); !errors.Is(err, want) {
			t.Errorf("to %d: %v", to, err)
		}
	}
	if _, _, err := r.Rollback(t.Context(), 1, set.ApplyOptions{Expect: 3}, rec()); !errors.Is(err, set.ErrConflict) {
		t.Errorf("a stale version: %v", err)
	}
}

// TestARollbackOfALockOut tells the story of the un-lock rule: an operator forbids everything, himself included, and is
// still let in to roll back.
func TestARollbackOfALockOut(t *testing.T) {
	r, _ := open(t, &settest.Memory{})
	lockout := []set.File{{Name: "oops.cedar", Content: "forbid(principal, action, resource);"}}
	if _, _, err := r.Apply(t.Context(), lockout, set.ApplyOptions{}, rec()); err != nil {
		t.Fatal(err)
	}
	if d := r.Decide(t.Context(), administer(operator(), "machine")); d.Allowed() {
		t.Error("the forbid must restrict what is not needed to roll back")
	}
	if d := r.Decide(t.Context(), administer(operator(), set.PolicySetSection)); !d.Allowed() {
		t.Fatalf("locked out: %s", d.Explanation.Summary)
	}
	if _, _, err := r.Rollback(t.Context(), 0, set.ApplyOptions{Expect: 1}, rec()); err != nil {
		t.Fatal(err)
	}
	if d := r.Decide(t.Context(), administer(operator(), "machine")); !d.Allowed() {
		t.Error(d.Explanation.Summary)
	}
}

func TestAStoreThatFails(t *testing.T) {
	broken := errors.New("disk full")
	m := &settest.Memory{}
	r, meter := open(t, m)
	apply(t, r, 1, 0, 0)
	m.Fail = func(method string) error {
		if method == "Activate" {
			return broken
		}
		return nil
	}
	if _, _, err := r.Apply(t.Context(), files(2), set.ApplyOptions{Expect: 1}, rec()); !errors.Is(err, broken) {
		t.Error(err)
	}
	wantInForce(t, r, 1, "p1")
	if meter.of("policyset_changes verb apply outcome failed") != 1 {
		t.Errorf("counted: %v", meter.n)
	}
	m.Fail = nil
	// A failure that is told although the change was made: what is in force must follow the store.
	m.After = func(string) error { return broken }
	if _, _, err := r.Apply(t.Context(), files(2), set.ApplyOptions{Expect: 1, ConfirmWithin: time.Hour}, rec()); !errors.Is(err, broken) {
		t.Error(err)
	}
	wantInForce(t, r, 2, "p2")
	if _, err := r.Confirm(t.Context(), 2, rec()); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, e := r.Current(); e.State != set.EditionActive {
		t.Errorf("confirmed in the store, but here %s", e.State)
	}
	if _, err := r.Observe(t.Context(), set.Override{Selector: set.Selector{All: true}}, rec()); !errors.Is(err, broken) || len(r.Overrides()) != 1 {
		t.Errorf("%v, %v", err, r.Overrides())
	}
}

func TestRunTriesAgainUntilTheStoreWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, meter := open(t, m)
		apply(t, r, 1, 0, 0)
		apply(t, r, 2, 1, time.Minute)
		var locked atomic.Bool
		locked.Store(true)
		m.Fail = func(method string) error {
			if method == "Activate" && locked.Load() {
				return errors.New("locked")
			}
			return nil
		}
		go func() { _ = r.Run(t.Context()) }()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		wantInForce(t, r, 2, "p2")
		if n := meter.of("policyset_settle_failed "); n < 3 || n > 20 {
			t.Errorf("%d failures in a minute", n)
		}
		locked.Store(false)
		time.Sleep(31 * time.Second)
		synctest.Wait()
		wantInForce(t, r, 3, "p1")
	})
}

func TestRefusesACorruptStore(t *testing.T) {
	for what, change := range map[string]func(*set.Edition){
		"a file that does not parse": func(e *set.Edition) { e.Files[0].Content = "permit(" },
		"a file that was changed":    func(e *set.Edition) { e.Files[0].Content += "// more" },
	} {
		m := &settest.Memory{}
		e := set.Edition{Version: 1, Files: files(1), Digest: mustParse(t, files(1)...).Digest(), State: set.EditionActive}
		change(&e)
		if err := m.Activate(t.Context(), e, 0, rec()); err != nil {
			t.Fatal(err)
		}
		if _, err := set.Open(t.Context(), set.Config{Store: m, Overrides: m}); !errors.Is(err, set.ErrCorruptEdition) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestThePanicSwitch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, meter := open(t, m)
		go func() { _ = r.Run(t.Context()) }()
		if _, _, err := r.Apply(t.Context(), []set.File{yml(enforceAll)}, set.ApplyOptions{}, rec()); err != nil {
			t.Fatal(err)
		}
		request := connect(workload("orders", nil), entity("Service", "stock"))
		changed := r.Changed()
		o, err := r.Observe(t.Context(), set.Override{Selector: set.Selector{Service: "orders"}, Author: "me", Note: "outage"}, rec())
		if err != nil || o.ID == "" || o.Expires.Sub(o.Created) != set.DefaultOverride || !closed(changed) {
			t.Fatalf("%+v, %v", o, err)
		}
		if d := r.Decide(t.Context(), request); !d.WouldDeny() {
			t.Error(d.Explanation.Summary)
		}
		if records := m.Records(); records[1].Detail["selector"] != "service=orders" || records[1].Detail["override"] != o.ID {
			t.Errorf("audit: %+v", records)
		}
		again, _ := open(t, m)
		if d := cmp.Diff([]set.Override{o}, again.Overrides()); d != "" {
			t.Errorf("after a restart: %s", d)
		}
		changed = r.Changed()
		time.Sleep(time.Hour)
		synctest.Wait()
		if d := r.Decide(t.Context(), request); d.Allowed() {
			t.Error("an override must end by itself")
		}
		if left, _ := m.Overrides(t.Context()); len(left) != 0 || !closed(changed) || meter.of("policyset_overrides_expired ") != 1 {
			t.Errorf("left: %v", left)
		}
		o, err = r.Observe(t.Context(), set.Override{Selector: set.Selector{All: true}, Expires: time.Now().Add(time.Minute)}, rec())
		if err != nil {
			t.Fatal(err)
		}
		if err := r.EndObserve(t.Context(), o.ID, rec()); err != nil || len(r.Overrides()) != 0 {
			t.Errorf("%v, %v", err, r.Overrides())
		}
		if err := r.EndObserve(t.Context(), o.ID, rec()); !errors.Is(err, set.ErrUnknownOverride) {
			t.Errorf("twice: %v", err)
		}
	})
}

func TestOverridesThatAreOverdueEndWhenRunBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &settest.Memory{}
		r, _ := open(t, m)
		if _, err := r.Observe(t.Context(), set.Override{Selector: set.Selector{All: true}}, rec()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		again, _ := open(t, m)
		if n := len(again.Overrides()); n != 0 {
			t.Errorf("%d overrides before Run", n)
		}
		go func() { _ = again.Run(t.Context()) }()
		synctest.Wait()
		if left, _ := m.Overrides(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestOverridesAreBounded(t *testing.T) {
	m := &settest.Memory{}
	r, meter := open(t, m)
	all := set.Selector{All: true}
	for what, c := range map[string]struct {
		o    set.Override
		want error
	}{
		"of nothing":  {set.Override{}, set.ErrSelector},
		"too long":    {set.Override{Selector: all, Expires: time.Now().Add(set.MaxOverride + time.Minute)}, set.ErrOverrideExpiry},
		"over":        {set.Override{Selector: all, Expires: time.Now().Add(-time.Second)}, set.ErrOverrideExpiry},
		"a long note": {set.Override{Selector: all, Note: strings.Repeat("n", 1025)}, set.ErrApplyOptions},
	} {
		if _, err := r.Observe(t.Context(), c.o, rec()); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range set.MaxOverrides {
		if _, err := r.Observe(t.Context(), set.Override{Selector: all}, rec()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Observe(t.Context(), set.Override{Selector: all}, rec()); !errors.Is(err, set.ErrTooManyOverrides) {
		t.Errorf("one more: %v", err)
	}
	if meter.of("policyset_changes verb observe outcome refused") != 5 {
		t.Errorf("counted: %v", meter.n)
	}
}
