package set

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/event"
)

// The pace of [Registry.Run].
const (
	// longestSleep bounds a wait, so that a clock that was set is noticed: timers do not follow the wall clock, deadlines do.
	longestSleep = 30 * time.Second
	// firstRetry and lastRetry are the waits after a failure of the store, doubling.
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// actor is who returns editions and ends overrides, in audit records.
const actor = `Service::"redoubt"`

// Run puts the former edition back when a pending one is not confirmed in time, and removes overrides that ran out. Both
// deadlines are in the store: what is overdue when Run begins, after a restart, is done at once. It returns when ctx
// ends, with nil; a failing store is logged, counted and tried again.
func (r *Registry) Run(ctx context.Context) error {
	retry := firstRetry
	for {
		changed := r.Changed()
		sleep := longestSleep
		if err := r.settle(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			r.meter.Count("policyset_settle_failed", 1)
			r.log.Error("policy set deadline not kept, trying again", "error", err, "in", retry)
			sleep, changed = retry, nil
			retry = min(2*retry, lastRetry)
		} else {
			retry = firstRetry
			if next := r.deadline(); !next.IsZero() {
				sleep = min(sleep, max(time.Until(next), 0))
			}
		}
		timer := time.NewTimer(sleep)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// deadline returns when something is next to be done, or the zero time.
func (r *Registry) deadline() time.Time {
	s := r.now()
	var next time.Time
	if s.edition.State == EditionPending {
		next = s.edition.ConfirmBy
	}
	if len(s.overrides) > 0 {
		if o := slices.MinFunc(s.overrides, byExpiry); next.IsZero() || o.Expires.Before(next) {
			next = o.Expires
		}
	}
	return next
}

// settle does what is due.
func (r *Registry) settle(ctx context.Context) error {
	editionErr := r.returnOverdue(ctx)
	now := time.Now()
	for _, o := range r.now().overrides {
		if now.Before(o.Expires) {
			continue
		}
		rec := event.NewRecord(actor, "policy-set.override-expired", "policy-set")
		if err := r.endOverride(ctx, o.ID, rec); err != nil && !errors.Is(err, ErrUnknownOverride) {
			return fmt.Errorf("end override %s: %w", o.ID, err)
		}
		r.meter.Count("policyset_overrides_expired", 1)
		r.log.Info("override ended", "override", o.ID)
	}
	return editionErr
}

// returnOverdue puts the edition before a pending one back if the time to confirm has run out.
func (r *Registry) returnOverdue(ctx context.Context) error {
	r.writing.Lock()
	defer r.writing.Unlock()
	e := r.now().edition
	if e.State != EditionPending || time.Now().Before(e.ConfirmBy) {
		return nil
	}
	// Nothing is applied while an edition is pending, so the one before it was confirmed.
	former, err := r.Edition(ctx, e.Version-1)
	if err != nil {
		return fmt.Errorf("return to edition %d: %w", e.Version-1, err)
	}
	s, err := load(former)
	if err != nil {
		return fmt.Errorf("return to edition %d: %w", e.Version-1, err)
	}
	next := Edition{
		Version: e.Version + 1, Digest: s.Digest(), Files: s.Files(), Author: actor, Created: wallClock(), State: EditionActive,
		Cause: CauseReturn, Restores: former.Version, Note: fmt.Sprintf("edition %d was not confirmed in time", e.Version),
	}
	if err := r.activate(ctx, s, next, e.Version, event.NewRecord(actor, "policy-set.return", "policy-set")); err != nil {
		return err
	}
	r.meter.Count("policyset_returned", 1)
	r.log.Warn("policy set returned: not confirmed in time", "unconfirmed", e.Version, "restored", former.Version)
	return nil
}
