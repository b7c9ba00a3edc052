package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/identity"
)

const (
	drainFor   = 2 * time.Second
	sweepLimit = 1_000 // rows of one kind deleted in one sweep
)

// Run follows the authority and the policy set (publishing what is new, re-evaluating every workload when the issuance
// rules may have changed, and those that a withdrawal is about), stores emitted events, and keeps retention, until ctx ends. It returns nil then.
func (f *Fleet) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { f.drain(ctx) })
	wg.Go(func() { f.followAuthority(ctx) })
	wg.Go(func() { f.followRules(ctx) })
	wg.Go(func() { f.keepUp(ctx) })
	wg.Go(func() { f.keepHouse(ctx) })
	wg.Wait()
	return nil
}

// retry is how soon a publication that failed is tried again.
const retry = time.Second

func (f *Fleet) followAuthority(ctx context.Context) {
	for {
		changed := f.cfg.Authority.Changed()
		wait := changed
		if err := f.publishBundle(ctx); err != nil && ctx.Err() == nil {
			f.log.ErrorContext(ctx, "the bundle could not be published", slog.Any("error", err))
			wait = after(ctx, retry)
		}
		select {
		case <-ctx.Done():
			return
		case <-wait:
		}
	}
}

func (f *Fleet) followRules(ctx context.Context) {
	for {
		changed := f.cfg.Rules.Changed()
		wait := changed
		if err := errors.Join(f.publishPolicySet(ctx), f.reissue(ctx, changed)); err != nil && ctx.Err() == nil {
			f.log.ErrorContext(ctx, "the policy set could not be published", slog.Any("error", err))
			wait = after(ctx, retry)
		}
		select {
		case <-ctx.Done():
			return
		case <-wait:
		}
	}
}

// after returns a channel that is closed in a while, or with ctx.
func after(ctx context.Context, d time.Duration) <-chan struct{} {
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, cancel)
	return ctx.Done()
}

func (f *Fleet) publishBundle(ctx context.Context) error {
	return f.publish(ctx, KindBundle, f.cfg.TrustDomain.String(), f.cfg.Authority.Bundle())
}

func (f *Fleet) publishPolicySet(ctx context.Context) error {
	return f.publish(ctx, KindPolicySet, KeyCurrent, f.cfg.Rules.PolicySet())
}

// publish pushes what there is one of, if it differs from what was pushed last.
func (f *Fleet) publish(ctx context.Context, kind ChangeKind, key string, payload any) error {
	raw, err := encode(payload)
	if err != nil {
		return err
	}
	if len(raw) > MaxPayloadBytes {
		f.problem(kind, fmt.Sprintf("the %s has %d bytes as it is sent, more than %d: agents were not sent it, and keep what they have", kind, len(raw), MaxPayloadBytes))
		f.meter.Count("fleet_publish_refused", 1, "kind", string(kind))
		f.log.ErrorContext(ctx, "too large to be sent to agents: they keep what they have", slog.String("kind", string(kind)),
			slog.Int("bytes", len(raw)), slog.Int("limit", MaxPayloadBytes))
		return nil
	}
	f.problem(kind, "")
	sum := hashOf(raw)
	f.mu.Lock()
	same := f.current[kind] == sum
	f.mu.Unlock()
	if same {
		return nil
	}
	return f.update(ctx, func(u *unit) error {
		u.then = append(u.then, func() { f.current[kind] = sum })
		return u.push(ctx, kind, key, json.RawMessage(raw))
	})
}

// problem notes why a kind is not pushed; "" is that it is. What is new is told as an event.
func (f *Fleet) problem(kind ChangeKind, text string) {
	f.mu.Lock()
	was := f.problems[kind]
	f.problems[kind] = text
	f.mu.Unlock()
	if text != "" && text != was {
		f.note(string(kind)+".not_pushed", "", text, nil)
	}
}

// PublishProblem says why agents are not sent the policy set (or bundle) that is in force; "" if they are.
func (f *Fleet) PublishProblem() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.problems[KindPolicySet], f.problems[KindBundle])
}

// reissue re-evaluates every workload present, in pages, so that others get a turn.
func (f *Fleet) reissue(ctx context.Context, changed <-chan struct{}) error {
	q := WorkloadQuery{State: WorkloadPresent, Limit: reissuePage}
	for {
		select {
		case <-changed:
			return nil // another set is in force already: it is published first, and then all begin anew
		default:
		}
		var page []Workload
		err := f.update(ctx, func(u *unit) (err error) {
			if page, err = u.Workloads.Workloads(ctx, q); err != nil {
				return err
			}
			for _, w := range page {
				if err := f.reevaluate(ctx, u, w); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil || len(page) < reissuePage {
			return err
		}
		q.After = page[len(page)-1].Instance
	}
}

// reevaluate gives a stored workload the identity and facts that hold now.
func (f *Fleet) reevaluate(ctx context.Context, u *unit, old Workload) error {
	facts := old.Facts.Without(identity.FactQuarantined)
	return f.settle(ctx, u, old, f.evaluate(old, old, facts))
}

// keepHouse stores when machines were heard of, tells of those lost and back, and deletes what is past its time.
func (f *Fleet) keepHouse(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		if err := f.Sweep(ctx); err != nil && ctx.Err() == nil {
			f.meter.Count("fleet_sweep_failed", 1)
			f.log.ErrorContext(ctx, "retention failed", slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// Sweep does once what [Fleet.Run] does every now and then for retention.
func (f *Fleet) Sweep(ctx context.Context) error {
	now := f.now()
	return errors.Join(f.touch(ctx, now), f.expire(ctx, now), f.prune(ctx, now))
}

// touch stores when machines were last heard of, and tells of those lost or back.
func (f *Fleet) touch(ctx context.Context, now time.Time) error {
	type word struct{ kind, machine, message string }
	var words []word
	seen := map[string]time.Time{}
	f.mu.Lock()
	for id, m := range f.members {
		lost := m.state == MachineJoined && now.Sub(m.seen) > f.cfg.LostAfter
		switch {
		case lost && !m.lost:
			words = append(words, word{"machine.lost", id, "nothing was heard of machine " + id + " since " + stamp(m.seen)})
		case !lost && m.lost && m.state == MachineJoined:
			words = append(words, word{"machine.back", id, "machine " + id + " is back"})
		}
		if m.dirty {
			seen[id] = m.seen
		}
		m.lost, m.dirty = lost, false
		f.members[id] = m
	}
	f.mu.Unlock()
	for _, w := range words {
		f.meter.Count("fleet_machines_noticed", 1, "kind", w.kind)
		f.note(w.kind, w.machine, w.message, nil)
	}
	if len(seen) == 0 {
		return nil
	}
	err := f.update(ctx, func(u *unit) error {
		for id, at := range seen {
			m, err := u.Machines.Machine(ctx, id)
			if errors.Is(err, ErrNotFound) || err == nil && !at.After(m.LastSeen) {
				continue
			}
			if err != nil {
				return err
			}
			m.LastSeen = at
			if err := u.Machines.PutMachine(ctx, m); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil { // another time, then
		f.mu.Lock()
		defer f.mu.Unlock()
		for id := range seen {
			if m, ok := f.members[id]; ok {
				m.dirty = true
				f.members[id] = m
			}
		}
	}
	return err
}

// expire ends revocations and quarantines that are past their end.
func (f *Fleet) expire(ctx context.Context, now time.Time) error {
	over := func(at time.Time) bool { return !at.IsZero() && !now.Before(at) }
	var revocations, quarantines []string
	freed := map[string]bool{} // machines that may have no revocation left
	f.mu.Lock()
	for id, r := range f.revoked.byID {
		if over(r.Expires) {
			revocations = append(revocations, id)
			if r.Machine != "" {
				freed[r.Machine] = true
			}
		}
	}
	for id, m := range f.members {
		if m.state == MachineRevoked && len(f.revoked.of[subject{machine: id}]) == 0 {
			freed[id] = true
		}
	}
	for id, q := range f.isolate.byID {
		if over(q.Expires) {
			quarantines = append(quarantines, id)
		}
	}
	f.mu.Unlock()
	if len(revocations)+len(quarantines)+len(freed) == 0 {
		return nil
	}
	err := f.update(ctx, func(u *unit) error {
		for machine := range freed {
			if err := f.readmit(ctx, u, machine, revocations); err != nil {
				return err
			}
		}
		for _, id := range revocations {
			if err := u.Revocations.DeleteRevocation(ctx, id); err != nil && !errors.Is(err, ErrNotFound) {
				return err
			}
			if err := u.push(ctx, KindRevocation, id, nil); err != nil {
				return err
			}
			u.then = append(u.then, func() { f.revoked.remove(id) })
		}
		for _, id := range quarantines {
			if err := f.unisolate(ctx, u, id); err != nil && !errors.Is(err, ErrUnknown) { // just released
				return err
			}
		}
		return nil
	})
	if err == nil && len(quarantines) > 0 {
		f.follow(ctx)
	}
	return err
}

// prune deletes workloads long gone, tokens long used, changes long superseded, and events beyond those kept.
func (f *Fleet) prune(ctx context.Context, now time.Time) error {
	var tokens, changes int
	var workloads []string
	err := f.update(ctx, func(u *unit) (err error) {
		if workloads, err = u.Workloads.DeleteGone(ctx, "", now.Add(-f.cfg.KeepGone), sweepLimit); err != nil {
			return err
		}
		if err := f.forget(ctx, u, workloads); err != nil {
			return err
		}
		if tokens, err = u.Tokens.DeleteTokens(ctx, now.Add(-f.cfg.KeepTokens), sweepLimit); err != nil {
			return err
		}
		if _, err = f.trim(ctx, u.Events, 10*sweepLimit); err != nil {
			return err
		}
		floor, latest, err := u.Changes.Bounds(ctx)
		if err != nil {
			return err
		}
		if keep := uint64(f.cfg.KeepChanges); latest > keep && latest-keep > floor {
			changes, err = u.Changes.Compact(ctx, latest-keep)
		}
		return err
	})
	if err != nil {
		return err
	}
	f.meter.Count("fleet_pruned", int64(len(workloads)), "kind", "workload")
	f.meter.Count("fleet_pruned", int64(tokens), "kind", "token")
	f.meter.Count("fleet_pruned", int64(changes), "kind", "change")
	f.forgetBuckets(now)
	return nil
}
