package set_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy/set"
)

const domain = identity.TrustDomain("example.org")

func facts(t testing.TB, pairs ...any) identity.FactSet {
	t.Helper()
	var list []identity.Fact
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, identity.Fact{Name: pairs[i].(string), Value: pairs[i+1], Source: identity.FromOperator})
	}
	s, err := identity.NewFactSet(list...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func rule(name, when, id string, priority int) string {
	return fmt.Sprintf("---\nkind: IssuanceRule\nname: %s\nspec: {when: '%s', id: '%s', priority: %d}\n", name, when, id, priority)
}

func TestTheBuiltinRuleHoldsUntilASetHasOne(t *testing.T) {
	orders := facts(t, identity.FactService, "orders")
	id, issuance, err := mustParse(t).Issue(domain, orders)
	if err != nil || id.String() != "spiffe://example.org/service/orders" || issuance.Winner != "builtin/service" {
		t.Errorf("%v, %+v, %v", id, issuance, err)
	}
	_, _, err = mustParse(t).Issue(domain, facts(t, identity.FactUID, 7))
	if !errors.Is(err, set.ErrNoIssuanceRule) || !strings.Contains(err.Error(), "the workload has no service") {
		t.Errorf("without a service: %v", err)
	}
	s := mustParse(t, yml(rule("other", "context has nothing", "/x", 0)))
	if _, _, err := s.Issue(domain, orders); !errors.Is(err, set.ErrNoIssuanceRule) {
		t.Errorf("a set with a rule must not have the built-in one: %v", err)
	}
}

func TestIssues(t *testing.T) {
	all := []any{
		identity.FactService, "orders", identity.FactMachine, "m1", identity.FactUID, int64(1000), "label.stage", "live",
		"label.empty", "", "label.dots", "..", "label.slash", "a/b", "label.blank", "a b", "label.word", "achine", "container.label.x", "img",
		identity.FactPrivileged, false, "label.long", strings.Repeat("a", 2040),
	}
	for name, c := range map[string]struct {
		rules string
		want  string
		err   error
		says  string
	}{
		"a service":             {rule("a", "true", "/service/{workload.service}", 0), "/service/orders", nil, ""},
		"several facts":         {rule("a", "true", "/{label.stage}/u{unix.uid}/{workload.service}-x/{container.label.x}", 0), "/live/u1000/orders-x/img", nil, ""},
		"by predicate":          {rule("a", `context.machine.id == "m2"`, "/a", 5) + rule("b", `context.machine.id == "m1"`, "/b", 0), "/b", nil, ""},
		"by priority":           {rule("low", "true", "/low", -1) + rule("high", "true", "/high", 1) + rule("mid", "true", "/mid", 0), "/high", nil, ""},
		"two that agree":        {rule("a", "true", "/service/orders", 0) + rule("b", "true", "/service/{workload.service}", 0), "/service/orders", nil, ""},
		"two that do not":       {rule("a", "true", "/a", 3) + rule("b", "true", "/b", 3) + rule("c", "true", "/c", 2), "", set.ErrAmbiguousIssuance, "the rules a and b, both of priority 3, give different identities"},
		"below the top":         {rule("a", "true", "/a", 3) + rule("b", "true", "/b", 2) + rule("c", "true", "/c", 2), "/a", nil, ""},
		"none":                  {rule("a", "false", "/a", 0) + rule("b", "context.label.none == 1", "/b", 0), "", set.ErrNoIssuanceRule, "none of 2 issuance rules matches"},
		"a missing fact":        {rule("a", "true", "/x/{label.none}", 1) + rule("b", "true", "/b", 0), "", set.ErrIssuanceTemplate, "the rule a matches, but the fact label.none is absent"},
		"an empty fact":         {rule("a", "true", "/x/{label.empty}", 0), "", set.ErrIssuanceTemplate, "the fact label.empty is empty"},
		"an empty fact, padded": {rule("a", "true", "/x/p-{label.empty}", 0), "", set.ErrIssuanceTemplate, "the fact label.empty is empty"},
		"a relative fact":       {rule("a", "true", "/x/{label.dots}", 0), "", set.ErrIssuanceTemplate, "is a relative segment"},
		"a fact with a slash":   {rule("a", "true", "/x/{label.slash}", 0), "", set.ErrIssuanceTemplate, "a character that SPIFFE does not allow"},
		"a fact with a blank":   {rule("a", "true", "/x/{label.blank}", 0), "", set.ErrIssuanceTemplate, "a character that SPIFFE does not allow"},
		"too long":              {rule("a", "true", "/x/{label.long}", 0), "", set.ErrIssuanceTemplate, "longer than 2048 bytes"},
		"a failure at the top":  {rule("a", "true", "/x/{label.none}", 0) + rule("b", "true", "/b", 0), "", set.ErrIssuanceTemplate, "label.none is absent"},
		"a reserved identity":   {rule("a", "true", "/m{label.word}/m1", 0), "", set.ErrReservedIdentity, "one of Redoubt's own"},
		"a reserved segment":    {rule("a", "true", "/{label.stage}/x", 0), "/live/x", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			id, issuance, err := mustParse(t, yml(c.rules)).Issue(domain, facts(t, all...))
			if c.err == nil {
				if err != nil || id.Path() != c.want || id != issuance.ID {
					t.Errorf("got %v, %v, want %s; %+v", id, err, c.want, issuance)
				}
				return
			}
			if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.says) || !id.IsZero() || !issuance.ID.IsZero() {
				t.Errorf("got %v, %v, want %q", id, err, c.says)
			}
			if len(issuance.Rules) != strings.Count(c.rules, "kind:") {
				t.Errorf("the explanation has %d rules", len(issuance.Rules))
			}
		})
	}
}

// TestNoFactMakesARedoubtIdentity fails if the guard at issue time is deleted: a placeholder reaches what no literal may.
func TestNoFactMakesARedoubtIdentity(t *testing.T) {
	s := mustParse(t, yml(rule("a", "true", "/{workload.service}/m1", 0)))
	for _, first := range []string{"machine", "redoubt"} {
		id, _, err := s.Issue(domain, facts(t, identity.FactService, first))
		if !errors.Is(err, set.ErrReservedIdentity) {
			t.Errorf("%s: got %v, %v", first, id, err)
		}
	}
	s = mustParse(t, yml(rule("a", "true", "/{workload.service}", 0)))
	if id, _, err := s.Issue(domain, facts(t, identity.FactService, "machine")); !errors.Is(err, set.ErrReservedIdentity) {
		t.Errorf("bare: got %v, %v", id, err)
	}
}

func TestExplainsRuleByRule(t *testing.T) {
	s := mustParse(t, yml(rule("won", "true", "/a", 2)+rule("lost", "true", "/b", 1)+rule("other", "context.uid == 7", "/c", 3)+rule("absent", "context.label.x == 7", "/d", 3)))
	_, issuance, err := s.Issue(domain, facts(t, identity.FactUID, 8))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]set.RuleOutcome{}
	for _, o := range issuance.Rules {
		got[o.Rule] = o
	}
	if o := got["won"]; !o.Won || !o.Matched || o.Line != 2 || o.File != "set.yaml" {
		t.Errorf("won: %+v", o)
	}
	if o := got["lost"]; o.Won || !o.Matched || !strings.Contains(o.Why, "higher priority") {
		t.Errorf("lost: %+v", o)
	}
	if o := got["other"]; o.Matched || o.Why != "its predicate does not hold" {
		t.Errorf("other: %+v", o)
	}
	if o := got["absent"]; o.Matched || !strings.Contains(o.Why, "could not be evaluated") {
		t.Errorf("absent: %+v", o)
	}
}
