package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// Step is one step of a rotation.
type Step string

// The steps. Replace is the first three at once; only [Authority.Run] takes it, when the active keys can no longer sign.
const (
	StepPrepare  Step = "prepare"
	StepPublish  Step = "publish"
	StepActivate Step = "activate"
	StepRetire   Step = "retire"
	StepReplace  Step = "replace"
)

// Prepare makes the next issuing and JWT key. Keys already prepared, but by now too near their end to be activated,
// make way. rec is the audit record of the step; its Detail gains the keys' ids.
// Errors: matches [ErrStep] if the next keys are there; [ErrTooShort], [ErrExpired] or [ErrNotYetValid] of the root.
// Durability: the keys are in the store when it returns; so for every step.
func (a *Authority) Prepare(ctx context.Context, rec event.Record) (Status, error) {
	return a.step(ctx, StepPrepare, rec, a.prepare)
}

// Publish puts the next JWT key into the bundle. It may sign a refresh interval later.
// Errors: matches [ErrStep] if no key is prepared.
func (a *Authority) Publish(ctx context.Context, rec event.Record) (Status, error) {
	return a.step(ctx, StepPublish, rec, a.publish)
}

// Activate lets the next keys sign, in the place of the active ones.
// Errors: matches [ErrStep] if no key is published; [ErrEarly] if it has not been so for a refresh interval;
// [ErrTooShort] if the issuing key is too near its end to carry SVIDs.
func (a *Authority) Activate(ctx context.Context, rec event.Record) (Status, error) {
	return a.step(ctx, StepActivate, rec, a.activate)
}

// Retire takes the superseded keys out of the bundle and destroys their private halves.
// Errors: matches [ErrStep] if there are none; [ErrEarly] while a token that they signed may still be valid.
func (a *Authority) Retire(ctx context.Context, rec event.Record) (Status, error) {
	return a.step(ctx, StepRetire, rec, a.retire)
}

// change is what a step does to the records: those that differ, by id.
type change map[string]KeyRecord

func (c change) set(k *key, edit func(*KeyRecord)) {
	rec, ok := c[k.ID]
	if !ok {
		rec = k.KeyRecord
	}
	edit(&rec)
	c[k.ID] = rec
}

// step runs one step on the keys as the store has them now, and makes the result current once it is stored.
func (a *Authority) step(ctx context.Context, name Step, rec event.Record, do func(*ring, change, time.Time) error) (Status, error) {
	a.stepping.Lock()
	defer a.stepping.Unlock()
	if err := a.tryStep(ctx, name, rec, do); err != nil {
		return Status{}, a.refused(err)
	}
	a.meter.Count("ca_rotation_steps", 1, "step", string(name))
	a.log.InfoContext(ctx, "took a step of key rotation", slog.String("step", string(name)), slog.String("actor", rec.Actor))
	return a.Status(), nil
}

func (a *Authority) tryStep(ctx context.Context, name Step, rec event.Record, do func(*ring, change, time.Time) error) error {
	if rec.ID == "" {
		return refuse(ErrStep, refusal.Invalid, "key rotation, "+string(name), "it has no audit record", "make one with event.NewRecord")
	}
	// The store is asked anew, for the case that a former step was stored and its answer lost.
	records, err := a.cfg.Store.Keys(ctx)
	if err != nil {
		return fmt.Errorf("read the authority's keys: %w", err)
	}
	before, err := a.sealer.newRing(a.cfg.TrustDomain, records, a.cfg.RefreshHint)
	if err != nil {
		return err
	}
	c := change{}
	if err := do(before, c, a.now().UTC().Truncate(time.Second)); err != nil {
		return err
	}
	rec.Detail = maps.Clone(rec.Detail)
	if rec.Detail == nil {
		rec.Detail = map[string]string{}
	}
	var changed []KeyRecord
	for id, k := range c {
		changed = append(changed, k)
		rec.Detail[string(k.Use)+" "+id] = string(k.State)
	}
	merged := slices.Clone(changed)
	for _, k := range before.records {
		if _, ok := c[k.ID]; !ok {
			merged = append(merged, k)
		}
	}
	// Checked before it is stored: a step that would leave a ring nobody can open must not be on disk.
	after, err := a.sealer.newRing(a.cfg.TrustDomain, merged, a.cfg.RefreshHint)
	if err != nil {
		return fmt.Errorf("check the keys after step %s: %w", name, err)
	}
	if err := a.cfg.Store.PutKeys(ctx, changed, rec); err != nil {
		return fmt.Errorf("store step %s of the rotation: %w", name, err)
	}
	a.publishRing(after)
	return nil
}

// publishRing makes r current, and wakes those who wait for a change of the bundle.
func (a *Authority) publishRing(r *ring) {
	old := a.current.Swap(r)
	if old.bundle.Sequence == r.bundle.Sequence {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Authority) prepare(r *ring, c change, now time.Time) error {
	if k := r.next(X509); k != nil {
		if a.canActivate(k, now) {
			return notNext(StepPrepare, "the next keys are "+string(k.State)+" already", "publish and activate them")
		}
		for _, use := range []Use{X509, JWT} { // they have waited too long: make way
			if k := r.next(use); k != nil {
				c.set(k, discard)
			}
		}
	}
	root, err := a.unsealRoot(r)
	if err != nil {
		return err
	}
	life, err := within(r.root.span(), now, a.cfg.IssuingTTL, a.cfg.leastIssuing(), "issuing certificate", "the root")
	if err != nil {
		return err
	}
	issuing, err := a.sealer.newIssuing(a.cfg.TrustDomain, Prepared, now, life, r.root.cert, root)
	if err != nil {
		return err
	}
	jwt, err := a.sealer.newJWT(Prepared, now, rootSpan(now, a.cfg.IssuingTTL))
	if err != nil {
		return err
	}
	c[issuing.ID], c[jwt.ID] = issuing, jwt
	return nil
}

func (a *Authority) publish(r *ring, c change, now time.Time) error {
	issuing, jwt := r.find(X509, Prepared), r.find(JWT, Prepared)
	if issuing == nil || jwt == nil {
		return notNext(StepPublish, "no keys are prepared", "prepare them first")
	}
	c.set(issuing, func(k *KeyRecord) { k.State = Published })
	c.set(jwt, func(k *KeyRecord) {
		k.State = Published
		k.NotBefore = now.Add(roundUp(a.cfg.RefreshHint)) // relying parties have it by then
	})
	return nil
}

func (a *Authority) activate(r *ring, c change, now time.Time) error {
	issuing, jwt := r.find(X509, Published), r.find(JWT, Published)
	if issuing == nil || jwt == nil {
		return notNext(StepActivate, "no keys are published", "prepare and publish them first")
	}
	if now.Before(jwt.NotBefore) {
		return early(StepActivate, "relying parties have the new JWT key by then", jwt.NotBefore, now)
	}
	if _, err := within(issuing.span(), now, a.cfg.leastIssuing(), a.cfg.leastIssuing(), "activation of issuing key "+issuing.ID, "its certificate"); err != nil {
		return err
	}
	a.supersede(r, c, now)
	c.set(issuing, func(k *KeyRecord) { k.State = Active })
	c.set(jwt, func(k *KeyRecord) { k.State = Active })
	return nil
}

// supersede ends the signing of the active keys. The JWT key stays until the last token that it can have signed is
// refused by the last verifier.
func (a *Authority) supersede(r *ring, c change, now time.Time) {
	c.set(r.active(X509), func(k *KeyRecord) { k.State = Superseded })
	c.set(r.active(JWT), func(k *KeyRecord) {
		k.State = Superseded
		k.NotAfter = earlier(k.NotAfter, now.Add(roundUp(a.cfg.JWTTTL))).Add(Leeway)
	})
}

func (a *Authority) retire(r *ring, c change, now time.Time) error {
	due := r.retireAt()
	if due.IsZero() {
		return notNext(StepRetire, "no keys are superseded", "activate the next keys first")
	}
	if now.Before(due) {
		return early(StepRetire, "a token that the old JWT key signed is valid until then", due, now)
	}
	for _, k := range r.keys {
		if k.State == Superseded {
			c.set(k, discard)
		}
	}
	return nil
}

// replace makes keys and lets them sign at once: the active ones cannot sign any more, so there is nothing better to
// wait for.
func (a *Authority) replace(r *ring, c change, now time.Time) error {
	for _, use := range []Use{X509, JWT} {
		if k := r.next(use); k != nil {
			c.set(k, discard)
		}
	}
	a.supersede(r, c, now)
	fresh := change{}
	if err := a.prepare(&ring{root: r.root}, fresh, now); err != nil {
		return err
	}
	for id, k := range fresh {
		k.State = Active
		c[id] = k
	}
	return nil
}

// retireAt is when the last of the superseded keys may go; zero if there are none.
func (r *ring) retireAt() time.Time {
	var at time.Time
	for _, k := range r.keys {
		if k.State == Superseded && k.Use == JWT { // an issuing key stays in its SVIDs' chains, and in no bundle
			at = later(at, k.NotAfter)
		}
	}
	return at
}

// canActivate reports whether an issuing key has enough of its life left to begin to sign.
func (a *Authority) canActivate(k *key, now time.Time) bool {
	return k.span().holds(now) && k.NotAfter.Sub(now) >= a.cfg.leastIssuing()
}

// unsealRoot opens the root's private key for one use.
func (a *Authority) unsealRoot(r *ring) (*ecdsa.PrivateKey, error) {
	der, err := a.sealer.open(r.root.KeyRecord)
	if err != nil {
		return nil, corrupt(r.root.KeyRecord, "its private key does not open", err)
	}
	defer clear(der)
	private, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, corrupt(r.root.KeyRecord, "its private key does not parse", nil)
	}
	k, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, corrupt(r.root.KeyRecord, "its private key is no P-256 key", nil)
	}
	return k, nil
}

// discard ends a key: its private half is destroyed.
func discard(k *KeyRecord) { k.State, k.Sealed = Retired, nil }

// roundUp is d in whole seconds, upwards: records have no parts of a second.
func roundUp(d time.Duration) time.Duration { return (d + time.Second - 1).Truncate(time.Second) }

func notNext(step Step, why, do string) error {
	return refuse(ErrStep, refusal.Conflict, "key rotation, "+string(step), why, do)
}

func early(step Step, why string, at, now time.Time) error {
	return refuse(ErrEarly, refusal.Conflict, "key rotation, "+string(step),
		fmt.Sprintf("it is too early until %s: %s", stamp(at), why), fmt.Sprintf("wait %s", at.Sub(now)))
}
