package eval

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"

	"github.com/redoubtsec/redoubt/policy"
)

// Decide answers a request: permit if a permit applies and no forbid does, else deny.
//
// The explanation names the deciding policies; on a default deny it also names up to three permits that nearly applied
// and what kept them from it; failures are policies that could not be evaluated, which count as not applying.
//
// Errors: a refusal with code malformed-request, naming the key, for a request that does not fit the schema or the
// bounds; the context's error if it has ended. The verdict is then Deny and the reason ReasonError.
// Concurrency: safe. Trust: names and attributes of the request are data only.
func (e *Engine) Decide(ctx context.Context, r *policy.Request) (policy.Verdict, policy.Explanation, error) {
	if err := ctx.Err(); err != nil {
		return policy.Deny, undecided(err), err
	}
	q, err := ask(r, e.model, &e.mentions)
	if err != nil {
		return policy.Deny, undecided(err), err
	}
	s := scratches.Get().(*scratch) // the pool holds nothing else
	defer scratches.Put(s)
	e.index.candidates(s, q.principal, q.action, q.resource, q)
	verdict, diag := e.answer(s.matches, q, q.principal, q.action, q.resource, q.context)
	return verdict, e.explain(verdict, diag, q, s), nil
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// answer asks cedar-go about the candidates.
func (e *Engine) answer(
	candidates []int32, entities types.EntityGetter, principal, action, resource types.EntityUID, context types.Record,
) (policy.Verdict, cedar.Diagnostic) {
	if len(candidates) == 0 {
		return policy.Deny, cedar.Diagnostic{}
	}
	decision, diag := cedar.Authorize(slice{e.policies, candidates}, entities, cedar.Request{
		Principal: principal, Action: action, Resource: resource, Context: context,
	})
	if decision == cedar.Allow {
		return policy.Permit, diag
	}
	return policy.Deny, diag
}

// slice is some of the policies, in order. It implements cedar.PolicyIterator.
type slice struct {
	policies []compiled
	chosen   []int32
}

func (s slice) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for _, i := range s.chosen {
			if p := &s.policies[i]; !yield(p.id, p.policy) {
				return
			}
		}
	}
}

func undecided(err error) policy.Explanation {
	return policy.Explanation{Reason: policy.ReasonError, Summary: "the engine could not decide: " + err.Error()}
}

func (e *Engine) explain(v policy.Verdict, diag cedar.Diagnostic, q *question, s *scratch) policy.Explanation {
	var x policy.Explanation
	if n := len(diag.Reasons); n > 0 {
		x.Deciding = make([]policy.Ref, n)
		for i, r := range diag.Reasons {
			x.Deciding[i] = e.policies[e.byID[r.PolicyID]].ref
		}
	}
	switch {
	case v == policy.Permit:
		x.Reason, x.Summary = policy.ReasonPermit, "permitted by "+names(x.Deciding)
	case len(x.Deciding) > 0:
		x.Reason, x.Summary = policy.ReasonForbid, "forbidden by "+names(x.Deciding)
	default:
		x.Reason = policy.ReasonDefault
		x.Summary = fmt.Sprintf("no policy permits %s to %s for %s", uid(q.action), uid(q.resource), uid(q.principal))
	}
	if len(diag.Errors) == 0 && x.Reason != policy.ReasonDefault {
		return x
	}
	var forbids []policy.Ref
	for _, f := range diag.Errors {
		ref := e.policies[e.byID[f.PolicyID]].ref
		x.Failures = append(x.Failures, policy.Failure{Policy: ref, Error: quote(f.Message)})
		if ref.Effect == policy.EffectForbid {
			forbids = append(forbids, ref)
		}
	}
	if len(forbids) > 0 {
		x.Summary += "; WARNING: it could not be evaluated whether this is forbidden by " + names(forbids)
	}
	if x.Reason == policy.ReasonDefault {
		x.Nearest = e.nearest(q, s)
	}
	return x
}

// names lists policies in words, the first few.
func names(refs []policy.Ref) string {
	const few = 3
	if len(refs) == 1 {
		return refs[0].ID
	}
	var b strings.Builder
	for i, r := range refs {
		if i == few {
			fmt.Fprintf(&b, " and %d more", len(refs)-few)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(r.ID)
	}
	return b.String()
}

func uid(u types.EntityUID) string { return quote(u.String()) }
