package eval

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	cedarast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	cedareval "github.com/cedar-policy/cedar-go/x/exp/eval"

	"github.com/redoubtsec/redoubt/policy"
)

// The bounds of an explanation: a default deny must stay cheap, since an attacker can cause as many as he likes.
const (
	maxNearest = 3
	maxWeighed = 16 // policies looked at for each kind of miss
)

// nearest returns the permits that nearly applied, nearest first: those whose scope matched and whose conditions did
// not, then those with one part of the scope amiss. s still holds what the request met.
func (e *Engine) nearest(q *question, s *scratch) []policy.Miss {
	type weighed struct {
		policy *compiled
		far    int
	}
	var found []weighed
	taken := map[int32]bool{}
	matched := 0 // how many match in scope
	weigh := func(i int32) (known bool) {
		if taken[i] {
			return true
		}
		taken[i] = true
		p := &e.policies[i]
		faults := 0
		for part := range partNames {
			if scope, asked := scopeOf(p.ast, part, q); !matches(scope, asked, q) {
				faults += 1000 + distance(p.ast, part, q)
			}
		}
		if faults == 0 {
			matched++
			faults = len(conditionFaults(p.ast, q))
		}
		found = append(found, weighed{p, faults})
		return false
	}
	for _, i := range s.matches {
		if len(found) < maxWeighed && e.policies[i].ref.Effect == policy.EffectPermit {
			weigh(i)
		}
	}
	if matched < maxNearest {
		// Most often it is the resource that a policy does not name, then the action, then the principal.
		for _, part := range []int{ofResource, ofAction, ofPrincipal} {
			left := maxWeighed
			e.index.almost(part, s, func(i int32) bool {
				if !weigh(i) {
					left--
				}
				return left > 0
			})
		}
	}
	slices.SortStableFunc(found, func(a, b weighed) int { return cmp.Compare(a.far, b.far) })
	misses := make([]policy.Miss, 0, maxNearest)
	for _, f := range found[:min(len(found), maxNearest)] {
		why := scopeFaults(f.policy.ast, q)
		if len(why) == 0 {
			why = conditionFaults(f.policy.ast, q)
		}
		misses = append(misses, policy.Miss{Policy: f.policy.ref, Why: why})
	}
	return misses
}

// almost yields the permits that match in the other two parts, whatever they say of this one.
func (x *index) almost(part int, s *scratch, yield func(int32) bool) {
	met := s.met
	met[part] = []int32{open}
	if len(met[0])*len(met[1])*len(met[2]) > 1_000 {
		return
	}
	for _, p := range met[ofPrincipal] {
		for _, a := range met[ofAction] {
			for _, r := range met[ofResource] {
				for _, i := range x.pairs[part][bucket{p, a, r}] {
					if !yield(i) {
						return
					}
				}
			}
		}
	}
}

// distance says how far a policy's scope is from the request in the part that is amiss: nearer if it speaks of the same
// type of thing there, and if it names something in the other parts.
func distance(p *ast.Policy, part int, q *question) int {
	scope, asked := scopeOf(p, part, q)
	var t types.EntityType
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		t = s.Entity.Type
	case ast.ScopeTypeIn:
		t = s.Entity.Type
	case ast.ScopeTypeIs:
		t = s.Type
	case ast.ScopeTypeIsIn:
		t = s.Type
	case ast.ScopeTypeInSet:
		if len(s.Entities) > 0 {
			t = s.Entities[0].Type
		}
	}
	far := 0
	if t != asked.Type {
		far = 10
	}
	for other := range partNames {
		if scope, _ := scopeOf(p, other, q); scope == (ast.ScopeTypeAll{}) {
			far++
		}
	}
	return far
}

func scopeOf(p *ast.Policy, part int, q *question) (ast.IsScopeNode, types.EntityUID) {
	switch part {
	case ofPrincipal:
		return p.Principal, q.principal
	case ofAction:
		return p.Action, q.action
	default:
		return p.Resource, q.resource
	}
}

// scopeFaults says, a sentence each, which parts of a policy's scope the request does not match.
func scopeFaults(p *ast.Policy, q *question) []string {
	var why []string
	for part, name := range partNames {
		if scope, asked := scopeOf(p, part, q); !matches(scope, asked, q) {
			why = append(why, scopeFault(name, scope, asked))
		}
	}
	return why
}

// matches reports whether an entity meets one part of a scope.
func matches(scope ast.IsScopeNode, asked types.EntityUID, q *question) bool {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return asked == s.Entity
	case ast.ScopeTypeIn:
		return within(asked, q, s.Entity)
	case ast.ScopeTypeInSet:
		return within(asked, q, s.Entities...)
	case ast.ScopeTypeIs:
		return asked.Type == s.Type
	case ast.ScopeTypeIsIn:
		return asked.Type == s.Type && within(asked, q, s.Entity)
	default: // ast.ScopeTypeAll
		return true
	}
}

// scopeFault says how an entity misses one part of a scope.
func scopeFault(part string, scope ast.IsScopeNode, asked types.EntityUID) string {
	is := part + " is " + uid(asked)
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return is + ", the policy names " + uid(s.Entity)
	case ast.ScopeTypeIn:
		return is + ", which is not in " + uid(s.Entity)
	case ast.ScopeTypeInSet:
		return is + ", the policy names " + uids(s.Entities)
	case ast.ScopeTypeIs:
		return is + ", the policy speaks of a " + quote(string(s.Type))
	case ast.ScopeTypeIsIn:
		if asked.Type != s.Type {
			return is + ", the policy speaks of a " + quote(string(s.Type))
		}
		return is + ", which is not in " + uid(s.Entity)
	default:
		return is
	}
}

func within(asked types.EntityUID, q *question, groups ...types.EntityUID) bool {
	var s scratch
	return slices.ContainsFunc(s.ancestry(asked, q), func(u types.EntityUID) bool { return slices.Contains(groups, u) })
}

func uids(list []types.EntityUID) string {
	const few = 5
	words := make([]string, 0, few+1)
	for i, u := range list {
		if i == few {
			words = append(words, fmt.Sprintf("%d more", len(list)-few))
			break
		}
		words = append(words, u.String())
	}
	return quote(strings.Join(words, ", "))
}

// conditionFaults says, a sentence each, which conditions of a policy keep it from applying, in the policy's own words.
func conditionFaults(p *ast.Policy, q *question) []string {
	env := cedareval.Env{Entities: q, Principal: q.principal, Action: q.action, Resource: q.resource, Context: q.context}
	var why []string
	for i, c := range p.Conditions {
		word, wanted := "when", types.True
		if c.Condition == ast.ConditionUnless {
			word, wanted = "unless", types.False
		}
		v, err := cedareval.Eval(c.Body, env)
		switch {
		case err != nil:
			why = append(why, fmt.Sprintf("condition %d (`%s`) could not be evaluated: %s", i+1, word, quote(err.Error())))
		case v == wanted:
			continue
		case word == "when":
			why = append(why, fmt.Sprintf("condition %d (`when`) is false: %s", i+1, expression(falseTerm(c.Body, env))))
		default:
			why = append(why, fmt.Sprintf("condition %d (`unless`) is true: %s", i+1, expression(c.Body)))
		}
	}
	return why
}

// falseTerm returns the first term of a conjunction that is false, which says more than the whole.
func falseTerm(n ast.IsNode, env cedareval.Env) ast.IsNode {
	for {
		and, ok := n.(ast.NodeTypeAnd)
		if !ok {
			return n
		}
		v, err := cedareval.Eval(and.Left, env)
		if err != nil {
			return n
		}
		if v == types.False {
			n = and.Left
		} else {
			n = and.Right
		}
	}
}

// expression renders a condition on one line, for a message.
func expression(n ast.IsNode) string { return quote(strings.Join(strings.Fields(render(n)), " ")) }

// render renders an expression as Cedar text.
func render(n ast.IsNode) string {
	p := ast.Permit().When(ast.NewNode(n))
	text := cedar.NewPolicyFromAST((*cedarast.Policy)(p)).MarshalCedar()
	if _, body, ok := bytes.Cut(text, []byte("when { ")); ok {
		text = bytes.TrimSuffix(body, []byte(" };"))
	}
	return string(text)
}
