package set_test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// workload returns the workload of a service on machine m1.
func workload(service string, tags map[string]string) policy.Entity {
	return policy.Entity{
		UID:     policy.UID{Type: "Workload", ID: "spiffe://example.org/service/" + service},
		Parents: []policy.UID{{Type: "Service", ID: service}, {Type: "Machine", ID: "m1"}},
		Tags:    tags,
	}
}

func entity(kind, id string, parents ...policy.UID) policy.Entity {
	return policy.Entity{UID: policy.UID{Type: kind, ID: id}, Parents: parents}
}

func connect(from, to policy.Entity) *policy.Request {
	return &policy.Request{Principal: from, Action: policy.Action(policy.Net, "connect"), Resource: to, Point: "test"}
}

// administer returns a management call of an operation in a section.
func administer(who policy.Entity, section string) *policy.Request {
	operation := entity("Operation", "do-"+section, policy.UID{Type: "Operation", ID: section}, policy.UID{Type: "Api", ID: "redoubt"})
	return &policy.Request{Principal: who, Action: policy.Action(policy.Access, "administer"), Resource: operation}
}

func operator() policy.Entity {
	return entity("User", set.LocalOperator, policy.UID{Type: "Group", ID: set.OperatorsGroup})
}

func decide(t testing.TB, s *set.Set, r *policy.Request, opts set.DecideOptions) *policy.Decision {
	t.Helper()
	if opts.Machine == "" {
		opts.Machine = "m1"
	}
	d := s.Decide(t.Context(), r, opts)
	if d.ID == "" || d.Time.IsZero() || d.Verdict == "" || d.Mode == "" || d.Explanation.Reason == "" || d.Explanation.Summary == "" || d.Machine != opts.Machine || d.Edition != opts.Edition {
		t.Errorf("an incomplete decision: %+v", d)
	}
	return d
}

func wantDecision(t testing.TB, d *policy.Decision, v policy.Verdict, m policy.Mode, r policy.Reason) {
	t.Helper()
	if d.Verdict != v || d.Mode != m || d.Explanation.Reason != r {
		t.Errorf("got %s, %s, %s, want %s, %s, %s: %s", d.Verdict, d.Mode, d.Explanation.Reason, v, m, r, d.Explanation.Summary)
	}
}

func mode(name, selector, namespaces, mode string) string {
	return "---\nkind: Mode\nname: " + name + "\nspec: {for: " + selector + ", namespaces: " + namespaces + ", mode: " + mode + "}\n"
}

const enforceAll = "---\nkind: Mode\nname: all\nspec: {for: {all: true}, namespaces: [Run, Net, Api], mode: enforce}\n"

func TestDefaultModes(t *testing.T) {
	s := mustParse(t)
	exec := &policy.Request{Principal: workload("orders", nil), Action: policy.Action(policy.Run, "exec"), Resource: entity("File", "/bin/sh")}
	call := &policy.Request{Principal: workload("orders", nil), Action: policy.Action(policy.API, "call"), Resource: entity("Service", "stock")}
	for _, r := range []*policy.Request{exec, call, connect(workload("orders", nil), entity("Service", "stock"))} {
		d := decide(t, s, r, set.DecideOptions{Edition: 3})
		wantDecision(t, d, policy.Deny, policy.Observe, policy.ReasonDefault)
		if !d.Allowed() || !d.WouldDeny() {
			t.Errorf("%s must go through and be recorded", r.Action)
		}
	}
	wantDecision(t, decide(t, s, administer(entity("User", "ann"), "machine"), set.DecideOptions{}), policy.Deny, policy.Enforce, policy.ReasonDefault)
	wantDecision(t, decide(t, s, administer(operator(), "machine"), set.DecideOptions{}), policy.Permit, policy.Enforce, policy.ReasonPermit)
}

func TestTheMostSpecificModeWins(t *testing.T) {
	live := map[string]string{"stage": "live"}
	for name, c := range map[string]struct {
		modes string
		want  policy.Mode
		by    string
	}{
		"none":                          {"", policy.Observe, "default"},
		"all":                           {mode("a", "{all: true}", "[Net]", "enforce"), policy.Enforce, "Mode/a"},
		"another namespace":             {mode("a", "{all: true}", "[Run, Api]", "enforce"), policy.Observe, "default"},
		"service over all":              {mode("a", "{all: true}", "[Net]", "enforce") + mode("b", "{service: orders}", "[Net]", "observe"), policy.Observe, "Mode/b"},
		"more properties over fewer":    {mode("a", "{service: orders}", "[Net]", "observe") + mode("b", "{service: orders, machine: m1}", "[Net]", "enforce"), policy.Enforce, "Mode/b"},
		"labels count one by one":       {mode("a", "{service: orders, machine: m1}", "[Net]", "observe") + mode("b", "{service: orders, machine: m1, labels: {stage: live}}", "[Net]", "enforce"), policy.Enforce, "Mode/b"},
		"of equals, enforce":            {mode("a", "{machine: m1}", "[Net]", "observe") + mode("b", "{service: orders}", "[Net]", "enforce"), policy.Enforce, "Mode/b"},
		"another service":               {mode("a", "{service: carts}", "[Net]", "enforce"), policy.Observe, "default"},
		"another label":                 {mode("a", "{labels: {stage: test}}", "[Net]", "enforce"), policy.Observe, "default"},
		"one label of two":              {mode("a", "{labels: {stage: live, x: y}}", "[Net]", "enforce"), policy.Observe, "default"},
		"the side acted on":             {mode("a", "{service: stock}", "[Net]", "enforce"), policy.Enforce, "Mode/a"},
		"the workload behind a service": {mode("a", "{labels: {tier: data}}", "[Net]", "enforce"), policy.Enforce, "Mode/a"},
		"an ancestor's parent":          {mode("a", "{machine: m9}", "[Net]", "enforce"), policy.Enforce, "Mode/a"},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustParse(t, yml(c.modes))
			r := connect(workload("orders", live), entity("Service", "stock"))
			r.Others = []policy.Entity{entity("Service", "stock", policy.UID{Type: "Machine", ID: "m9"})}
			r.Resource.Parents = r.Others[0].Parents
			opts := set.DecideOptions{Workloads: []policy.Entity{workload("stock", map[string]string{"tier": "data"})}}
			m, by := s.ModeOf(r, opts)
			if m != c.want || by != c.by {
				t.Errorf("got %s by %s, want %s by %s", m, by, c.want, c.by)
			}
			wantDecision(t, decide(t, s, r, opts), policy.Deny, c.want, policy.ReasonDefault)
		})
	}
}

func TestOverridesObserveUntilTheyExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustParse(t, yml(enforceAll))
		r := connect(workload("orders", nil), entity("Service", "stock"))
		orders := set.Override{ID: "o-1", Selector: set.Selector{Service: "orders"}, Expires: time.Now().Add(time.Hour)}
		carts := set.Override{ID: "o-2", Selector: set.Selector{Service: "carts"}, Expires: time.Now().Add(time.Hour)}
		wantDecision(t, decide(t, s, r, set.DecideOptions{Overrides: []set.Override{carts}}), policy.Deny, policy.Enforce, policy.ReasonDefault)
		opts := set.DecideOptions{Overrides: []set.Override{carts, orders}}
		wantDecision(t, decide(t, s, r, opts), policy.Deny, policy.Observe, policy.ReasonDefault)
		if _, by := s.ModeOf(r, opts); by != "Override/o-1" {
			t.Errorf("by %s", by)
		}
		time.Sleep(time.Hour - time.Nanosecond)
		wantDecision(t, decide(t, s, r, opts), policy.Deny, policy.Observe, policy.ReasonDefault)
		time.Sleep(time.Nanosecond)
		wantDecision(t, decide(t, s, r, opts), policy.Deny, policy.Enforce, policy.ReasonDefault)
	})
}

// TestAccessIsNeverObserved fails if the rule that keeps Access in enforce is deleted: neither an override nor a release
// opens the management API or a login.
func TestAccessIsNeverObserved(t *testing.T) {
	s := mustParse(t)
	all := set.DecideOptions{Released: true, Overrides: []set.Override{{ID: "o-1", Selector: set.Selector{All: true}, Expires: time.Now().Add(time.Hour)}}}
	login := &policy.Request{Principal: entity("User", "ann"), Action: policy.Action(policy.Access, "login"), Resource: entity("Machine", "m1")}
	for _, r := range []*policy.Request{administer(entity("User", "ann"), "policy-set"), login} {
		d := decide(t, s, r, all)
		wantDecision(t, d, policy.Deny, policy.Enforce, policy.ReasonDefault)
		if d.Allowed() {
			t.Errorf("%s went through", r.Action)
		}
	}
	unknown := &policy.Request{Principal: entity("User", "ann"), Action: policy.Action("Other", "do"), Resource: entity("Machine", "m1")}
	wantDecision(t, decide(t, s, unknown, all), policy.Deny, policy.Enforce, policy.ReasonError)
}

func TestAReleasedMachineLetsEverythingThroughAndRecordsIt(t *testing.T) {
	s := mustParse(t, yml(enforceAll), cedarFile(`@id("no") forbid(principal, action == Net::Action::"connect", resource);`))
	d := decide(t, s, connect(workload("orders", nil), entity("Service", "stock")), set.DecideOptions{Released: true})
	wantDecision(t, d, policy.Permit, policy.Observe, policy.ReasonReleased)
	if !strings.Contains(d.Explanation.Summary, "this machine is released; it would have been refused: forbidden by no") {
		t.Error(d.Explanation.Summary)
	}
	bad := connect(policy.Entity{}, entity("Service", "stock"))
	wantDecision(t, decide(t, s, bad, set.DecideOptions{Released: true}), policy.Permit, policy.Observe, policy.ReasonReleased)
}

func TestAnEngineThatCannotDecideDenies(t *testing.T) {
	bad := connect(workload("orders", nil), entity("Service", "stock"))
	bad.Context = policy.Record{"unheard": "of"}
	d := decide(t, mustParse(t, yml(enforceAll)), bad, set.DecideOptions{})
	wantDecision(t, d, policy.Deny, policy.Enforce, policy.ReasonError)
	if !strings.Contains(d.Explanation.Summary, "context.unheard") {
		t.Error(d.Explanation.Summary)
	}
	if d = decide(t, mustParse(t), bad, set.DecideOptions{}); !d.WouldDeny() {
		t.Errorf("in observe it must go through and be recorded: %+v", d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d = mustParse(t, yml(enforceAll)).Decide(ctx, connect(workload("orders", nil), entity("Service", "stock")), set.DecideOptions{})
	wantDecision(t, d, policy.Deny, policy.Enforce, policy.ReasonError)
}

func TestNeverTouch(t *testing.T) {
	const broad = `@id("lockdown") forbid(principal, action == Net::Action::"connect", resource);`
	sshd, stock := entity("Service", "sshd"), entity("Service", "stock")
	user := workload("orders", nil)
	daemon := func(service, machine string) policy.Entity {
		e := workload(service, nil)
		e.Parents[1].ID = machine
		return e
	}
	grouped := entity("Service", "sshd", policy.UID{Type: "Group", ID: "remote"})
	for name, c := range map[string]struct {
		cedar string
		r     *policy.Request
		v     policy.Verdict
		why   policy.Reason
	}{
		"default deny, to it":            {"", connect(user, sshd), policy.Permit, policy.ReasonNeverTouch},
		"default deny, by it":            {"", connect(daemon("dns", "m1"), stock), policy.Permit, policy.ReasonNeverTouch},
		"default deny, of others":        {"", connect(user, stock), policy.Deny, policy.ReasonDefault},
		"a broad forbid, to it":          {broad, connect(user, sshd), policy.Permit, policy.ReasonNeverTouch},
		"a broad forbid, by it":          {broad, connect(daemon("ntp", "m1"), stock), policy.Permit, policy.ReasonNeverTouch},
		"a broad forbid, to an instance": {broad, connect(user, daemon("redoubt-agent", "m2")), policy.Permit, policy.ReasonNeverTouch},
		"a broad forbid, of others":      {broad, connect(user, stock), policy.Deny, policy.ReasonForbid},
		"named by ==":                    {`@id("n") forbid(principal, action, resource == Service::"sshd");`, connect(user, sshd), policy.Deny, policy.ReasonForbid},
		"named by in":                    {`@id("n") forbid(principal in Service::"dns", action, resource);`, connect(daemon("dns", "m1"), stock), policy.Deny, policy.ReasonForbid},
		"named beside a broad one":       {broad + `@id("n") forbid(principal, action, resource in Service::"sshd");`, connect(user, sshd), policy.Deny, policy.ReasonForbid},
		"named in a condition only":      {`@id("n") forbid(principal, action == Net::Action::"connect", resource) when { resource == Service::"sshd" };`, connect(user, sshd), policy.Permit, policy.ReasonNeverTouch},
		"named through a group only":     {`@id("n") forbid(principal, action, resource in Group::"remote");`, connect(user, grouped), policy.Permit, policy.ReasonNeverTouch},
		"another of the list is named":   {`@id("n") forbid(principal, action, resource == Service::"ntp");` + broad, connect(user, sshd), policy.Permit, policy.ReasonNeverTouch},
		"named, but it does not apply":   {`@id("n") forbid(principal == Workload::"x", action, resource == Service::"sshd");` + broad, connect(user, sshd), policy.Permit, policy.ReasonNeverTouch},
		"by it, from another machine":    {"", connect(daemon("dns", "m2"), stock), policy.Deny, policy.ReasonDefault},
		"by one that calls itself sshd":  {broad, connect(daemon("sshd", "m2"), stock), policy.Deny, policy.ReasonForbid},
		"permitted":                      {`@id("y") permit(principal, action, resource == Service::"sshd");`, connect(user, sshd), policy.Permit, policy.ReasonPermit},
		"an engine that cannot decide": {"", func() *policy.Request {
			r := connect(user, sshd)
			r.Context = policy.Record{"unheard": "of"}
			return r
		}(), policy.Permit, policy.ReasonNeverTouch},
		"calls to it": {"", &policy.Request{Principal: user, Action: policy.Action(policy.API, "call"), Resource: sshd}, policy.Deny, policy.ReasonDefault},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustParse(t, yml(enforceAll), cedarFile(c.cedar))
			d := decide(t, s, c.r, set.DecideOptions{})
			wantDecision(t, d, c.v, policy.Enforce, c.why)
		})
	}
	for _, uid := range set.NeverTouch() {
		s := mustParse(t, yml(enforceAll), cedarFile(broad))
		wantDecision(t, decide(t, s, connect(user, policy.Entity{UID: uid}), set.DecideOptions{}), policy.Permit, policy.Enforce, policy.ReasonNeverTouch)
	}
	s := mustParse(t, yml(enforceAll))
	opts := set.DecideOptions{Workloads: []policy.Entity{workload("sshd", nil)}}
	wantDecision(t, decide(t, s, connect(user, stock), opts), policy.Deny, policy.Enforce, policy.ReasonDefault)
	open := &policy.Request{Principal: user, Action: policy.Action(policy.Access, "open"), Resource: sshd}
	wantDecision(t, decide(t, s, open, set.DecideOptions{}), policy.Deny, policy.Enforce, policy.ReasonDefault)
}

// TestTheLocalOperatorCannotBeLockedOut fails if the un-lock rule is deleted.
func TestTheLocalOperatorCannotBeLockedOut(t *testing.T) {
	s := mustParse(t, yml(enforceAll), cedarFile(`@id("nobody") forbid(principal, action, resource);`))
	d := decide(t, s, administer(operator(), "policy-set"), set.DecideOptions{Machine: "server"})
	wantDecision(t, d, policy.Permit, policy.Enforce, policy.ReasonPermit)
	if len(d.Explanation.Deciding) != 1 || d.Explanation.Deciding[0].ID != "builtin/unlock" || !strings.Contains(d.Explanation.Summary, "forbidden by nobody") {
		t.Errorf("%+v", d.Explanation)
	}
	federated := operator()
	federated.Attrs = policy.Record{"issuer": "https://idp.example.com"}
	colleague := entity("User", "ann", policy.UID{Type: "Group", ID: set.OperatorsGroup})
	robot := entity("Robot", set.LocalOperator, policy.UID{Type: "Group", ID: set.OperatorsGroup})
	for what, r := range map[string]*policy.Request{
		"another section":               administer(operator(), "machine"),
		"another operator":              administer(colleague, "policy-set"),
		"a login that has the same id":  administer(federated, "policy-set"),
		"a robot that has the same id":  administer(robot, "policy-set"),
		"another action on policy sets": {Principal: operator(), Action: policy.Action(policy.Access, "login"), Resource: entity("Machine", "policy-set")},
	} {
		if d := decide(t, s, r, set.DecideOptions{}); d.Verdict != policy.Deny {
			t.Errorf("%s: %s", what, d.Explanation.Summary)
		}
	}
	bad := administer(operator(), "policy-set")
	bad.Context = policy.Record{"unheard": "of"}
	if d := decide(t, s, bad, set.DecideOptions{}); d.Verdict != policy.Deny {
		t.Error("a request that is no request must not be let in by the un-lock rule")
	}
}

// TestMachinesNeverAdminister fails if the built-in forbid is deleted.
func TestMachinesNeverAdminister(t *testing.T) {
	s := mustParse(t, cedarFile(`@id("open") permit(principal, action, resource);`))
	machine := entity("Machine", "m1", policy.UID{Type: "Group", ID: set.OperatorsGroup})
	wantDecision(t, decide(t, s, administer(machine, "policy-set"), set.DecideOptions{}), policy.Deny, policy.Enforce, policy.ReasonForbid)
	wantDecision(t, decide(t, mustParse(t), administer(machine, "policy-set"), set.DecideOptions{}), policy.Deny, policy.Enforce, policy.ReasonForbid)
}

func TestOperatorsAdminister(t *testing.T) {
	s := mustParse(t)
	group := policy.UID{Type: "Group", ID: set.OperatorsGroup}
	suspended := entity("User", "ann", group)
	suspended.Attrs = policy.Record{"suspended": true}
	for what, c := range map[string]struct {
		who  policy.Entity
		want policy.Verdict
	}{
		"the local operator":    {operator(), policy.Permit},
		"an operator":           {entity("User", "ann", group), policy.Permit},
		"an operator's session": {entity("Session", "s-1", policy.UID{Type: "User", ID: "ann"}, group), policy.Permit},
		"a suspended operator":  {suspended, policy.Deny},
		"somebody":              {entity("User", "bob"), policy.Deny},
		"a workload":            {workload("orders", nil), policy.Deny},
		"a robot in the group":  {entity("Robot", "ci", group), policy.Deny},
	} {
		if d := decide(t, s, administer(c.who, "machine"), set.DecideOptions{}); d.Verdict != c.want {
			t.Errorf("%s: got %s: %s", what, d.Verdict, d.Explanation.Summary)
		}
	}
	restricted := mustParse(t, cedarFile(`@id("r") forbid(principal, action, resource in Operation::"machine");`))
	wantDecision(t, decide(t, restricted, administer(operator(), "machine"), set.DecideOptions{}), policy.Deny, policy.Enforce, policy.ReasonForbid)
}

func TestDeclaresServicesAndAddresses(t *testing.T) {
	s := mustParse(t, yml(enforceAll+`---
kind: Service
name: stock
spec: {groups: [backend], owner: team, endpoints: [{address: a.example, port: 80, protocol: http}]}
---
kind: Service
name: orders
spec: {groups: [frontend]}
---
kind: Address
name: partners
spec: {cidrs: [192.0.2.0/24], names: ["*.example.net", api.example.com], groups: [outside]}
`), cedarFile(`
@id("groups") permit(principal in Group::"frontend", action, resource is Service in Group::"backend") when { resource has owner && resource.owner == "team" && resource has protocols && resource.protocols.contains("http") };
@id("partners") permit(principal in Service::"orders", action, resource in Group::"outside");
@id("external") forbid(principal, action == Net::Action::"connect", resource is Address) when { resource has external && resource.external };
`))
	from := workload("orders", nil)
	named := entity("Address", "198.51.100.1")
	named.Attrs = policy.Record{"name": "API.example.com."}
	said := entity("Address", "192.0.2.9")
	said.Attrs = policy.Record{"external": true}
	owned := entity("Service", "stock")
	owned.Attrs = policy.Record{"owner": "somebody else"}
	attr := entity("Address", "somewhere")
	attr.Attrs = policy.Record{"ip": netip.MustParseAddr("192.0.2.7")}
	for what, c := range map[string]struct {
		to   policy.Entity
		want policy.Verdict
	}{
		"a group of services":          {entity("Service", "stock"), policy.Permit},
		"an instance of one":           {workload("stock", nil), policy.Deny}, // the policy is about services
		"one that the point describes": {owned, policy.Deny},
		"another service":              {entity("Service", "mail"), policy.Deny},
		"an address":                   {entity("Address", "192.0.2.200"), policy.Permit},
		"the same within IPv6":         {entity("Address", "::ffff:192.0.2.200"), policy.Permit},
		"by its attribute":             {attr, policy.Permit},
		"outside of all":               {entity("Address", "203.0.113.1"), policy.Deny},
		"a name below":                 {entity("Address", "x.y.example.net"), policy.Permit},
		"the name itself is not":       {entity("Address", "example.net"), policy.Deny},
		"a name that ends so is not":   {entity("Address", "badexample.net"), policy.Deny},
		"an address by its name":       {named, policy.Permit},
		"what the point said stays":    {said, policy.Deny},
	} {
		r := connect(from, c.to)
		before := slices.Clone(r.Resource.Parents)
		d := decide(t, s, r, set.DecideOptions{})
		if d.Verdict != c.want {
			t.Errorf("%s: got %s: %s", what, d.Verdict, d.Explanation.Summary)
		}
		if !slices.Equal(before, r.Resource.Parents) || r.Others != nil {
			t.Errorf("%s: the caller's request was changed", what)
		}
	}
}
