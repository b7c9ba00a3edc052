package fleettest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// TestStores is the conformance suite of [fleet.Store]: open returns an empty store, closed by its own cleanup.
func TestStores(t *testing.T, open func(t *testing.T) fleet.Store) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, fleet.Store)
	}{
		{"an update is all or nothing", testAtomic},
		{"a view cannot write", testReadOnly},
		{"updates are serializable", testSerializable},
		{"tokens", testTokens},
		{"machines", testMachines},
		{"workloads", testWorkloads},
		{"withdrawals", testWithdrawals},
		{"the change log", testChangeLog},
		{"compaction keeps what is live", testCompaction},
		{"events", testEvents},
		{"streams", testStreams},
		{"trimming", testTrim},
		{"trimming takes from who has most", testTrimShares},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, open(t)) })
	}
}

// at returns a fixed time and n seconds, as stores keep them: UTC, and no monotonic part.
func at(n int) time.Time { return time.Date(2026, 11, 22, 10, 0, n, 0, time.UTC) }

func update(t *testing.T, s fleet.Store, fn func(ctx context.Context, tx fleet.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx fleet.Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatal(err)
	}
}

func view(t *testing.T, s fleet.Store, fn func(ctx context.Context, tx fleet.Tx) error) {
	t.Helper()
	if err := s.View(t.Context(), func(tx fleet.Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatal(err)
	}
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got, comparers...); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// comparers compare by what is rendered where a type hides its fields.
var comparers = []cmp.Option{
	cmp.Comparer(func(a, b identity.FactSet) bool { return rendered(a) == rendered(b) }),
	cmp.Comparer(func(a, b identity.ID) bool { return a == b }),
	cmp.Comparer(func(a, b event.Event) bool { return rendered(a) == rendered(b) }),
	cmp.Comparer(func(a, b json.RawMessage) bool { return string(a) == string(b) }),
}

func rendered(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func factSet(facts ...identity.Fact) identity.FactSet {
	s, err := identity.NewFactSet(facts...)
	if err != nil {
		panic(err)
	}
	return s
}

func mustID(s string) identity.ID {
	id, err := identity.ParseID(s)
	if err != nil {
		panic(err)
	}
	return id
}

func testAtomic(t *testing.T, s fleet.Store) {
	boom := errors.New("boom")
	err := s.Update(t.Context(), func(tx fleet.Tx) error {
		ctx := t.Context()
		err := errors.Join(
			tx.Tokens.PutToken(ctx, fleet.JoinToken{ID: "t-1", Machine: "m1", Created: at(0), Expires: at(9)}),
			tx.Machines.PutMachine(ctx, fleet.Machine{ID: "m1", State: fleet.MachineJoined, Joined: at(0), LastSeen: at(0)}),
			tx.Workloads.PutWorkload(ctx, fleet.Workload{Instance: "w-1", Machine: "m1", State: fleet.WorkloadPresent, Since: at(0), Seen: at(0)}),
			tx.Audit.PutRecord(ctx, event.NewRecord("a", "b", "c")),
		)
		if err != nil {
			return err
		}
		if _, err := tx.Changes.Append(ctx, fleet.Change{Kind: fleet.KindIdentity, Key: "w-1", Payload: []byte(`{}`)}); err != nil {
			return err
		}
		if _, err := tx.Machines.Machine(ctx, "m1"); err != nil {
			t.Errorf("an update must see what it did: %v", err)
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Fatalf("Update = %v, want the error of fn", err)
	}
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		if _, err := tx.Tokens.Token(ctx, "t-1"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("token after a failed update: %v", err)
		}
		if _, err := tx.Machines.Machine(ctx, "m1"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("machine after a failed update: %v", err)
		}
		if _, err := tx.Workloads.Workload(ctx, "w-1"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("workload after a failed update: %v", err)
		}
		changes, err := tx.Changes.Changes(ctx, 0, 10)
		if len(changes) != 0 {
			t.Errorf("changes after a failed update: %v", changes)
		}
		return err
	})
}

func testReadOnly(t *testing.T, s fleet.Store) {
	err := s.View(t.Context(), func(tx fleet.Tx) error {
		return tx.Machines.PutMachine(t.Context(), fleet.Machine{ID: "m1", State: fleet.MachineJoined, Joined: at(0), LastSeen: at(0)})
	})
	if err == nil {
		t.Error("a view that writes must fail")
	}
}

func testSerializable(t *testing.T, s fleet.Store) {
	const workers, rounds = 4, 10
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range rounds {
				err := s.Update(t.Context(), func(tx fleet.Tx) error {
					st, err := tx.Events.Stream(t.Context(), "m1")
					if err != nil {
						return err
					}
					st.Last++
					return tx.Events.PutStream(t.Context(), st)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		st, err := tx.Events.Stream(ctx, "m1")
		equal(t, "count", st.Last, uint64(workers*rounds))
		return err
	})
}

func testTokens(t *testing.T, s fleet.Store) {
	a := fleet.JoinToken{ID: "t-a", Machine: "m1", Replace: true, Created: at(0), Expires: at(10), Author: `User::"operator"`, Hash: [32]byte{1, 2, 3, 31: 4}}
	b := fleet.JoinToken{ID: "t-b", Machine: "m2", Created: at(0), Expires: at(20), Used: at(5), Author: "x"}
	c := fleet.JoinToken{ID: "t-c", Machine: "m3", Created: at(0), Expires: at(2), Author: "x"}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		return errors.Join(tx.Tokens.PutToken(ctx, c), tx.Tokens.PutToken(ctx, a), tx.Tokens.PutToken(ctx, b))
	})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		got, err := tx.Tokens.Token(ctx, "t-a")
		equal(t, "token with its hash", got, a)
		if _, err := tx.Tokens.Token(ctx, "t-none"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("Token of an unknown id: %v", err)
		}
		list, err2 := tx.Tokens.Tokens(ctx, "", 2)
		equal(t, "first page", list, []fleet.JoinToken{a, b})
		list, err3 := tx.Tokens.Tokens(ctx, "t-b", 2)
		equal(t, "second page", list, []fleet.JoinToken{c})
		n, err4 := tx.Tokens.CountOutstanding(ctx, at(3))
		equal(t, "outstanding", n, 1)
		return errors.Join(err, err2, err3, err4)
	})
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		used := a
		used.Used = at(1)
		if err := tx.Tokens.PutToken(ctx, used); err != nil {
			return err
		}
		n, err := tx.Tokens.DeleteTokens(ctx, at(3), 1)
		equal(t, "deleted, bounded", n, 1)
		m, err2 := tx.Tokens.DeleteTokens(ctx, at(3), 10)
		equal(t, "deleted: the used and the expired", m, 1)
		return errors.Join(err, err2)
	})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		list, err := tx.Tokens.Tokens(ctx, "", 10)
		equal(t, "left", list, []fleet.JoinToken{b})
		return err
	})
}

func testMachines(t *testing.T, s fleet.Store) {
	a := fleet.Machine{
		ID: "m1", Name: "the first", State: fleet.MachineJoined, SPKI: "aa", Previous: "bb", Joined: at(0), Rotated: at(1), LastSeen: at(1), Version: "v1",
		Facts: factSet(identity.Fact{Name: "os.name", Value: "debian", Source: identity.FromKernel, Evidence: "/etc/os-release", Epoch: 3}),
	}
	b := fleet.Machine{ID: "m2", Name: "m2", State: fleet.MachineRevoked, SPKI: "cc", Joined: at(0), LastSeen: at(2)}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		lost := b
		lost.Lost = true // is not stored
		return errors.Join(tx.Machines.PutMachine(ctx, lost), tx.Machines.PutMachine(ctx, fleet.Machine{ID: "m1", State: fleet.MachineJoined, Joined: at(0), LastSeen: at(0)}), tx.Machines.PutMachine(ctx, a))
	})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		got, err := tx.Machines.Machine(ctx, "m1")
		equal(t, "machine, replaced", got, a)
		if _, err := tx.Machines.Machine(ctx, "m"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("Machine of an unknown id: %v", err)
		}
		list, err2 := tx.Machines.Machines(ctx, "", 10)
		equal(t, "list", list, []fleet.Machine{a, b})
		list, err3 := tx.Machines.Machines(ctx, "m1", 1)
		equal(t, "page", list, []fleet.Machine{b})
		n, err4 := tx.Machines.CountMachines(ctx)
		equal(t, "count", n, 2)
		return errors.Join(err, err2, err3, err4)
	})
}

func testWorkloads(t *testing.T, s fleet.Store) {
	id := mustID("spiffe://example.org/service/orders")
	a := fleet.Workload{
		Instance: "w-a", Machine: "m1", Service: "orders", ID: id, State: fleet.WorkloadPresent, Since: at(0), Seen: at(1), Epoch: 7,
		Listen:   []fleet.Listen{{Port: 8080, Protocol: "http", Address: "10.0.0.1", Netns: "4026531840"}},
		Issuance: json.RawMessage(`{"winner":"services"}`),
		Facts: factSet(
			identity.Fact{Name: "unix.uid", Value: int64(1000), Source: identity.FromKernel, Epoch: 7},
			identity.Fact{Name: "process.parents", Value: []string{"/bin/sh", "/sbin/init"}, Source: identity.FromKernel, Epoch: 2},
			identity.Fact{Name: "risk.quarantined", Value: true, Source: identity.FromServer, Expires: at(99)},
		),
	}
	b := fleet.Workload{
		Instance: "w-b", Machine: "m1", Service: "legacy", State: fleet.WorkloadPresent, Since: at(0), Seen: at(1), Epoch: 1,
		Refusal: &fleet.Refusal{Kind: refusal.Unknown, Code: "no-issuance-rule", What: "identity", Why: "no rule matches", Do: "add one", Decision: "d-1"},
	}
	gone := func(instance, machine string, seen int) fleet.Workload {
		return fleet.Workload{Instance: instance, Machine: machine, State: fleet.WorkloadGone, Since: at(0), Seen: at(seen), Epoch: 1}
	}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		for _, w := range []fleet.Workload{
			b, a, gone("w-c", "m1", 3), gone("w-d", "m1", 2), gone("w-e", "m2", 1), gone("w-f", "m1", 8),
		} {
			if err := tx.Workloads.PutWorkload(ctx, w); err != nil {
				return err
			}
		}
		return nil
	})
	names := func(list []fleet.Workload) (out []string) {
		for _, w := range list {
			out = append(out, w.Instance)
		}
		return out
	}
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		for _, want := range []fleet.Workload{a, b} {
			got, err := tx.Workloads.Workload(ctx, want.Instance)
			if err != nil {
				return err
			}
			equal(t, "workload", got, want)
		}
		if _, err := tx.Workloads.Workload(ctx, "w-none"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("Workload of an unknown instance: %v", err)
		}
		for _, c := range []struct {
			q    fleet.WorkloadQuery
			want []string
		}{
			{fleet.WorkloadQuery{Limit: 3}, []string{"w-a", "w-b", "w-c"}},
			{fleet.WorkloadQuery{Limit: 3, After: "w-c"}, []string{"w-d", "w-e", "w-f"}},
			{fleet.WorkloadQuery{Limit: 9, Machine: "m2"}, []string{"w-e"}},
			{fleet.WorkloadQuery{Limit: 9, Machine: "m1", State: fleet.WorkloadPresent}, []string{"w-a", "w-b"}},
			{fleet.WorkloadQuery{Limit: 9, Service: "orders"}, []string{"w-a"}},
			{fleet.WorkloadQuery{Limit: 9, ID: id.String()}, []string{"w-a"}},
			{fleet.WorkloadQuery{Limit: 9, Machine: "m3"}, nil},
		} {
			list, err := tx.Workloads.Workloads(ctx, c.q)
			if err != nil {
				return err
			}
			equal(t, fmt.Sprintf("%+v", c.q), names(list), c.want)
		}
		all, err := tx.Workloads.CountWorkloads(ctx, "")
		equal(t, "count of all", all, 6)
		one, err2 := tx.Workloads.CountWorkloads(ctx, "m1")
		equal(t, "count of m1", one, 5)
		size, err3 := tx.Workloads.WorkloadBytes(ctx, "m2")
		equal(t, "bytes of m2", size, len(rendered(gone("w-e", "m2", 1))))
		none, err4 := tx.Workloads.WorkloadBytes(ctx, "m9")
		equal(t, "bytes of nobody", none, 0)
		return errors.Join(err, err2, err3, err4)
	})
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		n, err := tx.Workloads.DeleteGone(ctx, "m1", at(5), 1)
		equal(t, "deleted of m1, bounded", n, []string{"w-d"})
		if _, err := tx.Workloads.Workload(ctx, "w-d"); !errors.Is(err, fleet.ErrNotFound) {
			t.Errorf("the longest gone must go first: %v", err)
		}
		m, err2 := tx.Workloads.DeleteGone(ctx, "", at(5), 10)
		slices.Sort(m)
		equal(t, "deleted of all", m, []string{"w-c", "w-e"})
		list, err3 := tx.Workloads.Workloads(ctx, fleet.WorkloadQuery{Limit: 9})
		equal(t, "left", names(list), []string{"w-a", "w-b", "w-f"})
		return errors.Join(err, err2, err3)
	})
}

func testWithdrawals(t *testing.T, s fleet.Store) {
	a := fleet.Revocation{ID: "v-a", Identity: mustID("spiffe://example.org/service/orders"), Reason: "stolen", Author: "u", Created: at(0), Expires: at(9)}
	b := fleet.Revocation{ID: "v-b", Machine: "m1", Reason: "sold", Author: "u", Created: at(0)}
	c := fleet.Revocation{ID: "v-c", SPKI: "ab", Reason: "leaked", Author: "u", Created: at(0)}
	p := fleet.Quarantine{ID: "q-a", Instance: "w-1", Reason: "odd", Author: "u", Created: at(0), Expires: at(9)}
	q := fleet.Quarantine{ID: "q-b", Identity: mustID("spiffe://example.org/service/orders"), Reason: "odd", Author: "u", Created: at(0)}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		return errors.Join(
			tx.Revocations.PutRevocation(ctx, c), tx.Revocations.PutRevocation(ctx, a), tx.Revocations.PutRevocation(ctx, b),
			tx.Quarantines.PutQuarantine(ctx, q), tx.Quarantines.PutQuarantine(ctx, p),
		)
	})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		list, err := tx.Revocations.Revocations(ctx, "", 2)
		equal(t, "revocations", list, []fleet.Revocation{a, b})
		list, err2 := tx.Revocations.Revocations(ctx, "v-b", 2)
		equal(t, "revocations, next", list, []fleet.Revocation{c})
		n, err3 := tx.Revocations.CountRevocations(ctx)
		equal(t, "count", n, 3)
		held, err4 := tx.Quarantines.Quarantines(ctx, "", 9)
		equal(t, "quarantines", held, []fleet.Quarantine{p, q})
		m, err5 := tx.Quarantines.CountQuarantines(ctx)
		equal(t, "count", m, 2)
		return errors.Join(err, err2, err3, err4, err5)
	})
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		return errors.Join(tx.Revocations.DeleteRevocation(ctx, "v-a"), tx.Quarantines.DeleteQuarantine(ctx, "q-a"))
	})
	err := s.Update(t.Context(), func(tx fleet.Tx) error { return tx.Revocations.DeleteRevocation(t.Context(), "v-a") })
	if !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("deleting a revocation twice: %v", err)
	}
	err = s.Update(t.Context(), func(tx fleet.Tx) error { return tx.Quarantines.DeleteQuarantine(t.Context(), "q-a") })
	if !errors.Is(err, fleet.ErrNotFound) {
		t.Errorf("deleting a quarantine twice: %v", err)
	}
}

// appendChanges appends key=payload pairs, a deletion where the payload is empty, and returns their revisions.
func appendChanges(t *testing.T, s fleet.Store, kind fleet.ChangeKind, pairs ...string) []uint64 {
	t.Helper()
	var out []uint64
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		out = nil
		for i := 0; i < len(pairs); i += 2 {
			c := fleet.Change{Kind: kind, Key: pairs[i], Deleted: pairs[i+1] == ""}
			if !c.Deleted {
				c.Payload = json.RawMessage(pairs[i+1])
			}
			c, err := tx.Changes.Append(ctx, c)
			if err != nil {
				return err
			}
			out = append(out, c.Revision)
		}
		return nil
	})
	return out
}

func changes(t *testing.T, s fleet.Store, after uint64, limit int) []string {
	t.Helper()
	var out []string
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		list, err := tx.Changes.Changes(ctx, after, limit)
		last := after
		for _, c := range list {
			if c.Revision <= last {
				t.Errorf("revisions must rise: %d after %d", c.Revision, last)
			}
			last = c.Revision
			out = append(out, short(c))
		}
		return err
	})
	return out
}

func live(t *testing.T, s fleet.Store, after fleet.Position, limit int) []string {
	t.Helper()
	var out []string
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		list, err := tx.Changes.Live(ctx, after, limit)
		for _, c := range list {
			out = append(out, short(c))
		}
		return err
	})
	return out
}

func short(c fleet.Change) string {
	if c.Deleted {
		return fmt.Sprintf("%s/%s deleted", c.Kind, c.Key)
	}
	return fmt.Sprintf("%s/%s=%s", c.Kind, c.Key, c.Payload)
}

func testChangeLog(t *testing.T, s fleet.Store) {
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		floor, latest, err := tx.Changes.Bounds(ctx)
		equal(t, "bounds of an empty log", [2]uint64{floor, latest}, [2]uint64{})
		return err
	})
	revs := appendChanges(t, s, fleet.KindIdentity, "b", "1", "a", "2", "b", "3")
	appendChanges(t, s, fleet.KindBundle, "td", "4")
	appendChanges(t, s, fleet.KindIdentity, "a", "", "B", "5")
	equal(t, "all", changes(t, s, 0, 10), []string{"identity/b=1", "identity/a=2", "identity/b=3", "bundle/td=4", "identity/a deleted", "identity/B=5"})
	equal(t, "from the middle, limited", changes(t, s, revs[0], 2), []string{"identity/a=2", "identity/b=3"})
	equal(t, "live, in byte order", live(t, s, fleet.Position{}, 10), []string{"bundle/td=4", "identity/B=5", "identity/b=3"})
	equal(t, "live, next page", live(t, s, fleet.Position{Kind: fleet.KindBundle, Key: "td"}, 1), []string{"identity/B=5"})
	equal(t, "live, from a kind on", live(t, s, fleet.Position{Kind: fleet.KindIdentity}, 10), []string{"identity/B=5", "identity/b=3"})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		floor, latest, err := tx.Changes.Bounds(ctx)
		if floor != 0 || latest < revs[2] {
			t.Errorf("bounds = %d, %d", floor, latest)
		}
		return err
	})
}

func testCompaction(t *testing.T, s fleet.Store) {
	appendChanges(t, s, fleet.KindIdentity, "a", "1", "b", "2", "a", "3", "c", "4")
	revs := appendChanges(t, s, fleet.KindIdentity, "c", "", "a", "5")
	before := live(t, s, fleet.Position{}, 10)
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		n, err := tx.Changes.Compact(ctx, revs[0])
		equal(t, "deleted: a=1, a=3, c=4, c's deletion", n, 4)
		return err
	})
	equal(t, "live after compaction", live(t, s, fleet.Position{}, 10), before)
	equal(t, "changes from the floor", changes(t, s, revs[0], 10), []string{"identity/a=5"})
	err := s.View(t.Context(), func(tx fleet.Tx) error {
		_, err := tx.Changes.Changes(t.Context(), revs[0]-1, 10)
		return err
	})
	if !errors.Is(err, fleet.ErrCompacted) {
		t.Errorf("changes from below the floor: %v, want ErrCompacted", err)
	}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		_, err := tx.Changes.Compact(ctx, 1) // does not lower the floor
		floor, latest, err2 := tx.Changes.Bounds(ctx)
		equal(t, "bounds", [2]uint64{floor, latest}, [2]uint64{revs[0], revs[1]})
		return errors.Join(err, err2)
	})
	// Everything deleted and compacted: revisions go on from where they were.
	last := appendChanges(t, s, fleet.KindIdentity, "a", "", "b", "")
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		_, err := tx.Changes.Compact(ctx, last[1]+1000) // bounded to the latest
		floor, latest, err2 := tx.Changes.Bounds(ctx)
		equal(t, "bounds of an emptied log", [2]uint64{floor, latest}, [2]uint64{last[1], last[1]})
		return errors.Join(err, err2)
	})
	equal(t, "nothing is live", live(t, s, fleet.Position{}, 10), []string(nil))
	if again := appendChanges(t, s, fleet.KindIdentity, "z", "9"); again[0] <= last[1] {
		t.Errorf("revision %d was given before", again[0])
	}
}

func testEvents(t *testing.T, s fleet.Store) {
	id := mustID("spiffe://example.org/service/orders")
	var want []fleet.StoredEvent
	for i := range 6 {
		e := event.Event{
			ID: fmt.Sprintf("e-%d", i), Time: at(i), Layer: event.Network, Kind: "decision", Machine: "m1", Workload: "w-1", Identity: id, PID: 42,
			Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Decision: policy.ID(fmt.Sprintf("d-%d", i%3)), Verdict: policy.Deny, Mode: policy.Observe,
			Message: "quoted \" and ünicode", Attrs: map[string]any{"n": float64(i)}, Detail: json.RawMessage(`{"a":1}`),
		}
		if i == 5 {
			e = event.Event{ID: "e-5", Time: at(5), Layer: event.Control, Kind: "machine.joined"}
		}
		want = append(want, fleet.StoredEvent{Machine: fmt.Sprintf("m%d", i%2), Seq: uint64(i), Event: e})
	}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		for i := range want {
			e, err := tx.Events.AppendEvent(ctx, want[i])
			if err != nil {
				return err
			}
			want[i].Position = e.Position
			if i > 0 && e.Position <= want[i-1].Position {
				t.Errorf("positions must rise")
			}
		}
		return nil
	})
	pick := func(ids ...int) (out []fleet.StoredEvent) {
		for _, i := range ids {
			out = append(out, want[i])
		}
		return out
	}
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		for _, c := range []struct {
			name string
			q    fleet.EventQuery
			want []fleet.StoredEvent
		}{
			{"all", fleet.EventQuery{Limit: 9}, want},
			{"page", fleet.EventQuery{Limit: 2, After: want[1].Position}, pick(2, 3)},
			{"newest", fleet.EventQuery{Limit: 2, Newest: true}, pick(5, 4)},
			{"newest, next page", fleet.EventQuery{Limit: 2, Newest: true, Before: want[4].Position}, pick(3, 2)},
			{"machine", fleet.EventQuery{Limit: 9, Machine: "m0"}, pick(0, 2, 4)},
			{"layer", fleet.EventQuery{Limit: 9, Layer: event.Control}, pick(5)},
			{"kind", fleet.EventQuery{Limit: 9, Kind: "machine.joined"}, pick(5)},
			{"workload", fleet.EventQuery{Limit: 2, Workload: "w-1"}, pick(0, 1)},
			{"identity", fleet.EventQuery{Limit: 9, Identity: id, Newest: true}, pick(4, 3, 2, 1, 0)},
			{"decision", fleet.EventQuery{Limit: 9, Decision: "d-1"}, pick(1, 4)},
			{"verdict", fleet.EventQuery{Limit: 9, Verdict: policy.Permit}, nil},
			{"since, until", fleet.EventQuery{Limit: 9, Since: at(1), Until: at(3)}, pick(1, 2)},
		} {
			got, err := tx.Events.Events(ctx, c.q)
			if err != nil {
				return err
			}
			equal(t, c.name, got, c.want)
		}
		return nil
	})
}

func testStreams(t *testing.T, s fleet.Store) {
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		got, err := tx.Events.Stream(ctx, "m1")
		equal(t, "stream of a machine that sent nothing", got, fleet.EventStream{Machine: "m1"})
		return err
	})
	want := fleet.EventStream{Machine: "m1", Stream: "s-2", Last: 1<<63 - 1}
	update(t, s, func(ctx context.Context, tx fleet.Tx) error {
		return errors.Join(tx.Events.PutStream(ctx, fleet.EventStream{Machine: "m1", Stream: "s-1", Last: 3}), tx.Events.PutStream(ctx, want))
	})
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		got, err := tx.Events.Stream(ctx, "m1")
		equal(t, "stream", got, want)
		return err
	})
}

func testTrim(t *testing.T, s fleet.Store) {
	var last uint64
	add := func() {
		update(t, s, func(ctx context.Context, tx fleet.Tx) error {
			e, err := tx.Events.AppendEvent(ctx, fleet.StoredEvent{Machine: "m1", Event: event.Event{ID: "e-1", Time: at(0), Layer: event.Control, Kind: "k"}})
			if e.Position <= last {
				t.Errorf("position %d was given before", e.Position)
			}
			last = e.Position
			return err
		})
	}
	for range 5 {
		add()
	}
	trim := func(keep, limit, want int) {
		t.Helper()
		update(t, s, func(ctx context.Context, tx fleet.Tx) error {
			n, err := tx.Events.Trim(ctx, keep, 0, limit)
			equal(t, fmt.Sprintf("Trim(%d, %d)", keep, limit), n, want)
			return err
		})
	}
	trim(9, 9, 0)
	trim(3, 1, 1)
	trim(3, 9, 1)
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		got, err := tx.Events.Events(ctx, fleet.EventQuery{Limit: 9})
		if len(got) != 3 || got[2].Position != last {
			t.Errorf("the newest must be left, got %v", got)
		}
		return err
	})
	trim(0, 9, 3)
	add()
}

func testTrimShares(t *testing.T, s fleet.Store) {
	add := func(machine string, n int, decision policy.ID) {
		update(t, s, func(ctx context.Context, tx fleet.Tx) error {
			for i := range n {
				_, err := tx.Events.AppendEvent(ctx, fleet.StoredEvent{Machine: machine, Event: event.Event{
					ID: "e", Time: at(i), Layer: event.Control, Kind: "k", Decision: decision, Message: fmt.Sprint(i),
				}})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	trim := func(keep, reserve, limit, want int) {
		t.Helper()
		update(t, s, func(ctx context.Context, tx fleet.Tx) error {
			n, err := tx.Events.Trim(ctx, keep, reserve, limit)
			equal(t, fmt.Sprintf("Trim(%d, %d, %d)", keep, reserve, limit), n, want)
			return err
		})
	}
	left := func() string {
		counts := map[string]int{}
		view(t, s, func(ctx context.Context, tx fleet.Tx) error {
			list, err := tx.Events.Events(ctx, fleet.EventQuery{Limit: 10_000})
			for _, e := range list {
				if e.Event.Decision != "" {
					counts[e.Machine+"/decision"]++
				} else {
					counts[e.Machine]++
				}
			}
			return err
		})
		return fmt.Sprint(counts)
	}
	add("quiet", 5, "")
	add(fleet.ServerMachine, 100, "")
	add("loud", 100, "d-1")
	add("loud", 600, "")
	trim(800, 100, 1000, 5)
	equal(t, "only the loud one loses, and not its decisions", left(), "map[loud:595 loud/decision:100 quiet:5 server:100]")
	trim(400, 100, 50, 50)
	trim(305, 100, 1000, 445)
	equal(t, "decisions and others alike", left(), "map[loud:100 loud/decision:100 quiet:5 server:100]")
	add("loud", 300, "d-2")
	trim(305, 100, 1000, 300)
	equal(t, "nor do decisions drive out the others", left(), "map[loud:100 loud/decision:100 quiet:5 server:100]")
	trim(105, 100, 1000, 200)
	equal(t, "the reserve", left(), "map[quiet:5 server:100]")
	trim(55, 50, 1000, 50)
	equal(t, "what is above the reserve", left(), "map[quiet:5 server:50]")
	view(t, s, func(ctx context.Context, tx fleet.Tx) error {
		list, err := tx.Events.Events(ctx, fleet.EventQuery{Limit: 1, Machine: fleet.ServerMachine})
		equal(t, "the oldest go", list[0].Event.Message, "50")
		return err
	})
	trim(0, 0, 1000, 55)
}
