// Package fleettest has what tests of the fleet and of its stores share: a store in memory, and the conformance suite that
// every store must pass.
//
// Trust: for tests only.
package fleettest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// Memory is a [fleet.Store] in memory. Zero value: empty, ready. Concurrency: safe.
type Memory struct {
	mu   sync.RWMutex
	data data // guarded by mu

	// FailCommit, if set, is asked at the end of every update; what it returns undoes the update, as a full disk would.
	FailCommit func() error
}

// data is the whole state; its maps are never changed in place, so that a copy of the struct is a snapshot.
type data struct {
	tokens      table[fleet.JoinToken]
	machines    table[fleet.Machine]
	workloads   table[fleet.Workload]
	revocations table[fleet.Revocation]
	quarantines table[fleet.Quarantine]
	streams     table[fleet.EventStream]
	changes     []fleet.Change
	floor       uint64
	latest      uint64
	events      []fleet.StoredEvent
	position    uint64
	records     []event.Record
}

// table is rows by id. owned is set once this transaction has its own copy.
type table[T any] struct {
	rows  map[string]T
	owned bool
}

func (t *table[T]) put(id string, row T) {
	if !t.owned {
		t.rows, t.owned = maps.Clone(t.rows), true
		if t.rows == nil {
			t.rows = map[string]T{}
		}
	}
	t.rows[id] = row
}

func (t *table[T]) remove(id string) bool {
	if _, ok := t.rows[id]; !ok {
		return false
	}
	if !t.owned {
		t.rows, t.owned = maps.Clone(t.rows), true
	}
	delete(t.rows, id)
	return true
}

func (t *table[T]) get(id string) (T, error) {
	row, ok := t.rows[id]
	if !ok {
		return row, fleet.ErrNotFound
	}
	return row, nil
}

func (t *table[T]) list(after string, limit int, keep func(T) bool) []T {
	var out []T
	for _, id := range slices.Sorted(maps.Keys(t.rows)) {
		if row := t.rows[id]; id > after && len(out) < limit && (keep == nil || keep(row)) {
			out = append(out, row)
		}
	}
	return out
}

// Records returns the audit records put so far.
func (m *Memory) Records() []event.Record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.data.records)
}

// View implements [fleet.Store].
func (m *Memory) View(ctx context.Context, fn func(fleet.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.RLock()
	t := &transaction{data: m.data, readOnly: true}
	m.mu.RUnlock()
	return fn(t.parts())
}

// Update implements [fleet.Store].
func (m *Memory) Update(ctx context.Context, fn func(fleet.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t := &transaction{data: m.data}
	// Appending must not write into the arrays of a snapshot.
	t.changes, t.events, t.records = slices.Clip(t.changes), slices.Clip(t.events), slices.Clip(t.records)
	if err := fn(t.parts()); err != nil {
		return err
	}
	if m.FailCommit != nil {
		if err := m.FailCommit(); err != nil {
			return err
		}
	}
	for _, owned := range []*bool{
		&t.tokens.owned, &t.machines.owned, &t.workloads.owned, &t.revocations.owned, &t.quarantines.owned, &t.streams.owned,
	} {
		*owned = false
	}
	m.data = t.data
	return nil
}

// transaction implements every part of [fleet.Tx].
type transaction struct {
	data
	readOnly bool
}

var errReadOnly = errors.New("fleettest: a view cannot write")

func (t *transaction) parts() fleet.Tx {
	return fleet.Tx{Tokens: t, Machines: t, Workloads: t, Revocations: t, Quarantines: t, Changes: t, Events: t, Audit: t}
}

func (t *transaction) write(fn func()) error {
	if t.readOnly {
		return errReadOnly
	}
	fn()
	return nil
}

func (t *transaction) PutToken(_ context.Context, x fleet.JoinToken) error {
	return t.write(func() { t.tokens.put(x.ID, x) })
}

func (t *transaction) Token(_ context.Context, id string) (fleet.JoinToken, error) {
	return t.tokens.get(id)
}

func (t *transaction) Tokens(_ context.Context, after string, limit int) ([]fleet.JoinToken, error) {
	return t.tokens.list(after, limit, nil), nil
}

func (t *transaction) CountOutstanding(_ context.Context, now time.Time) (int, error) {
	n := 0
	for _, x := range t.tokens.rows {
		if x.Used.IsZero() && x.Expires.After(now) {
			n++
		}
	}
	return n, nil
}

func (t *transaction) DeleteTokens(_ context.Context, before time.Time, limit int) (int, error) {
	n := 0
	err := t.write(func() {
		for _, x := range t.tokens.list("", len(t.tokens.rows), func(x fleet.JoinToken) bool {
			return !x.Used.IsZero() && x.Used.Before(before) || x.Expires.Before(before)
		}) {
			if n < limit && t.tokens.remove(x.ID) {
				n++
			}
		}
	})
	return n, err
}

func (t *transaction) PutMachine(_ context.Context, x fleet.Machine) error {
	x.Lost = false
	return t.write(func() { t.machines.put(x.ID, x) })
}

func (t *transaction) Machine(_ context.Context, id string) (fleet.Machine, error) {
	return t.machines.get(id)
}

func (t *transaction) Machines(_ context.Context, after string, limit int) ([]fleet.Machine, error) {
	return t.machines.list(after, limit, nil), nil
}

func (t *transaction) CountMachines(context.Context) (int, error) { return len(t.machines.rows), nil }

func (t *transaction) PutWorkload(_ context.Context, x fleet.Workload) error {
	return t.write(func() { t.workloads.put(x.Instance, x) })
}

func (t *transaction) Workload(_ context.Context, instance string) (fleet.Workload, error) {
	return t.workloads.get(instance)
}

func (t *transaction) Workloads(_ context.Context, q fleet.WorkloadQuery) ([]fleet.Workload, error) {
	return t.workloads.list(q.After, q.Limit, func(w fleet.Workload) bool {
		return (q.Machine == "" || w.Machine == q.Machine) && (q.Service == "" || w.Service == q.Service) &&
			(q.ID == "" || w.ID.String() == q.ID) && (q.State == "" || w.State == q.State)
	}), nil
}

func (t *transaction) CountWorkloads(_ context.Context, machine string) (int, error) {
	n := 0
	for _, w := range t.workloads.rows {
		if machine == "" || w.Machine == machine {
			n++
		}
	}
	return n, nil
}

func (t *transaction) WorkloadBytes(_ context.Context, machine string) (int, error) {
	n := 0
	for _, w := range t.workloads.rows {
		if w.Machine == machine {
			raw, err := json.Marshal(w)
			if err != nil {
				return 0, err
			}
			n += len(raw)
		}
	}
	return n, nil
}

func (t *transaction) DeleteGone(_ context.Context, machine string, before time.Time, limit int) ([]string, error) {
	var out []string
	err := t.write(func() {
		gone := t.workloads.list("", len(t.workloads.rows), func(w fleet.Workload) bool {
			return (machine == "" || w.Machine == machine) && w.State == fleet.WorkloadGone && w.Seen.Before(before)
		})
		slices.SortStableFunc(gone, func(a, b fleet.Workload) int { return a.Seen.Compare(b.Seen) })
		for _, w := range gone {
			if len(out) < limit && t.workloads.remove(w.Instance) {
				out = append(out, w.Instance)
			}
		}
	})
	return out, err
}

func (t *transaction) PutRevocation(_ context.Context, x fleet.Revocation) error {
	return t.write(func() { t.revocations.put(x.ID, x) })
}

func (t *transaction) Revocations(_ context.Context, after string, limit int) ([]fleet.Revocation, error) {
	return t.revocations.list(after, limit, nil), nil
}

func (t *transaction) DeleteRevocation(_ context.Context, id string) error {
	found := false
	if err := t.write(func() { found = t.revocations.remove(id) }); err != nil || found {
		return err
	}
	return fleet.ErrNotFound
}

func (t *transaction) CountRevocations(context.Context) (int, error) {
	return len(t.revocations.rows), nil
}

func (t *transaction) PutQuarantine(_ context.Context, x fleet.Quarantine) error {
	return t.write(func() { t.quarantines.put(x.ID, x) })
}

func (t *transaction) Quarantines(_ context.Context, after string, limit int) ([]fleet.Quarantine, error) {
	return t.quarantines.list(after, limit, nil), nil
}

func (t *transaction) DeleteQuarantine(_ context.Context, id string) error {
	found := false
	if err := t.write(func() { found = t.quarantines.remove(id) }); err != nil || found {
		return err
	}
	return fleet.ErrNotFound
}

func (t *transaction) CountQuarantines(context.Context) (int, error) {
	return len(t.quarantines.rows), nil
}

func (t *transaction) Append(_ context.Context, c fleet.Change) (fleet.Change, error) {
	err := t.write(func() {
		t.latest++
		c.Revision = t.latest
		t.changes = append(t.changes, c)
	})
	return c, err
}

func (t *transaction) Bounds(context.Context) (uint64, uint64, error) { return t.floor, t.latest, nil }

func (t *transaction) Changes(_ context.Context, after uint64, limit int) ([]fleet.Change, error) {
	if after < t.floor {
		return nil, fleet.ErrCompacted
	}
	at, _ := slices.BinarySearchFunc(t.changes, after+1, func(c fleet.Change, r uint64) int { return cmp.Compare(c.Revision, r) })
	return slices.Clone(t.changes[at:min(len(t.changes), at+limit)]), nil
}

func (t *transaction) last() map[fleet.Position]fleet.Change {
	last := map[fleet.Position]fleet.Change{}
	for _, c := range t.changes {
		last[fleet.Position{Kind: c.Kind, Key: c.Key}] = c
	}
	return last
}

func comparePositions(a, b fleet.Position) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Key, b.Key))
}

func (t *transaction) Live(_ context.Context, after fleet.Position, limit int) ([]fleet.Change, error) {
	last := t.last()
	var out []fleet.Change
	for _, p := range slices.SortedFunc(maps.Keys(last), comparePositions) {
		if c := last[p]; len(out) < limit && !c.Deleted && comparePositions(p, after) > 0 {
			out = append(out, c)
		}
	}
	return out, nil
}

func (t *transaction) Compact(_ context.Context, floor uint64) (int, error) {
	n := 0
	err := t.write(func() {
		t.floor = max(t.floor, min(floor, t.latest))
		last := t.last()
		kept := make([]fleet.Change, 0, len(t.changes))
		for _, c := range t.changes {
			superseded := last[fleet.Position{Kind: c.Kind, Key: c.Key}].Revision != c.Revision
			if c.Revision <= t.floor && (superseded || c.Deleted) {
				n++
				continue
			}
			kept = append(kept, c)
		}
		t.changes = kept
	})
	return n, err
}

func (t *transaction) AppendEvent(_ context.Context, e fleet.StoredEvent) (fleet.StoredEvent, error) {
	err := t.write(func() {
		t.position++
		e.Position = t.position
		t.events = append(t.events, e)
	})
	return e, err
}

func (t *transaction) Events(_ context.Context, q fleet.EventQuery) ([]fleet.StoredEvent, error) {
	var out []fleet.StoredEvent
	take := func(s fleet.StoredEvent) {
		e := s.Event
		if len(out) < q.Limit && (q.Machine == "" || s.Machine == q.Machine) && (q.Layer == "" || e.Layer == q.Layer) &&
			(q.Kind == "" || e.Kind == q.Kind) && (q.Workload == "" || e.Workload == q.Workload) &&
			(q.Identity.IsZero() || e.Identity == q.Identity) && (q.Decision == "" || e.Decision == q.Decision) &&
			(q.Verdict == "" || e.Verdict == q.Verdict) && (q.Since.IsZero() || !e.Time.Before(q.Since)) &&
			(q.Until.IsZero() || e.Time.Before(q.Until)) {
			out = append(out, s)
		}
	}
	if q.Newest {
		for _, s := range slices.Backward(t.events) {
			if q.Before == 0 || s.Position < q.Before {
				take(s)
			}
		}
		return out, nil
	}
	for _, s := range t.events {
		if s.Position > q.After {
			take(s)
		}
	}
	return out, nil
}

func (t *transaction) Stream(_ context.Context, machine string) (fleet.EventStream, error) {
	s, err := t.streams.get(machine)
	if err != nil {
		return fleet.EventStream{Machine: machine}, nil
	}
	return s, nil
}

func (t *transaction) PutStream(_ context.Context, s fleet.EventStream) error {
	return t.write(func() { t.streams.put(s.Machine, s) })
}

func (t *transaction) Trim(_ context.Context, keep, reserve, limit int) (int, error) {
	deleted := 0
	err := t.write(func() {
		for {
			excess := min(len(t.events)-keep, limit-deleted)
			if excess <= 0 {
				return
			}
			first, second := t.heaviest(reserve)
			decisions, n := first.Cut(reserve, second, excess)
			deleted += n
			t.events = slices.DeleteFunc(slices.Clone(t.events), func(e fleet.StoredEvent) bool {
				if n > 0 && e.Machine == first.Machine && (e.Event.Decision != "") == decisions {
					n--
					return true
				}
				return false
			})
		}
	})
	return deleted, err
}

// heaviest returns the heaviest share, and the weight of the next.
func (t *transaction) heaviest(reserve int) (fleet.Share, int) {
	shares := map[string]fleet.Share{}
	for _, e := range t.events {
		s := shares[e.Machine]
		s.Machine = e.Machine
		if e.Event.Decision != "" {
			s.Decisions++
		} else {
			s.Others++
		}
		shares[e.Machine] = s
	}
	list := slices.SortedFunc(maps.Values(shares), func(a, b fleet.Share) int {
		return cmp.Or(cmp.Compare(b.Weight(reserve), a.Weight(reserve)), cmp.Compare(a.Machine, b.Machine))
	})
	if len(list) == 1 {
		return list[0], 0
	}
	return list[0], list[1].Weight(reserve)
}

func (t *transaction) PutRecord(_ context.Context, r event.Record) error {
	return t.write(func() { t.records = append(t.records, r) })
}
