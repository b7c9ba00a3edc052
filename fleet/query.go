package fleet

import (
	"context"
	"errors"
	"maps"
	"slices"
)

// Machines lists machines in order of id, after the id given; limit is bounded to [MaxPage].
func (f *Fleet) Machines(ctx context.Context, after string, limit int) ([]Machine, error) {
	var out []Machine
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Machines.Machines(ctx, after, page(limit))
		return err
	})
	for i := range out {
		out[i] = f.lately(out[i])
	}
	return out, err
}

// Machine returns one machine. Errors: [ErrUnknown].
func (f *Fleet) Machine(ctx context.Context, id string) (Machine, error) {
	var m Machine
	err := f.view(ctx, func(tx Tx) (err error) {
		m, err = tx.Machines.Machine(ctx, id)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return Machine{}, unknown("machine", "list machines with redoubt get machines")
	}
	return f.lately(m), err
}

// lately fills in what is known of a machine but not stored yet.
func (f *Fleet) lately(m Machine) Machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.members[m.ID]; ok && c.seen.After(m.LastSeen) {
		m.LastSeen = c.seen
	}
	m.Lost = m.State == MachineJoined && f.now().Sub(m.LastSeen) > f.cfg.LostAfter
	return m
}

// Workloads answers a query, in order of instance; at most [MaxPage] at once.
func (f *Fleet) Workloads(ctx context.Context, q WorkloadQuery) ([]Workload, error) {
	q.Limit = page(q.Limit)
	var out []Workload
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Workloads.Workloads(ctx, q)
		return err
	})
	return out, err
}

// Workload returns one workload. Errors: [ErrUnknown].
func (f *Fleet) Workload(ctx context.Context, instance string) (Workload, error) {
	var w Workload
	err := f.view(ctx, func(tx Tx) (err error) {
		w, err = tx.Workloads.Workload(ctx, instance)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return Workload{}, unknown("workload", "list workloads with redoubt get workloads")
	}
	return w, err
}

// Endpoints lists where the workloads present listen, in order of instance and port; q is as for [Fleet.Workloads], and
// its limit counts workloads. The instance returned is where the next page begins; "" is the end.
func (f *Fleet) Endpoints(ctx context.Context, q WorkloadQuery) ([]Endpoint, string, error) {
	q.State, q.Limit = WorkloadPresent, page(q.Limit)
	workloads, err := f.Workloads(ctx, q)
	if err != nil {
		return nil, "", err
	}
	var out []Endpoint
	for _, w := range workloads {
		of := slices.Collect(maps.Values(endpointsOf(w)))
		slices.SortFunc(of, func(a, b Endpoint) int { return int(a.Port) - int(b.Port) })
		out = append(out, of...)
	}
	if len(workloads) < q.Limit {
		return out, "", nil
	}
	return out, workloads[len(workloads)-1].Instance, nil
}
