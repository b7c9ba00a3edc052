package eval_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

const shop = `
@id("shop-reads")
permit(principal in Service::"shop", action == Net::Action::"connect", resource == Service::"orders")
when { context has port && context.port == 8080 }
unless { principal has privileged && principal.privileged };

@id("machines")
permit(principal is Machine, action in [Net::Action::"connect", Net::Action::"listen"], resource is Address in Address::"lan");

@id("quarantine")
forbid(principal is Workload, action, resource) when { principal has quarantined && principal.quarantined };
`

func shopRequest() *policy.Request {
	return &policy.Request{
		Principal: policy.Entity{
			UID:     policy.UID{Type: "Workload", ID: "spiffe://example.org/service/shop"},
			Parents: []policy.UID{{Type: "Service", ID: "shop"}, {Type: "Machine", ID: "m1"}},
			Attrs:   policy.Record{"uid": int64(1000)},
		},
		Action:   policy.Action(policy.Net, "connect"),
		Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "orders"}},
		Context:  policy.Record{"port": int64(8080)},
	}
}

func engine(t testing.TB, text string) *eval.Engine {
	t.Helper()
	e, err := eval.Compile([]eval.File{file("shop.cedar", text)})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestDecisionsAreExplained(t *testing.T) {
	t.Parallel()
	ref := func(id string, e policy.Effect) policy.Ref { return policy.Ref{ID: id, File: "shop.cedar", Effect: e} }
	reads, quarantine := ref("shop-reads", policy.EffectPermit), ref("quarantine", policy.EffectForbid)
	const nobody = `no policy permits Net::Action::"connect" to Service::"%s" for Workload::"spiffe://example.org/service/shop"`
	for _, c := range []struct {
		name    string
		change  func(*policy.Request)
		verdict policy.Verdict
		want    policy.Explanation
	}{
		{
			"permit", func(*policy.Request) {}, policy.Permit,
			policy.Explanation{Reason: policy.ReasonPermit, Summary: "permitted by shop-reads", Deciding: []policy.Ref{reads}},
		},
		{
			"forbid", func(r *policy.Request) { r.Principal.Attrs["quarantined"] = true }, policy.Deny,
			policy.Explanation{Reason: policy.ReasonForbid, Summary: "forbidden by quarantine", Deciding: []policy.Ref{quarantine}},
		},
		{
			"when", func(r *policy.Request) { r.Context["port"] = int64(22) }, policy.Deny,
			policy.Explanation{
				Reason: policy.ReasonDefault, Summary: fmt.Sprintf(nobody, "orders"),
				Nearest: []policy.Miss{{Policy: reads, Why: []string{"condition 1 (`when`) is false: context.port == 8080"}}},
			},
		},
		{
			"when and unless", func(r *policy.Request) {
				r.Context = nil
				r.Principal.Attrs["privileged"] = true
			}, policy.Deny,
			policy.Explanation{
				Reason: policy.ReasonDefault, Summary: fmt.Sprintf(nobody, "orders"),
				Nearest: []policy.Miss{{Policy: reads, Why: []string{
					"condition 1 (`when`) is false: context has port",
					"condition 2 (`unless`) is true: principal has privileged && principal.privileged",
				}}},
			},
		},
		{
			"resource", func(r *policy.Request) { r.Resource.UID.ID = "payments" }, policy.Deny,
			policy.Explanation{
				Reason: policy.ReasonDefault, Summary: fmt.Sprintf(nobody, "payments"),
				Nearest: []policy.Miss{{Policy: reads, Why: []string{`resource is Service::"payments", the policy names Service::"orders"`}}},
			},
		},
		{
			"action", func(r *policy.Request) { r.Action = policy.Action(policy.Net, "listen") }, policy.Deny,
			policy.Explanation{
				Reason:  policy.ReasonDefault,
				Summary: `no policy permits Net::Action::"listen" to Service::"orders" for Workload::"spiffe://example.org/service/shop"`,
				Nearest: []policy.Miss{{Policy: reads, Why: []string{`action is Net::Action::"listen", the policy names Net::Action::"connect"`}}},
			},
		},
		{
			"principal", func(r *policy.Request) { r.Principal.Parents = nil }, policy.Deny,
			policy.Explanation{
				Reason: policy.ReasonDefault, Summary: fmt.Sprintf(nobody, "orders"),
				Nearest: []policy.Miss{{Policy: reads, Why: []string{`principal is Workload::"spiffe://example.org/service/shop", which is not in Service::"shop"`}}},
			},
		},
		{
			"nothing near", func(r *policy.Request) {
				r.Action, r.Context = policy.Action(policy.Run, "exec"), nil
				r.Resource.UID = policy.UID{Type: "File", ID: "/bin/sh\x1b[31m"}
			}, policy.Deny,
			policy.Explanation{
				Reason:  policy.ReasonDefault,
				Summary: `no policy permits Run::Action::"exec" to File::"/bin/sh\u{1b}[31m" for Workload::"spiffe://example.org/service/shop"`,
				Nearest: []policy.Miss{},
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := shopRequest()
			c.change(r)
			verdict, got, err := engine(t, shop).Decide(t.Context(), r)
			if err != nil || verdict != c.verdict {
				t.Fatalf("%s, %v", verdict, err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// A policy that cannot be evaluated does not apply, as Cedar has it; a forbid that cannot is said aloud.
func TestAForbidThatFailsIsReportedLoudly(t *testing.T) {
	t.Parallel()
	e := engine(t, `
@id("all") permit(principal, action, resource);
@id("sum") forbid(principal, action == Net::Action::"connect", resource) when { context has port && context.port + 9223372036854775807 > 0 };
@id("sum2") permit(principal, action == Net::Action::"connect", resource) when { context has port && context.port * 9223372036854775807 > 0 };`)
	verdict, x, err := e.Decide(t.Context(), shopRequest())
	if err != nil || verdict != policy.Permit {
		t.Fatal(verdict, err)
	}
	if len(x.Failures) != 2 || x.Failures[0].Policy.ID != "sum" || !strings.Contains(x.Failures[0].Error, "overflow") {
		t.Errorf("failures: %+v", x.Failures)
	}
	if want := "permitted by all; WARNING: it could not be evaluated whether this is forbidden by sum"; x.Summary != want {
		t.Errorf("summary: %s", x.Summary)
	}
}

func TestRequestsThatDoNotFitTheSchemaAreRefusedByKey(t *testing.T) {
	t.Parallel()
	deep := policy.Record{"x": true}
	for range 20 {
		deep = policy.Record{"x": deep}
	}
	var wide []any
	for range 10_001 {
		wide = append(wide, "x")
	}
	e := engine(t, shop)
	for _, c := range []struct {
		name   string
		change func(*policy.Request)
		key    string
	}{
		{"action", func(r *policy.Request) { r.Action.ID = "conect" }, "action: "},
		{"no action", func(r *policy.Request) { r.Action = policy.UID{} }, "action: "},
		{"principal type", func(r *policy.Request) { r.Principal.UID.Type = "Secret" }, "principal: "},
		{"no principal", func(r *policy.Request) { r.Principal = policy.Entity{} }, "principal: "},
		{"resource type", func(r *policy.Request) { r.Resource.UID.Type = "File" }, "resource: "},
		{"attribute", func(r *policy.Request) { r.Principal.Attrs["quarantine"] = true }, "principal.attrs.quarantine: "},
		{"attribute type", func(r *policy.Request) { r.Principal.Attrs["quarantined"] = "true" }, "principal.attrs.quarantined: it is a string, and the schema wants a bool"},
		{"nested", func(r *policy.Request) {
			r.Principal.Attrs["executable"] = policy.Record{"path": int64(1)}
		}, "principal.attrs.executable.path: it is a whole number"},
		{"int", func(r *policy.Request) { r.Context["port"] = 8080 }, "context.port: a int is no value"},
		{"strings", func(r *policy.Request) { r.Principal.Attrs["listens"] = []string{"a"} }, "principal.attrs.listens: a []string"},
		{"nil", func(r *policy.Request) { r.Context["port"] = nil }, "context.port: "},
		{"in a set", func(r *policy.Request) { r.Principal.Attrs["listens"] = []any{"a", true} }, "principal.attrs.listens[1]: it is a bool"},
		{"no set", func(r *policy.Request) { r.Principal.Attrs["listens"] = "a" }, "principal.attrs.listens: "},
		{"a set", func(r *policy.Request) { r.Context["port"] = []any{} }, "context.port: it is a set"},
		{"a record", func(r *policy.Request) { r.Context["port"] = policy.Record{} }, "context.port: it is a record"},
		{"entity type", func(r *policy.Request) { r.Principal.Attrs["machine"] = policy.UID{Type: "User", ID: "m1"} }, "principal.attrs.machine: it is an entity of type User"},
		{"unknown entity", func(r *policy.Request) { r.Context["machine"] = policy.UID{Type: "Machin", ID: "m1"} }, "context.machine: the schema has no entity type Machin"},
		{"entity for text", func(r *policy.Request) { r.Principal.Attrs["unit"] = policy.UID{Type: "User", ID: "m1"} }, "principal.attrs.unit: "},
		{"address", func(r *policy.Request) { r.Context["source"] = netip.Addr{} }, "context.source: it is no valid address"},
		{"mapped range", func(r *policy.Request) { r.Context["source"] = netip.MustParsePrefix("::ffff:10.0.0.0/90") }, "context.source: "},
		{"time", func(r *policy.Request) { r.Context["port"] = time.Now() }, "context.port: it is a time"},
		{"parent", func(r *policy.Request) {
			r.Principal.Parents = append(r.Principal.Parents, policy.UID{Type: "Secret", ID: "x"})
		}, "principal.parents[2]: the schema has no Workload in a Secret"},
		{"tags", func(r *policy.Request) { r.Resource.Tags = map[string]string{"a": "b"} }, "resource.tags: "},
		{"other", func(r *policy.Request) { r.Others = []policy.Entity{{UID: policy.UID{Type: "Usr", ID: "x"}}} }, "others[0].uid: "},
		{"depth", func(r *policy.Request) { r.Principal.Attrs["container"] = deep }, "principal.attrs.container.x: "},
		{"values", func(r *policy.Request) { r.Principal.Attrs["listens"] = wide }, "more than 10000 values"},
		{"bytes", func(r *policy.Request) { r.Principal.Attrs["unit"] = strings.Repeat("x", 1<<20) }, "larger than 1048576 bytes"},
		{"tag bytes", func(r *policy.Request) {
			r.Principal.Tags = map[string]string{"x": strings.Repeat("x", 1<<20)}
		}, "larger than 1048576 bytes"},
		{"entities", func(r *policy.Request) { r.Others = make([]policy.Entity, 999) }, "others: "},
		{"parents", func(r *policy.Request) { r.Principal.Parents = make([]policy.UID, 1_001) }, "principal.parents: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := shopRequest()
			c.change(r)
			verdict, x, err := e.Decide(t.Context(), r)
			f := refusal.As(err)
			if verdict != policy.Deny || x.Reason != policy.ReasonError || f == nil || f.Code != "malformed-request" {
				t.Fatalf("got %s, %+v, %v", verdict, x, err)
			}
			if !strings.Contains(f.Why, c.key) {
				t.Errorf("%q does not say %q", f.Why, c.key)
			}
		})
	}
}

// Without a schema there is nothing that bounds depth but the bound.
func TestPredicatesBoundTheDepthOfFacts(t *testing.T) {
	t.Parallel()
	p, err := eval.CompilePredicate(`context has x`)
	if err != nil {
		t.Fatal(err)
	}
	deep := any(true)
	for range 20 {
		deep = policy.Record{"x": deep}
	}
	sets := any(true)
	for range 20 {
		sets = []any{sets}
	}
	for _, v := range []any{deep, sets} {
		if _, err := p.Match(policy.Record{"x": v}); refusal.As(err) == nil || refusal.As(err).Code != "malformed-request" {
			t.Errorf("got %v", err)
		}
	}
}

// An IPv4 address within IPv6, as a socket that listens on both reports it, is in the ranges of IPv4 of a policy.
func TestMappedAddressesAreTheAddressesTheyAre(t *testing.T) {
	t.Parallel()
	e := engine(t, `
permit(principal, action == Net::Action::"connect", resource);
forbid(principal, action == Net::Action::"connect", resource) when { context has source && context.source.isInRange(ip("10.0.0.0/8")) };`)
	for _, source := range []any{
		netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("::ffff:10.1.2.3"),
		netip.MustParsePrefix("::ffff:10.1.0.0/112"), netip.MustParsePrefix("10.1.0.0/16"),
	} {
		r := shopRequest()
		r.Context["source"] = source
		if verdict, x, err := e.Decide(t.Context(), r); err != nil || verdict != policy.Deny {
			t.Errorf("%v: %s %+v %v", source, verdict, x, err)
		}
	}
	r := shopRequest()
	r.Context["source"] = netip.MustParseAddr("fe80::1%eth0")
	if verdict, x, err := e.Decide(t.Context(), r); err != nil || verdict != policy.Permit {
		t.Errorf("with a zone: %s %+v %v", verdict, x, err)
	}
}

func TestEveryKindOfValueIsConverted(t *testing.T) {
	t.Parallel()
	e := engine(t, `@id("all") permit(principal is Session, action == Access::Action::"login", resource is Machine) when {
  context has now && context.now < datetime("2031-01-01T00:00:00Z") && context.now.toDate() == datetime("2030-01-02") &&
  context has source && context.source == ip("192.0.2.7") && context has approvals && context.approvals.contains(User::"ann") &&
  context has user && context.user has scopes && context.user.scopes.containsAll(["a", "b"]) &&
  context has seconds && context.seconds == 60 && principal has user && principal.user in Group::"ops" &&
  principal in Role::"admin" && resource.hasTag("env") && resource.getTag("env") == "prod" && resource in Group::"web" &&
  resource has quarantined && !resource.quarantined };`)
	r := &policy.Request{
		Principal: policy.Entity{
			UID: policy.UID{Type: "Session", ID: "s-1"}, Parents: []policy.UID{{Type: "Role", ID: "operator"}},
			Attrs: policy.Record{"user": policy.UID{Type: "User", ID: "ann"}},
		},
		Action: policy.Action(policy.Access, "login"),
		Resource: policy.Entity{
			UID: policy.UID{Type: "Machine", ID: "m1"}, Parents: []policy.UID{{Type: "Group", ID: "web"}},
			Attrs: policy.Record{"quarantined": false}, Tags: map[string]string{"env": "prod"},
		},
		Context: policy.Record{
			"now": time.Date(2030, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600)), "source": netip.MustParseAddr("192.0.2.7"),
			"approvals": []any{policy.UID{Type: "User", ID: "ann"}}, "seconds": int64(60),
			"user": policy.Record{"scopes": []any{"b", "a", "c"}},
		},
		Others: []policy.Entity{
			{UID: policy.UID{Type: "User", ID: "ann"}, Parents: []policy.UID{{Type: "Group", ID: "ops"}}},
			{UID: policy.UID{Type: "Role", ID: "operator"}, Parents: []policy.UID{{Type: "Role", ID: "admin"}}},
			// Of two with one UID the first counts, and the principal before all.
			{UID: policy.UID{Type: "User", ID: "ann"}},
			{UID: policy.UID{Type: "Session", ID: "s-1"}},
		},
	}
	for i := range 8 { // once with few entities, and again with many
		verdict, x, err := e.Decide(t.Context(), r)
		if err != nil || verdict != policy.Permit {
			t.Fatalf("%s %+v %v", verdict, x, err)
		}
		r.Others = append(r.Others, policy.Entity{UID: policy.UID{Type: "User", ID: fmt.Sprint(i)}})
	}
}

func TestDecideEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	verdict, x, err := engine(t, shop).Decide(ctx, shopRequest())
	if verdict != policy.Deny || x.Reason != policy.ReasonError || !errors.Is(err, context.Canceled) {
		t.Errorf("%s %+v %v", verdict, x, err)
	}
}

func TestAnEngineIsSafeForManyGoroutines(t *testing.T) {
	t.Parallel()
	e := engine(t, shop)
	var wait sync.WaitGroup
	for i := range 8 {
		wait.Go(func() {
			r := shopRequest()
			want := policy.Permit
			if i%2 == 1 {
				r.Resource.UID.ID, want = "payments", policy.Deny
			}
			for range 300 {
				if verdict, x, err := e.Decide(context.Background(), r); err != nil || verdict != want ||
					want == policy.Permit && x.Deciding[0].ID != "shop-reads" || want == policy.Deny && x.Nearest[0].Policy.ID != "shop-reads" {
					t.Errorf("%s %+v %v", verdict, x, err)
					return
				}
			}
		})
	}
	wait.Wait()
}

// The cost of a permit does not grow with the policies that cannot match, and does not creep up unseen.
func TestAllocationsOfADecision(t *testing.T) {
	if racing {
		t.Skip("the race detector allocates on its own")
	}
	var last float64
	for _, n := range []int{10, 1_000} {
		e, err := eval.Compile([]eval.File{{Name: "fleet.cedar", Text: fleetPolicies(n)}})
		if err != nil {
			t.Fatal(err)
		}
		r := fleetRequest(n / 2)
		got := testing.AllocsPerRun(200, func() {
			if verdict, _, err := e.Decide(t.Context(), r); verdict != policy.Permit || err != nil {
				t.Fatal(verdict, err)
			}
		})
		if got > 42 {
			t.Errorf("%d policies: %v allocations a decision, at most 42 are meant", n, got)
		}
		if last != 0 && got != last {
			t.Errorf("%v allocations at %d policies, %v at fewer", got, n, last)
		}
		last = got
	}
}
