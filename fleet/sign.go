package fleet

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

// SignX509 signs the key of a CSR as the identity of a workload that is present on this very machine. The caller has
// authenticated the machine. Errors: [ErrWorkloadUnknown], [ErrWorkloadForeign] (also counted, told and audited),
// [ErrWorkloadGone], [ErrIdentityRevoked], [ErrKeyRevoked], the refusal of issuance, and the authority's of a CSR.
func (f *Fleet) SignX509(ctx context.Context, machine, instance string, csr []byte) ([]*x509.Certificate, error) {
	chain, w, err := f.signX509(ctx, machine, instance, csr)
	if err != nil {
		f.meter.Count("fleet_signings_refused", 1, "kind", "x509", "code", codeOf(err))
		return nil, err
	}
	f.meter.Count("fleet_signings", 1, "kind", "x509")
	f.issued(w, "x509", chain[0].NotAfter)
	return chain, nil
}

func (f *Fleet) signX509(ctx context.Context, machine, instance string, csr []byte) ([]*x509.Certificate, Workload, error) {
	pub, spki, err := parseCSR(csr)
	if err != nil {
		return nil, Workload{}, err
	}
	w, err := f.signable(ctx, machine, instance, spki)
	if err != nil {
		return nil, Workload{}, err
	}
	chain, err := f.cfg.Authority.SignX509(ctx, w.ID, pub, 0, ca.SignOptions{})
	return chain, w, err
}

// SignJWT signs a JWT-SVID for an audience, as [Fleet.SignX509] does a certificate.
func (f *Fleet) SignJWT(ctx context.Context, machine, instance string, audience []string) (*identity.JWTSVID, error) {
	svid, w, err := f.signJWT(ctx, machine, instance, audience)
	if err != nil {
		f.meter.Count("fleet_signings_refused", 1, "kind", "jwt", "code", codeOf(err))
		return nil, err
	}
	f.meter.Count("fleet_signings", 1, "kind", "jwt")
	f.issued(w, "jwt", svid.Expires)
	return svid, nil
}

func (f *Fleet) signJWT(ctx context.Context, machine, instance string, audience []string) (*identity.JWTSVID, Workload, error) {
	bad := len(audience) == 0 || len(audience) > MaxAudiences
	for _, a := range audience {
		bad = bad || a == "" || len(a) > MaxAudienceBytes
	}
	if bad {
		return nil, Workload{}, refuse(ca.ErrAudience, refusal.Invalid, "JWT-SVID of "+workloadName(instance),
			"there is no audience, or there are more than 16, or one is empty or longer than 256 bytes", "name whom the token is for")
	}
	w, err := f.signable(ctx, machine, instance, "")
	if err != nil {
		return nil, Workload{}, err
	}
	svid, err := f.cfg.Authority.SignJWT(ctx, w.ID, audience, 0)
	return svid, w, err
}

// signable returns the workload if its identity may be signed for this machine: it is there, and here.
func (f *Fleet) signable(ctx context.Context, machine, instance, spki string) (Workload, error) {
	var w Workload
	err := f.view(ctx, func(tx Tx) (err error) {
		w, err = tx.Workloads.Workload(ctx, instance)
		return err
	})
	switch {
	case errors.Is(err, ErrNotFound):
		return Workload{}, refuse(ErrWorkloadUnknown, refusal.Unknown, workloadName(instance), "machine "+machine+" has not reported it",
			"report it first; the agent does that by itself")
	case err != nil:
		return Workload{}, err
	case w.Machine != machine:
		// An agent is trusted for its own machine only (docs/threat-model.md): this is an attack, or a broken agent.
		if rec, due := f.accuse(ctx, machine, instance, w.Machine, "sign"); due {
			if err := f.update(ctx, func(u *unit) error { return u.Audit.PutRecord(ctx, rec) }); err != nil {
				f.meter.Count("fleet_audit_failed", 1)
				f.log.ErrorContext(ctx, "an overreach could not be put into the audit log", slog.Any("error", err))
			}
		}
		return Workload{}, foreign(instance)
	case w.State != WorkloadPresent:
		return Workload{}, refuse(ErrWorkloadGone, refusal.Conflict, workloadName(instance), "it is gone since "+stamp(w.Seen),
			"report it again if it is running")
	case w.Refusal != nil:
		return Workload{}, w.Refusal.Err()
	}
	return w, f.withdrawn(w.ID, machine, spki)
}

func foreign(instance string) *refusal.Error {
	return refuse(ErrWorkloadForeign, refusal.Denied, workloadName(instance), "it belongs to another machine",
		"ask on the machine on which it runs; this attempt was recorded")
}

// accuseEvery bounds how often an overreach of one machine goes into the audit log; all are counted and told as events.
const accuseEvery = time.Minute

// accuse tells that a machine reached for what is another's. It returns the audit record of it, if one is due.
func (f *Fleet) accuse(ctx context.Context, machine, instance, owner, how string) (event.Record, bool) {
	f.meter.Count("fleet_foreign_workload", 1, "how", how)
	f.log.WarnContext(ctx, "a machine asked for a workload of another machine", slog.String("machine", machine),
		slog.String("instance", instance), slog.String("owner", owner), slog.String("how", how))
	e := event.New(event.Control, "workload.foreign")
	e.Machine, e.Workload = machine, instance
	e.Message = "machine " + machine + " asked for a workload of machine " + owner
	e.Attrs = map[string]any{"owner": owner, "how": how}

	rec := event.NewRecord(machineUID(machine), "workload.foreign", instance)
	rec.Detail = map[string]string{"owner": owner, "how": how}
	now := f.now()
	f.mu.Lock()
	due := now.Sub(f.accused[machine]) >= accuseEvery // machines are bounded, and so is this map
	if due {
		f.accused[machine] = now
	}
	f.mu.Unlock()
	if due {
		f.Emit(e)
	} else { // an agent can make any number of these
		f.queue(f.routine, e, "routine")
	}
	return rec, due
}

const kindIssued = "svid.issued"

// issued tells of a signature.
func (f *Fleet) issued(w Workload, kind string, until time.Time) {
	e := event.New(event.Control, kindIssued)
	e.Machine, e.Workload, e.Identity = w.Machine, w.Instance, w.ID
	e.Message = "signed an SVID of " + w.ID.String()
	e.Attrs = map[string]any{"kind": kind, "expires": stamp(until)}
	f.Emit(e)
}

// note tells of something in the life of a machine.
func (f *Fleet) note(kind, machine, message string, attrs map[string]any) {
	e := event.New(event.Control, kind)
	e.Machine, e.Message, e.Attrs = machine, message, attrs
	f.Emit(e)
}
