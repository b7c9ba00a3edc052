package eval_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

func facts(t testing.TB, pairs ...any) identity.FactSet {
	t.Helper()
	var fs []identity.Fact
	for i := 0; i < len(pairs); i += 2 {
		fs = append(fs, identity.Fact{Name: pairs[i].(string), Value: pairs[i+1], Source: identity.FromKernel})
	}
	s, err := identity.NewFactSet(fs...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func orders(t testing.TB) identity.FactSet {
	t.Helper()
	return facts(t,
		identity.FactService, "orders", identity.FactInstance, "w-1", identity.FactPrivileged, false, identity.FactHow, "run",
		identity.FactMachine, "m1", identity.FactUID, int64(1000), identity.FactGID, int64(100), identity.FactExePath, "/usr/bin/orders",
		identity.FactExeSHA256, strings.Repeat("ab", 32), identity.FactCgroup, "/redoubt/w-1", identity.FactUnit, "orders.service",
		identity.FactParents, []string{"/bin/sh", "/sbin/init"}, identity.FactContainerID, strings.Repeat("cd", 32),
		identity.FactEngine, "podman", identity.FactImage, "example.org/orders:1", identity.FactImageDigest, "sha256:11",
		identity.FactQuarantined, true, identity.FactListen, []string{"8080/http"}, identity.FactProcess, "412:1", identity.FactName, "Orders",
		"label.app", "orders", "label.a.b/c", "dotted", "container.label.app", "image", "risk.score", int64(7), "strange.new.fact", "x",
	)
}

func TestPredicatesMatchFacts(t *testing.T) {
	t.Parallel()
	record := eval.FactsRecord(orders(t))
	for expr, want := range map[string]bool{
		`context.service == "orders" && context has container`:                                 true,
		`context.workload.service == "orders" && context.instance == "w-1"`:                    true,
		`context has executable.sha256 && context.executable.path like "/usr/*"`:               true,
		`context.uid == 0 || context.unix.gid == 100 // a comment`:                             true,
		`context.label.app == "orders" && context.label["a.b/c"] == "dotted"`:                  true,
		`context.container.label.app == "orders"`:                                              false,
		`context.container.label.app == "image" && context.machine.id == "m1"`:                 true,
		`context.process.parents.contains("/sbin/init") && !context.process.parents.isEmpty()`: true,
		`context.quarantined`:                                           true,
		`!(context.privileged) && !context.risk.quarantined`:            false,
		`if context has unit then context.unit == "x" else true`:        false,
		`[context.how, "z"].containsAny(["run"])`:                       true,
		`{"a": context.uid} == {a: 1000}`:                               true,
		`context == {}`:                                                 false,
		`ip("10.0.0.1").isInRange(ip("10.0.0.0/8")) && context.uid > 9`: true,
		"true\n":               true,
		`"};" == "}; permit("`: false,
	} {
		p, err := eval.CompilePredicate(expr)
		if err != nil {
			t.Errorf("%s: %v", expr, err)
			continue
		}
		if got, err := p.Match(record); err != nil || got != want || p.String() != expr {
			t.Errorf("%s: got %v, %v", expr, got, err)
		}
	}
}

func TestPredicatesThatSpeakOfAbsentFactsFail(t *testing.T) {
	t.Parallel()
	for expr, says := range map[string]string{
		`context.service == "orders"`:        "service",
		`context.uid`:                        "uid",
		`context has label && context.label`: "bool",
	} {
		p, err := eval.CompilePredicate(expr)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.Match(policy.Record{"label": policy.Record{"a": "b"}})
		if e := refusal.As(err); got || e == nil || e.Code != "predicate-failed" || !strings.Contains(e.Why, says) || e.Do == "" {
			t.Errorf("%s: got %v, %v", expr, got, err)
		}
	}
}

func TestAPredicateIsOneExpressionOverContext(t *testing.T) {
	t.Parallel()
	long := "true" + strings.Repeat(" ", 8<<10)
	for name, expr := range map[string]string{
		"empty":                  "",
		"blank":                  " // nothing",
		"a second policy":        `true };permit(principal,action,resource) when {true`,
		"a forbid":               `true }; forbid(principal,action,resource) when { true`,
		"a second condition":     `true } when { true`,
		"an unless":              `true } unless { false`,
		"an end":                 `true };`,
		"a comment over the end": `true /*`,
		"an open string":         `"`,
		"a statement":            `true; true`,
		"two expressions":        `true true`,
		"unbalanced":             `(true`,
		"principal":              `principal == context.x`,
		"action":                 `context.x == action`,
		"resource":               `resource has x`,
		"an entity":              `context.machine == Machine::"m1"`,
		"in":                     `context.machine in context.x`,
		"is":                     `context.machine is Machine`,
		"a tag":                  `context.machine.hasTag("x")`,
		"a number":               `1 + context.uid`,
		"text":                   `"yes"`,
		"a set":                  `[true]`,
		"a record":               `{a: true}`,
		"context":                `context`,
		"a number of two":        `context.a && 1`,
		"a branch":               `if true then 1 else true`,
		"an address":             `ip("10.0.0.1")`,
		"a negative":             `!-context.x`,
		"a template":             `context.x == ?principal`,
		"no function":            `evil("x")`,
		"too long":               long,
		"too deep":               strings.Repeat("(", 100) + "true" + strings.Repeat(")", 100),
		"too many links":         strings.Repeat("true||", 700) + "true",
		"invalid UTF-8":          "\"\xff\" == \"\"",
		"NUL":                    "true \x00",
	} {
		p, err := eval.CompilePredicate(expr)
		e := refusal.As(err)
		if p != nil || e == nil || e.Code != "malformed-predicate" || e.Do == "" || strings.Contains(e.Error(), "\n") || len(e.Error()) > 1000 {
			t.Errorf("%s: got %v, %v", name, p, err)
		}
	}
}

func TestPredicateErrorsSayWhere(t *testing.T) {
	t.Parallel()
	_, err := eval.CompilePredicate("context.x ==\n  == ==")
	if e := refusal.As(err); e == nil || !strings.Contains(e.Why, "expression:2:") {
		t.Errorf("got %v", err)
	}
}

func FuzzCompilePredicate(f *testing.F) {
	f.Add(`context.service == "orders" && context has container.image`)
	f.Add(`true };permit(principal,action,resource) when {true`)
	f.Add(`if context.uid > 1 then [1].contains(context.uid) else context.label["a"] like "*\*"`)
	f.Add(`{"\u{0}": -9223372036854775808}["a"] == datetime("2024-01-01")`)
	record := eval.FactsRecord(orders(f))
	f.Fuzz(func(t *testing.T, expr string) {
		p, err := eval.CompilePredicate(expr)
		if err != nil {
			if refusal.As(err) == nil {
				t.Fatal(err)
			}
			return
		}
		if _, err := p.Match(record); err != nil && refusal.As(err) == nil {
			t.Fatal(err)
		}
		// Whatever was accepted is one expression: put into a policy, it makes one policy with one condition.
		e, err := eval.Compile([]eval.File{file("p", "permit(principal is Service, action, resource) when { false && (\n"+expr+"\n) };")})
		if err == nil && len(e.Policies()) != 1 {
			t.Fatalf("%q made %d policies", expr, len(e.Policies()))
		}
	})
}

func TestFactsBecomeOneRecord(t *testing.T) {
	t.Parallel()
	got := eval.FactsRecord(facts(t,
		"workload.service", "orders", "label.a.b", "c", "label.a", "d", "container.label.x.y", "z", "container.id", "1",
		"a", int64(1), "a.b", "deep", "a.b.c", true, "list", []string{"x"}, "unit", "a fact of that name", "systemd.unit", "u",
		"v", "short", "v.value", "named value",
	))
	want := policy.Record{
		"workload": policy.Record{"service": "orders"}, "service": "orders",
		"label":     policy.Record{"a": "d", "a.b": "c"},
		"container": policy.Record{"id": "1", "label": policy.Record{"x.y": "z"}},
		"a":         policy.Record{"value": int64(1), "b": policy.Record{"value": "deep", "c": true}},
		"list":      []any{"x"}, "unit": "a fact of that name", "systemd": policy.Record{"unit": "u"},
		"v": policy.Record{"value": "named value"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if diff := cmp.Diff(policy.Record{}, eval.FactsRecord(identity.FactSet{})); diff != "" {
		t.Error(diff)
	}
}

// A label that a container image brought along never passes for one of the operator's.
func TestImageLabelsAreNoLabels(t *testing.T) {
	t.Parallel()
	s := facts(t, "container.label.app", "evil", "container.label.env", "prod", "label.app", "good", "label.container.label.env", "operator")
	e := eval.WorkloadEntity(identity.ID{}, s)
	if diff := cmp.Diff(map[string]string{"app": "good", "container.label.app": "evil", "container.label.env": "operator"}, e.Tags); diff != "" {
		t.Error(diff)
	}
	r := eval.FactsRecord(s)
	if diff := cmp.Diff(policy.Record{"app": "good", "container.label.env": "operator"}, r["label"]); diff != "" {
		t.Error(diff)
	}
}

func TestAWorkloadIsAsItsFactsAre(t *testing.T) {
	t.Parallel()
	id, err := identity.ParseID("spiffe://example.org/service/orders")
	if err != nil {
		t.Fatal(err)
	}
	got := eval.WorkloadEntity(id, orders(t))
	want := policy.Entity{
		UID: policy.UID{Type: "Workload", ID: "spiffe://example.org/service/orders"},
		Parents: []policy.UID{
			{Type: "Service", ID: "orders"}, {Type: "Machine", ID: "m1"}, {Type: "Image", ID: "sha256:11"},
		},
		Attrs: policy.Record{
			"identity": "spiffe://example.org/service/orders", "instance": "w-1", "service": "orders",
			"machine": policy.UID{Type: "Machine", ID: "m1"}, "how": "run", "description": "Orders", "uid": int64(1000), "gid": int64(100),
			"executable": policy.Record{"path": "/usr/bin/orders", "sha256": strings.Repeat("ab", 32)},
			"ancestry":   []any{"/bin/sh", "/sbin/init"}, "process": "412:1", "cgroup": "/redoubt/w-1", "unit": "orders.service",
			"container": policy.Record{
				"id": strings.Repeat("cd", 32), "engine": "podman", "image": "example.org/orders:1", "digest": "sha256:11",
			},
			"listens": []any{"8080/http"}, "privileged": false, "quarantined": true, "riskScore": int64(7),
		},
		Tags: map[string]string{"app": "orders", "a.b/c": "dotted", "container.label.app": "image"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	// Facts that came as JSON, or with a value of another type, never make a request that does not fit the schema.
	var again identity.FactSet
	text, err := json.Marshal(orders(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &again); err != nil {
		t.Fatal(err)
	}
	wrong := facts(t, identity.FactUID, "root", identity.FactQuarantined, "yes", identity.FactService, int64(1), identity.FactExePath, true, identity.FactListen, "x")
	e := engine(t, `permit(principal, action, resource);`)
	for _, s := range []identity.FactSet{orders(t), again, wrong, {}} {
		for _, id := range []identity.ID{id, {}} {
			r := shopRequest()
			r.Principal = eval.WorkloadEntity(id, s)
			if verdict, x, err := e.Decide(t.Context(), r); err != nil || verdict != policy.Permit {
				t.Errorf("%s %+v %v", verdict, x, err)
			}
		}
	}
	if got := eval.WorkloadEntity(identity.ID{}, orders(t)); got.UID.ID != "w-1" || got.Attrs["identity"] != nil {
		t.Errorf("without an identity: %+v", got.UID)
	}
	if got := eval.WorkloadEntity(identity.ID{}, wrong); len(got.Attrs) != 0 {
		t.Errorf("facts of the wrong type: %+v", got.Attrs)
	}
}
