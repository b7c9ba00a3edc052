package fleet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Revoke withdraws trust from the identity, machine or key that r names: nothing is signed for it and, of a machine, no
// call answered, from when it is committed; agents are pushed the revocation. A revoked machine's workloads are gone: at
// once or, if there are too many, soon after this returns. ID, Created and Author are filled in. Errors: [ErrWithdrawal], [ErrWithdrawals]; [ErrUnknown] of a machine that never joined.
func (f *Fleet) Revoke(ctx context.Context, r Revocation, rec event.Record) (Revocation, error) {
	now := f.now()
	r.ID, r.Created, r.Author = identity.Unique("v"), now, rec.Actor
	if err := checkRevocation(f.cfg.TrustDomain, r, now); err != nil {
		return Revocation{}, err
	}
	rec.Detail = because(rec.Detail, "revocation", r.ID, r.Reason, r.Expires)
	err := f.update(ctx, func(u *unit) error {
		n, err := u.Revocations.CountRevocations(ctx)
		if err != nil {
			return err
		}
		if n >= f.cfg.MaxWithdrawn {
			f.meter.Count("fleet_withdrawals_refused", 1, "code", ErrWithdrawals.Code)
			return exhausted(ErrWithdrawals, "revocation", f.cfg.MaxWithdrawn, "lift some first")
		}
		if r.Machine != "" {
			if err := f.expel(ctx, u, r); err != nil {
				return err
			}
		}
		if err := u.Revocations.PutRevocation(ctx, r); err != nil {
			return err
		}
		u.then = append(u.then, func() { f.revoked.put(r) })
		if err := u.push(ctx, KindRevocation, r.ID, r); err != nil {
			return err
		}
		return u.Audit.PutRecord(ctx, rec)
	})
	if err != nil {
		return Revocation{}, err
	}
	f.meter.Count("fleet_revocations", 1)
	if r.Machine != "" {
		f.follow(ctx)
	}
	return r, nil
}

// because adds to the detail of an audit record which withdrawal it is of, why, and until when.
func because(detail map[string]string, kind, id, reason string, expires time.Time) map[string]string {
	out := map[string]string{kind: id, "reason": reason}
	if !expires.IsZero() {
		out["expires"] = stamp(expires)
	}
	maps.Copy(out, detail)
	return out
}

// RevokeMachine is [Fleet.Revoke] of a machine, for good.
func (f *Fleet) RevokeMachine(ctx context.Context, machine, reason string, rec event.Record) (Revocation, error) {
	return f.Revoke(ctx, Revocation{Machine: machine, Reason: reason}, rec)
}

// expel takes a machine out: it is revoked, and the end of its workloads is due.
func (f *Fleet) expel(ctx context.Context, u *unit, r Revocation) error {
	m, err := u.Machines.Machine(ctx, r.Machine)
	if errors.Is(err, ErrNotFound) {
		return unknown("machine "+r.Machine, "list machines with redoubt get machines")
	}
	if err != nil {
		return err
	}
	// A revocation that ends by itself lets the machine in again; one for good is a state of the machine.
	if r.Expires.IsZero() {
		m.State = MachineRevoked
		if err := u.Machines.PutMachine(ctx, m); err != nil {
			return err
		}
		u.then = append(u.then, func() { f.members[m.ID] = memberOf(m) })
	}
	u.then = append(u.then, func() { f.mark(subject{machine: m.ID}) })
	return nil
}

// Lift ends a revocation. A machine that was revoked for good may speak again with the key that it has, if no other
// revocation names it. Errors: [ErrUnknown].
func (f *Fleet) Lift(ctx context.Context, id string, rec event.Record) error {
	return f.update(ctx, func(u *unit) error {
		f.mu.Lock()
		r, ok := f.revoked.byID[id]
		f.mu.Unlock()
		if !ok {
			return unknown("revocation", "list those in force with redoubt get revocations")
		}
		if err := u.Revocations.DeleteRevocation(ctx, id); err != nil {
			return err
		}
		if r.Machine != "" {
			if err := f.readmit(ctx, u, r.Machine, []string{id}); err != nil {
				return err
			}
		}
		u.then = append(u.then, func() { f.revoked.remove(id) })
		if err := u.push(ctx, KindRevocation, id, nil); err != nil {
			return err
		}
		return u.Audit.PutRecord(ctx, rec)
	})
}

// Revocations lists them in order of id, after the id given; those that ended are kept for [Config.KeepGone].
func (f *Fleet) Revocations(ctx context.Context, after string, limit int) ([]Revocation, error) {
	var out []Revocation
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Revocations.Revocations(ctx, after, page(limit))
		return err
	})
	return out, err
}

// Quarantine marks an identity or an instance: its workloads, those to come included, have the fact risk.quarantined from
// the server until it is lifted or ends, and agents are pushed that: at once or, if they are too many, soon after this
// returns. ID, Created and Author are filled in.
// Errors: [ErrWithdrawal], [ErrWithdrawals]; [ErrUnknown] of an instance that is not known.
func (f *Fleet) Quarantine(ctx context.Context, q Quarantine, rec event.Record) (Quarantine, error) {
	now := f.now()
	q.ID, q.Created, q.Author = identity.Unique("q"), now, rec.Actor
	if err := checkQuarantine(f.cfg.TrustDomain, q, now); err != nil {
		return Quarantine{}, err
	}
	rec.Detail = because(rec.Detail, "quarantine", q.ID, q.Reason, q.Expires)
	err := f.update(ctx, func(u *unit) error {
		n, err := u.Quarantines.CountQuarantines(ctx)
		if err != nil {
			return err
		}
		if n >= f.cfg.MaxWithdrawn {
			f.meter.Count("fleet_withdrawals_refused", 1, "code", ErrWithdrawals.Code)
			return exhausted(ErrWithdrawals, "quarantine", f.cfg.MaxWithdrawn, "lift some first")
		}
		if q.Instance != "" {
			if _, err := u.Workloads.Workload(ctx, q.Instance); errors.Is(err, ErrNotFound) {
				return unknown("workload "+q.Instance, "list workloads with redoubt get workloads")
			} else if err != nil {
				return err
			}
		}
		if err := u.Quarantines.PutQuarantine(ctx, q); err != nil {
			return err
		}
		if err := u.Audit.PutRecord(ctx, rec); err != nil {
			return err
		}
		u.then = append(u.then, func() {
			f.isolate.put(q)
			f.mark(subject{identity: q.Identity, instance: q.Instance})
		})
		return nil
	})
	if err != nil {
		return Quarantine{}, err
	}
	f.meter.Count("fleet_quarantines", 1)
	f.follow(ctx)
	return q, nil
}

// Release lifts a quarantine; workloads follow as after [Fleet.Quarantine]. Errors: [ErrUnknown].
func (f *Fleet) Release(ctx context.Context, id string, rec event.Record) error {
	err := f.update(ctx, func(u *unit) error {
		if err := f.unisolate(ctx, u, id); err != nil {
			return err
		}
		return u.Audit.PutRecord(ctx, rec)
	})
	if err == nil {
		f.follow(ctx)
	}
	return err
}

// unisolate ends a quarantine; that the workloads follow is due then.
func (f *Fleet) unisolate(ctx context.Context, u *unit, id string) error {
	f.mu.Lock()
	q, ok := f.isolate.byID[id]
	f.mu.Unlock()
	if !ok {
		return unknown("quarantine", "list those in force with redoubt get quarantines")
	}
	if err := u.Quarantines.DeleteQuarantine(ctx, id); err != nil {
		return err
	}
	u.then = append(u.then, func() {
		f.isolate.remove(id)
		f.mark(subject{identity: q.Identity, instance: q.Instance})
	})
	return nil
}

// Quarantines lists them in order of id, after the id given.
func (f *Fleet) Quarantines(ctx context.Context, after string, limit int) ([]Quarantine, error) {
	var out []Quarantine
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Quarantines.Quarantines(ctx, after, page(limit))
		return err
	})
	return out, err
}

// withdrawn returns the refusal if trust in any of these was withdrawn. The zero value of each is nobody.
func (f *Fleet) withdrawn(id identity.ID, machine, spki string) error {
	now := f.now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if r, ok := f.revoked.find(subject{machine: machine}, now); machine != "" && ok {
		return machineRevoked(machine, "it was revoked at "+stamp(r.Created)+" ("+r.ID+")")
	}
	if r, ok := f.revoked.find(subject{spki: spki}, now); spki != "" && ok {
		return refuse(ErrKeyRevoked, refusal.Unproven, "key", "it was revoked at "+stamp(r.Created)+" ("+r.ID+")", "use a new key")
	}
	if r, ok := f.revoked.find(subject{identity: id}, now); !id.IsZero() && ok {
		return refuse(ErrIdentityRevoked, refusal.Denied, "SVID of "+id.String(), "the identity was revoked at "+stamp(r.Created)+" ("+r.ID+")",
			"lift the revocation if it should be issued again")
	}
	return nil
}

// quarantinedBy returns the quarantine that holds for a workload: of several the oldest, so that the evidence does not flap.
func (f *Fleet) quarantinedBy(id identity.ID, instance string) (Quarantine, bool) {
	now := f.now()
	f.mu.Lock()
	defer f.mu.Unlock()
	q, ok := f.isolate.find(subject{instance: instance}, now)
	if p, also := f.isolate.find(subject{identity: id}, now); !id.IsZero() && also && (!ok || p.ID < q.ID) {
		q, ok = p, true
	}
	return q, ok
}

// subject is who a withdrawal is about: one of these.
type subject struct {
	identity identity.ID
	machine  string
	spki     string
	instance string
}

// withdrawal is a [Revocation] or a [Quarantine].
type withdrawal interface {
	about() (id string, of subject, expires time.Time)
}

func (r Revocation) about() (string, subject, time.Time) {
	return r.ID, subject{identity: r.Identity, machine: r.Machine, spki: r.SPKI}, r.Expires
}

func (q Quarantine) about() (string, subject, time.Time) {
	return q.ID, subject{identity: q.Identity, instance: q.Instance}, q.Expires
}

// withdrawals is a set of them, by id and by subject. Zero value: empty; put makes it usable.
type withdrawals[T withdrawal] struct {
	byID map[string]T
	of   map[subject][]string // ids, in order
}

func (w *withdrawals[T]) put(x T) {
	if w.byID == nil {
		w.byID, w.of = map[string]T{}, map[subject][]string{}
	}
	id, of, _ := x.about()
	if _, ok := w.byID[id]; !ok {
		ids := append(w.of[of], id)
		slices.Sort(ids)
		w.of[of] = ids
	}
	w.byID[id] = x
}

func (w *withdrawals[T]) remove(id string) {
	x, ok := w.byID[id]
	if !ok {
		return
	}
	delete(w.byID, id)
	_, of, _ := x.about()
	if w.of[of] = slices.DeleteFunc(w.of[of], func(o string) bool { return o == id }); len(w.of[of]) == 0 {
		delete(w.of, of)
	}
}

// find returns the oldest that holds for a subject.
func (w *withdrawals[T]) find(of subject, now time.Time) (T, bool) {
	for _, id := range w.of[of] {
		x := w.byID[id]
		if _, _, expires := x.about(); expires.IsZero() || now.Before(expires) {
			return x, true
		}
	}
	var none T
	return none, false
}

func checkRevocation(td identity.TrustDomain, r Revocation, now time.Time) error {
	named := 0
	if !r.Identity.IsZero() {
		named++
		if r.Identity.TrustDomain() != td {
			return badWithdrawal("revocation", "the identity is of another trust domain")
		}
	}
	if r.Machine != "" {
		named++
		if err := checkMachineID(r.Machine); err != nil {
			return err
		}
	}
	if r.SPKI != "" {
		named++
		if len(r.SPKI) != 64 || strings.ContainsFunc(r.SPKI, func(c rune) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') }) {
			return badWithdrawal("revocation", "the key is not 64 lower-case hex digits")
		}
	}
	if named != 1 {
		return badWithdrawal("revocation", "it names not exactly one of identity, machine and key")
	}
	return checkEnd("revocation", r.Reason, r.Expires, now)
}

func checkQuarantine(td identity.TrustDomain, q Quarantine, now time.Time) error {
	if q.Identity.IsZero() == (q.Instance == "") {
		return badWithdrawal("quarantine", "it names not exactly one of identity and instance")
	}
	if !q.Identity.IsZero() && q.Identity.TrustDomain() != td {
		return badWithdrawal("quarantine", "the identity is of another trust domain")
	}
	return checkEnd("quarantine", q.Reason, q.Expires, now)
}

func checkEnd(what, reason string, expires, now time.Time) error {
	if reason == "" || len(reason) > MaxReasonBytes {
		return badWithdrawal(what, fmt.Sprintf("its reason is empty or longer than %d bytes", MaxReasonBytes))
	}
	if !expires.IsZero() && !expires.After(now) {
		return badWithdrawal(what, "its end has passed")
	}
	return nil
}

func badWithdrawal(what, why string) error {
	return refuse(ErrWithdrawal, refusal.Invalid, what, why, "name one subject, a reason, and an end that is still to come or none")
}
