package ca

import (
	"context"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
)

// KeyStatus is a key as people and programs may see it.
type KeyStatus struct {
	ID        string    `json:"id"`
	Use       Use       `json:"use"`
	State     State     `json:"state"`
	Created   time.Time `json:"created"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

// Planned is the step that [Authority.Run] takes next, and when.
type Planned struct {
	Step Step      `json:"step"`
	At   time.Time `json:"at"`
	Why  string    `json:"why"`
}

// Status is where the keys are in their lives.
//
// Shape: JSON. Keys has every key that is not retired, and the last few that are, oldest first.
type Status struct {
	TrustDomain identity.TrustDomain `json:"trust_domain"`
	Time        time.Time            `json:"time"`
	Sequence    uint64               `json:"bundle_sequence"`
	Keys        []KeyStatus          `json:"keys"`
	Next        Planned              `json:"next"`
	// Problems are sentences for an operator: what does not work now, or soon will not.
	Problems []string `json:"problems,omitempty"`
}

// maxRetiredShown bounds the history in a Status.
const maxRetiredShown = 8

// Status returns where the keys are now.
func (a *Authority) Status() Status {
	r, now := a.current.Load(), a.now().UTC()
	st := Status{TrustDomain: a.cfg.TrustDomain, Time: now, Sequence: r.bundle.Sequence, Next: a.plan(r, now), Problems: a.problems(r, now)}
	retired := 0
	for _, rec := range r.records {
		if rec.State == Retired {
			retired++
		}
	}
	for _, rec := range r.records {
		if rec.State == Retired {
			if retired--; retired >= maxRetiredShown {
				continue
			}
		}
		st.Keys = append(st.Keys, KeyStatus{rec.ID, rec.Use, rec.State, rec.Created, rec.NotBefore, rec.NotAfter})
	}
	return st
}

// problems says what signing would be refused for now, and warns of the end of the root.
func (a *Authority) problems(r *ring, now time.Time) []string {
	var out []string
	for _, s := range []struct {
		use Use
		ttl time.Duration
	}{{X509, a.cfg.SVIDTTL}, {JWT, a.cfg.JWTTTL}} {
		k := r.active(s.use)
		if _, err := within(k.span(), now, s.ttl, leastSVID(s.ttl), "signing", k.String()); err != nil {
			out = append(out, err.Error())
		}
	}
	if _, err := within(r.root.span(), now, 2*a.cfg.IssuingTTL, 2*a.cfg.IssuingTTL, "rotation", "the root"); err != nil {
		out = append(out, err.Error())
	}
	return out
}

// plan says which step is next, and when it is due.
//
// A rotation begins at half of the life of an active key. One that was begun by hand is left to that hand until then.
func (a *Authority) plan(r *ring, now time.Time) Planned {
	issuing, jwt := r.active(X509), r.active(JWT)
	if spent(issuing, max(a.cfg.SVIDTTL, a.cfg.AgentTTL), now) || spent(jwt, a.cfg.JWTTTL, now) {
		return Planned{StepReplace, now, "an active key can no longer sign"}
	}
	half := earlier(halfLife(issuing), halfLife(jwt))
	p := Planned{StepPrepare, half, "the active keys have reached half of their lives"}
	if next := r.next(X509); next != nil && a.canActivate(next, later(now, half)) {
		switch next.State {
		case Prepared:
			p = Planned{StepPublish, half, "the next keys are prepared"}
		default:
			p = Planned{StepActivate, later(half, r.next(JWT).NotBefore), "relying parties have the next JWT key"}
		}
	}
	if at := r.retireAt(); !at.IsZero() && at.Before(p.At) {
		p = Planned{StepRetire, at, "the last token of the superseded JWT key has expired"}
	}
	return p
}

// spent reports whether what is left of a key is too short for the longest that it signs. One that is not valid yet is not spent:
// then the clock is wrong, and only people can tell.
func spent(k *key, ttl time.Duration, now time.Time) bool {
	return k.NotAfter.Sub(now) < leastSVID(ttl)
}

func halfLife(k *key) time.Time { return k.NotBefore.Add(k.NotAfter.Sub(k.NotBefore) / 2) }

// Run rotates the keys by itself until ctx ends, and then returns nil. A step that fails is logged, counted and tried
// again within a minute; a server that was off for longer than its keys live is given new ones at once.
func (a *Authority) Run(ctx context.Context) error {
	steps := map[Step]func(*ring, change, time.Time) error{
		StepPrepare: a.prepare, StepPublish: a.publish, StepActivate: a.activate, StepRetire: a.retire, StepReplace: a.replace,
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		now := a.now()
		p := a.plan(a.current.Load(), now)
		wait := min(p.At.Sub(now), maxNap)
		if wait <= 0 {
			wait = 0
			rec := event.NewRecord(actor, "ca."+string(p.Step), a.cfg.TrustDomain.String())
			rec.Time, rec.Detail = now.UTC(), map[string]string{"why": p.Why}
			if _, err := a.step(ctx, p.Step, rec, steps[p.Step]); err != nil {
				wait = maxNap
				a.meter.Count("ca_rotation_failures", 1, "step", string(p.Step))
				a.log.ErrorContext(ctx, "key rotation failed", slog.String("step", string(p.Step)), slog.Any("error", err))
			}
		}
		timer.Reset(wait)
	}
}
