package eval

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy"
)

// world makes random policies, entities and requests over a universe so small that everything meets everything.
type world struct {
	*rand.Rand
	wide bool // many parents, so that requests meet more buckets than there are policies
}

var (
	worldTypes   = []string{"User", "Group", "Doc", "Ns::Doc"}
	worldActions = []string{"view", "edit", "any", "all"}
)

func (w *world) id() string { return string(rune('a' + w.IntN(4))) }

func (w *world) thing() policy.UID {
	return policy.UID{Type: worldTypes[w.IntN(len(worldTypes))], ID: w.id()}
}

func (w *world) action() policy.UID {
	return policy.UID{Type: "Action", ID: worldActions[w.IntN(len(worldActions))]}
}

func (w *world) scope(part string) string {
	switch u := w.thing(); w.IntN(6) {
	case 0, 1:
		return part + " == " + u.String()
	case 2:
		return part + " in " + u.String()
	case 3:
		return part + " is " + u.Type
	case 4:
		return part + " is " + u.Type + " in " + w.thing().String()
	default:
		return part
	}
}

func (w *world) actionScope() string {
	switch w.IntN(5) {
	case 0:
		return "action == " + w.action().String()
	case 1:
		return "action in " + w.action().String()
	case 2:
		return "action in []"
	case 3:
		list := make([]string, 1+w.IntN(3))
		for i := range list {
			list[i] = w.action().String()
		}
		return "action in [" + strings.Join(list, ", ") + "]"
	default:
		return "action"
	}
}

func (w *world) condition() string {
	word := []string{"when", "unless"}[w.IntN(2)]
	return word + " { " + []string{
		"true", "false", "1", "context.n == 1", "context has n && context.n > 1", "context.r.deep == \"x\"",
		"context == {n: 1}", "context == {n: 1, r: {deep: \"x\"}}", "[context, {n: 2}].contains({n: 2})",
		"principal in " + w.thing().String(), "resource == principal", "principal has level && principal.level == 1",
		"resource.owner in Group::\"a\"", "principal.level > 0", "resource.hasTag(\"k\") && resource.getTag(\"k\") == \"v\"",
		"principal.hasTag(context.r.deep)", "resource has \"owner\"", "action in [Action::\"any\", Action::\"all\"]",
		"User::\"a\" has level && User::\"a\".level == 1", "if principal has level then principal.level == 0 else true",
		"principal.set.contains(resource)", "principal.at < datetime(\"2030-01-01\")", "context.ip.isInRange(ip(\"10.0.0.0/8\"))",
	}[w.IntN(23)] + " }"
}

func (w *world) policies(n int) string {
	var b strings.Builder
	for range n {
		b.WriteString([]string{"permit", "permit", "forbid"}[w.IntN(3)])
		fmt.Fprintf(&b, "(%s, %s, %s)", w.scope("principal"), w.actionScope(), w.scope("resource"))
		for range w.IntN(3) {
			b.WriteString(" " + w.condition())
		}
		b.WriteString(";\n")
	}
	return b.String()
}

func (w *world) entity(u policy.UID) policy.Entity {
	e := policy.Entity{UID: u, Attrs: policy.Record{}}
	few := 3
	if w.wide {
		few = 16
	}
	for range w.IntN(few) { // cycles and parents that nobody describes included
		e.Parents = append(e.Parents, w.thing())
	}
	if w.IntN(2) == 0 {
		e.Attrs["level"] = int64(w.IntN(3))
	}
	if w.IntN(2) == 0 {
		e.Attrs["owner"] = w.thing()
	}
	if w.IntN(2) == 0 {
		e.Attrs["set"] = []any{w.thing(), "x", int64(1)}
	}
	if w.IntN(2) == 0 {
		e.Tags = map[string]string{"k": []string{"v", "u"}[w.IntN(2)], "x": ""}
	}
	return e
}

func (w *world) request() *policy.Request {
	r := &policy.Request{Principal: w.entity(w.thing()), Action: w.action(), Resource: w.entity(w.thing()), Context: policy.Record{}}
	if w.IntN(2) == 0 {
		r.Context["n"] = int64(1 + w.IntN(2))
	}
	if w.IntN(3) == 0 {
		r.Context["r"] = policy.Record{"deep": "x"}
	}
	if w.IntN(4) == 0 {
		r.Context["unmentioned"] = "y"
	}
	for range w.IntN(12) {
		r.Others = append(r.Others, w.entity(w.thing()))
	}
	for _, a := range worldActions {
		if w.IntN(2) == 0 {
			r.Others = append(r.Others, policy.Entity{UID: policy.UID{Type: "Action", ID: a}, Parents: []policy.UID{w.action()}})
		}
	}
	return r
}

// plain is the request as cedar-go would be given it by hand: everything converted, in a map.
func plain(r *policy.Request) (cedar.EntityMap, cedar.Request) {
	var value func(v any) cedar.Value
	record := func(r policy.Record) cedar.Record {
		m := cedar.RecordMap{}
		for k, v := range r {
			m[cedar.String(k)] = value(v)
		}
		return cedar.NewRecord(m)
	}
	value = func(v any) cedar.Value {
		switch v := v.(type) {
		case string:
			return cedar.String(v)
		case int64:
			return cedar.Long(v)
		case policy.UID:
			return cedarUID(v)
		case policy.Record:
			return record(v)
		case []any:
			var items []cedar.Value
			for _, i := range v {
				items = append(items, value(i))
			}
			return cedar.NewSet(items...)
		}
		panic(v)
	}
	entities := cedar.EntityMap{}
	for _, e := range slices.Concat([]policy.Entity{r.Principal, r.Resource}, r.Others) {
		uid := cedarUID(e.UID)
		if _, ok := entities[uid]; ok {
			continue
		}
		var parents []cedar.EntityUID
		for _, p := range e.Parents {
			parents = append(parents, cedarUID(p))
		}
		tags := cedar.RecordMap{}
		for k, v := range e.Tags {
			tags[cedar.String(k)] = cedar.String(v)
		}
		entities[uid] = cedar.Entity{
			UID: uid, Parents: cedar.NewEntityUIDSet(parents...), Attributes: record(e.Attrs), Tags: cedar.NewRecord(tags),
		}
	}
	return entities, cedar.Request{
		Principal: cedarUID(r.Principal.UID), Action: cedarUID(r.Action), Resource: cedarUID(r.Resource.UID), Context: record(r.Context),
	}
}

func TestDecidesAsCedarDoesOnRandomWorlds(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	tally := map[policy.Reason]int{}
	for round := range 400 {
		w := &world{Rand: rand.New(rand.NewPCG(seed, uint64(round))), wide: round%4 == 0}
		text := w.policies(1 + w.IntN(120))
		e, err := compile([]File{{Name: "world.cedar", Text: []byte(text)}}, nil, false, cedarName)
		if err != nil {
			t.Fatalf("seed %d, round %d: %v", seed, round, err)
		}
		set, err := cedar.NewPolicySetFromBytes("world.cedar", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for range 25 {
			r := w.request()
			entities, asked := plain(r)
			decision, diag := cedar.Authorize(set, entities, asked)
			var want, got struct {
				Permit          bool
				Reasons, Errors []string
			}
			want.Permit = bool(decision)
			for _, x := range diag.Reasons {
				want.Reasons = append(want.Reasons, string(x.PolicyID))
			}
			for _, x := range diag.Errors {
				want.Errors = append(want.Errors, string(x.PolicyID)+x.Message)
			}
			verdict, x, err := e.Decide(t.Context(), r)
			if err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
			got.Permit = verdict == policy.Permit
			for _, p := range x.Deciding {
				got.Reasons = append(got.Reasons, p.ID)
			}
			for _, f := range x.Failures {
				got.Errors = append(got.Errors, f.Policy.ID+f.Error)
			}
			for _, l := range [][]string{want.Reasons, want.Errors, got.Reasons, got.Errors} {
				slices.Sort(l)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("seed %d, round %d: -cedar +ours\n%s\n%+v\n%s", seed, round, diff, r, text)
			}
			checkNearest(t, e, r, x)
			tally[x.Reason]++
		}
	}
	t.Log(tally)
	for _, reason := range []policy.Reason{policy.ReasonPermit, policy.ReasonForbid, policy.ReasonDefault} {
		if tally[reason] < 100 {
			t.Errorf("only %d answers of %s: the generator has grown lopsided", tally[reason], reason)
		}
	}
}

// checkNearest holds what a default deny says of near misses: permits only, few, each with a reason, and none of a policy
// that another explanation already has.
func checkNearest(t *testing.T, e *Engine, r *policy.Request, x policy.Explanation) {
	t.Helper()
	if x.Reason != policy.ReasonDefault && len(x.Nearest) > 0 || len(x.Nearest) > maxNearest {
		t.Fatalf("%s with %d near misses", x.Reason, len(x.Nearest))
	}
	seen := map[string]bool{}
	for _, m := range x.Nearest {
		if m.Policy.Effect != policy.EffectPermit || len(m.Why) == 0 || seen[m.Policy.ID] {
			t.Fatalf("near miss %+v of %+v", m, r)
		}
		seen[m.Policy.ID] = true
	}
}

// A permit whose scope matches is a nearer miss than any other, and the index must find those that miss by one part.
func TestNearMissesAreNearest(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	for round := range 300 {
		w := &world{Rand: rand.New(rand.NewPCG(seed, uint64(round)))}
		text := w.policies(1 + w.IntN(8))
		e, err := compile([]File{{Name: "world.cedar", Text: []byte(text)}}, nil, false, cedarName)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			r := w.request()
			_, x, err := e.Decide(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			if x.Reason != policy.ReasonDefault {
				continue
			}
			said := newMentions()
			q, err := ask(r, nil, &said)
			if err != nil {
				t.Fatal(err)
			}
			faults := map[string]int{} // of each permit: how many parts of its scope are amiss
			atMostOne := 0
			for i := range e.policies {
				p := &e.policies[i]
				if p.ref.Effect != policy.EffectPermit || emptyActions(p) {
					continue
				}
				n := len(scopeFaults(p.ast, q))
				faults[p.ref.ID] = n
				if n <= 1 {
					atMostOne++
				}
			}
			if len(x.Nearest) < min(atMostOne, maxNearest) {
				t.Fatalf("seed %d, round %d: %d near misses, %d permits miss by a part or less\n%+v\n%s", seed, round, len(x.Nearest), atMostOne, r, text)
			}
			for i := 1; i < len(x.Nearest); i++ {
				if faults[x.Nearest[i-1].Policy.ID] > faults[x.Nearest[i].Policy.ID] {
					t.Fatalf("seed %d, round %d: %+v before %+v", seed, round, x.Nearest[i-1], x.Nearest[i])
				}
			}
		}
	}
}

func emptyActions(p *compiled) bool {
	return strings.Contains(string(p.policy.MarshalCedar()), "action in []")
}
