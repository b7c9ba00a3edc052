package fleet

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// What follows from a withdrawal is done apart from it: the withdrawal is one small transaction that no number of
// workloads can make too slow, and holds from then on; the workloads that it is about are brought up to it afterwards, in
// pages. What is due is not stored: [Fleet.Open] finds it anew, from the withdrawals in force.

// catchUpFor is how long the one who withdrew or lifted waits for the workloads to follow; [Fleet.Run] does the rest.
const catchUpFor = 2 * time.Second

// everything is the subject of which every workload is: all are due.
var everything subject

// mark makes the workloads of a subject due, from the first. The caller holds f.mu.
func (f *Fleet) mark(of subject) {
	if len(f.due) >= 2*f.cfg.MaxWithdrawn { // one pass over all is less work, and needs less room
		machines := maps.Clone(f.due)
		maps.DeleteFunc(machines, func(s subject, _ string) bool { return s.machine == "" })
		if f.due = machines; of.machine == "" {
			of = everything
		}
	}
	f.due[of] = ""
	select {
	case f.hurry <- struct{}{}:
	default:
	}
}

// follow brings the workloads up to what was just committed, for a while, whatever becomes of the request that asked.
func (f *Fleet) follow(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), catchUpFor)
	defer cancel()
	if err := f.catchUp(ctx); err != nil {
		f.meter.Count("fleet_catch_up_delayed", 1)
		f.log.WarnContext(ctx, "not all workloads follow a withdrawal yet; it is gone on with", slog.Any("error", err))
	}
}

// keepUp brings workloads up to withdrawals until ctx ends.
func (f *Fleet) keepUp(ctx context.Context) {
	for {
		var wait <-chan struct{} = f.hurry
		if err := f.catchUp(ctx); err != nil && ctx.Err() == nil {
			f.meter.Count("fleet_catch_up_failed", 1)
			f.log.ErrorContext(ctx, "workloads could not follow a withdrawal; it is tried again", slog.Any("error", err))
			wait = after(ctx, retry)
		}
		select {
		case <-ctx.Done():
			return
		case <-wait:
		}
	}
}

// catchUp does all that is due, unless ctx ends before: what is left then stays due.
func (f *Fleet) catchUp(ctx context.Context) error {
	select {
	case f.catching <- struct{}{}:
		defer func() { <-f.catching }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		f.mu.Lock()
		var of subject
		var from string
		found := false
		for of, from = range f.due {
			found = true
			break
		}
		delete(f.due, of)
		f.mu.Unlock()
		if !found {
			return nil
		}
		for more := true; more; {
			next, err := f.catchUpPage(ctx, of, from)
			if err != nil {
				f.mu.Lock()
				if _, again := f.due[of]; !again {
					f.due[of] = from
				}
				f.mu.Unlock()
				return err
			}
			from, more = next, next != ""
		}
	}
}

// catchUpPage does one page of a subject, and returns where the next one begins; "" is the end.
func (f *Fleet) catchUpPage(ctx context.Context, of subject, from string) (next string, err error) {
	err = f.update(ctx, func(u *unit) error {
		next = ""
		if of.instance != "" {
			w, err := u.Workloads.Workload(ctx, of.instance)
			if errors.Is(err, ErrNotFound) || err == nil && w.State != WorkloadPresent {
				return nil
			}
			if err != nil {
				return err
			}
			return f.reevaluate(ctx, u, w)
		}
		if of.machine != "" && !f.expelled(of.machine) {
			return nil // it was let in again
		}
		q := WorkloadQuery{After: from, Machine: of.machine, State: WorkloadPresent, Limit: reissuePage}
		if !of.identity.IsZero() {
			q.ID = of.identity.String()
		}
		page, err := u.Workloads.Workloads(ctx, q)
		if err != nil {
			return err
		}
		for _, w := range page {
			if of.machine != "" {
				err = f.end(ctx, u, w)
			} else {
				err = f.reevaluate(ctx, u, w)
			}
			if err != nil {
				return err
			}
		}
		if len(page) == q.Limit {
			next = page[len(page)-1].Instance
		}
		return nil
	})
	return next, err
}

// expelled reports whether a machine is revoked, for good or for now.
func (f *Fleet) expelled(machine string) bool {
	now := f.now()
	f.mu.Lock()
	defer f.mu.Unlock()
	_, revoked := f.revoked.find(subject{machine: machine}, now)
	return revoked || f.members[machine].state == MachineRevoked
}

// readmit gives machines back the state joined of which no revocation is in force but for those that are being ended.
func (f *Fleet) readmit(ctx context.Context, u *unit, machine string, ended []string) error {
	now := f.now()
	f.mu.Lock()
	held := slices.ContainsFunc(f.revoked.of[subject{machine: machine}], func(id string) bool {
		at := f.revoked.byID[id].Expires
		return !slices.Contains(ended, id) && (at.IsZero() || now.Before(at))
	})
	f.mu.Unlock()
	if held {
		return nil
	}
	m, err := u.Machines.Machine(ctx, machine)
	if errors.Is(err, ErrNotFound) || err == nil && m.State != MachineRevoked {
		return nil
	}
	if err != nil {
		return err
	}
	m.State = MachineJoined
	u.then = append(u.then, func() { f.members[m.ID] = memberOf(m) })
	return u.Machines.PutMachine(ctx, m)
}

// forget drops the quarantines of instances that are no more.
func (f *Fleet) forget(ctx context.Context, u *unit, instances []string) error {
	var ids []string
	f.mu.Lock()
	for _, instance := range instances {
		ids = append(ids, f.isolate.of[subject{instance: instance}]...)
	}
	f.mu.Unlock()
	for _, id := range ids {
		if err := u.Quarantines.DeleteQuarantine(ctx, id); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		u.then = append(u.then, func() { f.isolate.remove(id) })
	}
	f.meter.Count("fleet_pruned", int64(len(ids)), "kind", "quarantine")
	return nil
}
