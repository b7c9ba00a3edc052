package set

import (
	"context"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// DecideOptions is what a point knows beside the request.
type DecideOptions struct {
	Machine   string     // where it is decided: a machine id, or "server"
	Edition   uint64     // the version of the set that answers
	Overrides []Override // the panic switch; expired ones have no effect
	Released  bool       // redoubt release lifted everything on this machine
	// Workloads are further workloads that the request concerns, for modes and overrides: the instance behind a Service
	// that is called, whose labels the Service does not have.
	Workloads []policy.Entity
}

// Decide answers a request. The decision is complete: id, time, mode, edition, and an explanation. Its Request is the one
// given plus what the set declares: groups and owners of Services, and the Addresses that an address lies in.
//
// What the engine says stands, except that
//
//   - an engine that cannot decide is a Deny with ReasonError (in Observe it goes through and is recorded);
//   - on a released machine everything in Run, Net and Api is a Permit with ReasonReleased, in Observe, and the summary
//     says what it would have been; Access is not lifted, since that would open doors instead of freeing workloads;
//   - the never-touch list turns a Deny in Run and Net into a Permit with ReasonNeverTouch, see [NeverTouch];
//   - the un-lock rule permits the local operator's work on policy sets.
//
// Concurrency: safe. Trust: names and attributes in the request are data; Principal, Resource and their parents must have
// been established by the point.
func (s *Set) Decide(ctx context.Context, req *policy.Request, opts DecideOptions) *policy.Decision {
	now := time.Now().UTC()
	r := s.declare(req)
	d := &policy.Decision{
		ID: policy.NewID(), Time: now, Verdict: policy.Deny, Mode: policy.Enforce, Request: *r, Edition: opts.Edition, Machine: opts.Machine,
	}
	namespace := r.Action.Namespace()
	var concerned []side
	if observable(namespace) {
		concerned = sides(r, opts.Workloads)
		d.Mode, _ = s.modeOf(r, &opts, concerned, now)
	}
	verdict, explanation, err := s.engine.Decide(ctx, r)
	if err != nil {
		verdict = policy.Deny
		explanation = policy.Explanation{Reason: policy.ReasonError, Summary: undecided(err), Failures: explanation.Failures}
	}
	d.Verdict, d.Explanation = verdict, explanation
	switch {
	case opts.Released && observable(namespace):
		d.Mode = policy.Observe
		overturn(d, policy.ReasonReleased, "this machine is released")
	case verdict == policy.Permit:
	case namespace == policy.Run || namespace == policy.Net:
		if uid, ok := s.untouchable(opts.Machine, concerned, &explanation); ok {
			overturn(d, policy.ReasonNeverTouch, uid.String()+" is on the never-touch list, and nothing that refuses names it")
		}
	case namespace == policy.Access:
		if ref, ok := unlocked(ctx, r); ok {
			overturn(d, policy.ReasonPermit, "the un-lock rule keeps policy sets open to the local operator")
			d.Explanation.Deciding = []policy.Ref{ref}
		}
	}
	return d
}

// overturn makes the decision a permit, and its summary say what it would have been.
func overturn(d *policy.Decision, reason policy.Reason, why string) {
	if d.Verdict == policy.Deny {
		why += "; it would have been refused: " + d.Explanation.Summary
	}
	d.Verdict = policy.Permit
	d.Explanation = policy.Explanation{Reason: reason, Summary: why, Failures: d.Explanation.Failures}
}

// undecided renders an engine's error for an explanation: its own words if it is a refusal, since those are written for
// readers; else only that it failed.
func undecided(err error) string {
	if e := refusal.As(err); e != nil {
		return "the engine could not decide: " + e.Why
	}
	return "the engine could not decide"
}

// untouchable returns the never-touch service that the request concerns, if no policy that refuses the request names any
// it concerns.
//
// The principal counts only on the machine that decides: another machine's agent says which service its workloads are,
// and what it calls sshd must not thereby be let in here.
func (s *Set) untouchable(machine string, sides []side, e *policy.Explanation) (policy.UID, bool) {
	var protected []policy.UID
	for i, x := range sides {
		if i == 0 && isElsewhere(x.line, machine) {
			continue
		}
		if i > 1 {
			break // the further workloads are for modes only
		}
		for _, uid := range neverTouch {
			if slices.Contains(x.line, uid) {
				protected = append(protected, uid)
			}
		}
	}
	if len(protected) == 0 {
		return policy.UID{}, false
	}
	if e.Reason == policy.ReasonForbid {
		for _, ref := range e.Deciding {
			for _, uid := range protected {
				if s.named[uid][ref.ID] {
					return policy.UID{}, false
				}
			}
		}
	}
	return protected[0], true
}

// isElsewhere reports whether an ancestry has machines, and this one is not among them.
func isElsewhere(line []policy.UID, machine string) bool {
	elsewhere := false
	for _, uid := range line {
		if uid.Type == "Machine" {
			if uid.ID == machine {
				return false
			}
			elsewhere = true
		}
	}
	return elsewhere
}

// unlocked reports whether the un-lock rule permits the request, and by which policy.
func unlocked(ctx context.Context, r *policy.Request) (policy.Ref, bool) {
	engine, err := unlockEngine()
	if err != nil {
		return policy.Ref{}, false // a defect of the build, which a test finds
	}
	verdict, explanation, err := engine.Decide(ctx, r)
	if err != nil || verdict != policy.Permit || len(explanation.Deciding) == 0 {
		return policy.Ref{}, false
	}
	return explanation.Deciding[0], true
}
