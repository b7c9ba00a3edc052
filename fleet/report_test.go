package fleet_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestReportAssignsIdentitiesAndPushesThem(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	o := w.observed("w-1", "orders", fact("unix.uid", int64(1000), identity.FromKernel))
	o.Listen = []fleet.Listen{{Port: 8080, Protocol: "http", Address: "10.0.0.1"}}
	nobody := fleet.Observed{Instance: "w-2", Facts: facts(t, fact("unix.uid", int64(1), identity.FromKernel))}
	broken := w.observed("w-3", "broken")
	a := w.report("m1", fleet.Report{Present: []fleet.Observed{o, nobody, broken}})
	if a[0].ID.String() != "spiffe://example.org/service/orders" || a[0].Refusal != nil || string(a[0].Issuance) != `{"winner":"services"}` {
		t.Errorf("assigned %+v", a[0])
	}
	if a[1].Refusal == nil || a[1].Refusal.Code != "no-issuance-rule" || !a[1].ID.IsZero() {
		t.Errorf("assigned %+v", a[1])
	}
	if a[2].Refusal == nil || a[2].Refusal.Code != fleet.ErrIssuance.Code {
		t.Errorf("assigned %+v", a[2])
	}
	live := w.live()
	if len(live) != 2 || live["endpoint/w-1/8080"] == "" {
		t.Errorf("live %v", live)
	}
	var id fleet.Identity
	if err := json.Unmarshal([]byte(live["identity/w-1"]), &id); err != nil || id.Machine != "m1" || id.Service != "orders" || id.Facts.Text(identity.FactMachine) != "m1" {
		t.Errorf("pushed %+v, %v", id, err)
	}
	// The same again pushes nothing.
	before := w.fleet.Revision()
	w.report("m1", fleet.Report{Present: []fleet.Observed{o, nobody}, Gone: []string{"w-unknown"}})
	if w.fleet.Revision() != before {
		t.Error("a report of what is known made changes")
	}
	endpoints, next, err := w.fleet.Endpoints(t.Context(), fleet.WorkloadQuery{Service: "orders"})
	if err != nil || next != "" || len(endpoints) != 1 || endpoints[0].Port != 8080 || endpoints[0].Machine != "m1" {
		t.Errorf("endpoints %+v %q %v", endpoints, next, err)
	}
	// A full report that leaves it out ends it, and with it its endpoint.
	w.report("m1", fleet.Report{Full: true, Present: []fleet.Observed{nobody}})
	if live := w.live(); len(live) != 0 {
		t.Errorf("live after the end: %v", live)
	}
	if got, err := w.fleet.Workload(t.Context(), "w-1"); err != nil || got.State != fleet.WorkloadGone {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestAnAgentCannotStateWhatOnlyTheServerMay(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	a := w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed(
		"w-1", "orders",
		fact(identity.FactMachine, "m2", identity.FromKernel), // the server's name, another source
		fact(identity.FactInstance, "w-9", identity.FromOperator),
		fact(identity.FactQuarantined, false, identity.FromKernel),
		fact("risk.score", int64(0), identity.FromOperator),
		fact("label.tier", "gold", identity.FromServer), // the server's source, another name
		fact("label.good", "yes", "vendor"),             // a source that is none
		fact("label.app", "orders", identity.FromOperator),
	)}})
	got := a[0].Facts
	if got.Text(identity.FactMachine) != "m1" || got.Text(identity.FactInstance) != "w-1" || got.Text("label.app") != "orders" {
		t.Errorf("facts %+v", got.All())
	}
	for _, name := range []string{identity.FactQuarantined, "risk.score", "label.tier", "label.good"} {
		if f, ok := got.Get(name); ok {
			t.Errorf("the agent stated %+v", f)
		}
	}
	for _, f := range got.All() {
		if f.Source == identity.FromServer && f.Name != identity.FactMachine && f.Name != identity.FactInstance {
			t.Errorf("server fact from an agent: %+v", f)
		}
	}
	if n := w.meter.get("fleet_facts_dropped"); n != 6 {
		t.Errorf("%d dropped facts counted", n)
	}
}

func TestAnAgentCannotTakeAnotherMachinesWorkload(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.join("m2")
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})

	// It asks for its identity,
	_, err := w.fleet.SignX509(t.Context(), "m2", "w-1", newKey(t).csr)
	want(t, err, fleet.ErrWorkloadForeign)
	_, err = w.fleet.SignJWT(t.Context(), "m2", "w-1", []string{"db"})
	want(t, err, fleet.ErrWorkloadForeign)
	// claims that it is there,
	a := w.report("m2", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})
	if a[0].Refusal == nil || a[0].Refusal.Code != fleet.ErrWorkloadForeign.Code || !a[0].ID.IsZero() {
		t.Errorf("assigned %+v", a[0])
	}
	// and says that it is gone.
	w.report("m2", fleet.Report{Gone: []string{"w-1"}})
	w.report("m2", fleet.Report{Full: true})
	got, err := w.fleet.Workload(t.Context(), "w-1")
	if err != nil || got.Machine != "m1" || got.State != fleet.WorkloadPresent {
		t.Errorf("workload %+v, %v", got, err)
	}
	if n := w.meter.get("fleet_foreign_workload"); n != 3 {
		t.Errorf("counted %d", n)
	}
	if n := w.records("workload.foreign"); n != 1 { // once a minute, lest it be flooded
		t.Errorf("%d audit records", n)
	}
	w.clock.add(time.Minute)
	_, err = w.fleet.SignX509(t.Context(), "m2", "w-1", newKey(t).csr)
	want(t, err, fleet.ErrWorkloadForeign)
	if n := w.records("workload.foreign"); n != 2 {
		t.Errorf("%d audit records", n)
	}
	w.run()
	eventually(t, "the attempts are events", func() bool {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Kind: "workload.foreign", Machine: fleet.ServerMachine})
		return err == nil && len(list) == 4
	})
}

func TestSigning(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.report("m1", fleet.Report{Present: []fleet.Observed{
		w.observed("w-1", "orders"),
		{Instance: "w-2", Facts: facts(t, fact("unix.uid", int64(1), identity.FromKernel))},
	}})
	k := newKey(t)
	chain, err := w.fleet.SignX509(t.Context(), "m1", "w-1", k.csr)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.IDFromCertificate(chain[0]); err != nil || id.String() != "spiffe://example.org/service/orders" {
		t.Errorf("identity %v, %v", id, err)
	}
	if life := chain[0].NotAfter.Sub(w.clock.now()); life > 61*time.Minute {
		t.Errorf("an SVID of a workload lives %s", life)
	}
	svid, err := w.fleet.SignJWT(t.Context(), "m1", "w-1", []string{"db"})
	if err != nil {
		t.Fatal(err)
	}
	if claims, err := ca.VerifyJWT(w.ca.Bundle(), svid.Token, "db", w.clock.now()); err != nil || claims == nil {
		t.Errorf("token: %v", err)
	}
	sign := func(instance string, csr []byte) error {
		_, err := w.fleet.SignX509(t.Context(), "m1", instance, csr)
		return err
	}
	want(t, sign("w-9", k.csr), fleet.ErrWorkloadUnknown)
	want(t, sign("w-2", k.csr), errNoRule)
	want(t, sign("w-1", []byte{1}), ca.ErrMalformedCSR)
	for _, audience := range [][]string{nil, {""}, {strings.Repeat("a", 257)}, make([]string, 17)} {
		_, err := w.fleet.SignJWT(t.Context(), "m1", "w-1", audience)
		want(t, err, ca.ErrAudience)
	}
	w.report("m1", fleet.Report{Gone: []string{"w-1"}})
	want(t, sign("w-1", k.csr), fleet.ErrWorkloadGone)
	_, err = w.fleet.SignJWT(t.Context(), "m1", "w-1", []string{"db"})
	want(t, err, fleet.ErrWorkloadGone)
}

func TestNoRuleGivesAReservedIdentity(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	for _, path := range []string{
		"/machine/%s", "/machine", "/redoubt/server", "/redoubt", "/server", "spiffe://other.org/service/orders", "spiffe://example.org",
	} {
		w.rules.path = path
		a := w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})
		if a[0].Refusal == nil || a[0].Refusal.Code != fleet.ErrReserved.Code {
			t.Errorf("%s: assigned %+v", path, a[0])
		}
		if _, err := w.fleet.SignX509(t.Context(), "m1", "w-1", newKey(t).csr); !errors.Is(err, fleet.ErrReserved) {
			t.Errorf("%s: signed: %v", path, err)
		}
	}
	w.rules.path = "/machines/%s" // is not reserved
	if a := w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}}); a[0].Refusal != nil {
		t.Errorf("assigned %+v", a[0])
	}
}

func TestEpochsRise(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	report := func(uid int64, labels ...string) fleet.Assigned {
		list := []identity.Fact{fact("unix.uid", uid, identity.FromKernel)}
		for _, l := range labels {
			list = append(list, identity.Fact{Name: "label." + l, Value: "x", Source: identity.FromOperator, Epoch: 999}) // an agent's epochs mean nothing
		}
		return w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders", list...)}})[0]
	}
	epoch := func(a fleet.Assigned, name string) uint64 {
		f, ok := a.Facts.Get(name)
		if !ok {
			t.Errorf("no fact %s", name)
		}
		return f.Epoch
	}
	a := report(1, "a")
	b := report(1, "a")
	if a.Epoch != 1 || b.Epoch != 1 || epoch(b, "label.a") != 1 {
		t.Errorf("epochs %d, %d", a.Epoch, b.Epoch)
	}
	c := report(2, "a")
	if c.Epoch != 2 || epoch(c, "unix.uid") != 2 || epoch(c, "label.a") != 1 {
		t.Errorf("after a change: %+v", c)
	}
	d := report(2) // a fact goes,
	e := report(2, "a")
	if d.Epoch != 3 || e.Epoch != 4 || epoch(e, "label.a") != 4 { // and comes back above where it was
		t.Errorf("epochs %d, %d", d.Epoch, e.Epoch)
	}
	w.report("m1", fleet.Report{Gone: []string{"w-1"}})
	if f := report(3); f.Epoch != 5 {
		t.Errorf("epoch %d after it came back", f.Epoch)
	}
}

func TestReportBounds(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.MaxWorkloads = 3 })
	w.join("m1")
	code := func(o fleet.Observed) string {
		t.Helper()
		a := w.report("m1", fleet.Report{Present: []fleet.Observed{o}})
		if a[0].Refusal == nil {
			return ""
		}
		return a[0].Refusal.Code
	}
	var many []identity.Fact
	for i := range fleet.MaxFacts {
		many = append(many, fact(fmt.Sprintf("label.l%d", i), "x", identity.FromOperator))
	}
	var large []identity.Fact
	for i := range 20 {
		large = append(large, fact(fmt.Sprintf("label.l%d", i), strings.Repeat("x", 4096), identity.FromOperator))
	}
	if got := code(w.observed("w-many", "orders", many...)); got != fleet.ErrWorkloadFacts.Code {
		t.Errorf("too many facts: %q", got)
	}
	if got := code(w.observed("w-large", "orders", large...)); got != fleet.ErrWorkloadFacts.Code {
		t.Errorf("too large facts: %q", got)
	}
	for _, instance := range []string{"", "w-", "x-1", "w-A", "w-" + strings.Repeat("a", 63), "w-a/b", "w-\x00"} {
		if got := code(w.observed(instance, "orders")); got != fleet.ErrReport.Code {
			t.Errorf("instance %q: %q", instance, got)
		}
	}
	for _, l := range [][]fleet.Listen{
		{{Port: 0, Protocol: "http"}},
		{{Port: 1, Protocol: ""}},
		{{Port: 1, Protocol: "HTTP"}},
		{{Port: 1, Protocol: "http"}, {Port: 1, Protocol: "tcp"}},
		{{Port: 1, Protocol: "http", Address: "localhost"}},
		{{Port: 1, Protocol: "http", Netns: "net:[1]"}},
		make([]fleet.Listen, fleet.MaxListen+1),
	} {
		o := w.observed("w-listen", "orders")
		o.Listen = l
		if got := code(o); got != fleet.ErrReport.Code {
			t.Errorf("listen %+v: %q", l, got)
		}
	}
	for i := range 3 {
		if got := code(w.observed(fmt.Sprintf("w-%d", i), "orders")); got != "" {
			t.Errorf("w-%d: %q", i, got)
		}
	}
	if got := code(w.observed("w-3", "orders")); got != fleet.ErrWorkloads.Code {
		t.Errorf("one too many: %q", got)
	}
	w.report("m1", fleet.Report{Gone: []string{"w-1"}})
	if got := code(w.observed("w-3", "orders")); got != "" {
		t.Errorf("what is gone must make room: %q", got)
	}
	_, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Gone: make([]string, 7)})
	want(t, err, fleet.ErrReport)
	for _, c := range []*refusal.Error{fleet.ErrWorkloadFacts, fleet.ErrReport, fleet.ErrWorkloads} {
		if w.meter.get("fleet_workloads_refused code "+c.Code) == 0 {
			t.Errorf("%s was not counted", c.Code)
		}
	}
}

func TestANewPolicySetIsPushedAndEveryWorkloadReevaluated(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	const n = 450 // more than two pages
	var r fleet.Report
	for i := range n {
		r.Present = append(r.Present, w.observed(fmt.Sprintf("w-%03d", i), "orders"))
	}
	w.report("m1", r)
	w.run()
	eventually(t, "policy set and bundle are published", func() bool {
		live := w.live()
		return live["policy_set/current"] != "" && live["bundle/example.org"] != ""
	})
	before := w.fleet.Revision()
	w.rules.set("/v2/%s")
	eventually(t, "all have the new identity", func() bool {
		list, err := w.fleet.Workloads(t.Context(), fleet.WorkloadQuery{ID: "spiffe://example.org/v2/orders"})
		return err == nil && len(list) == n && list[0].Epoch == 2
	})
	changes, err := w.fleet.Changes(t.Context(), before, 1000)
	at := slices.IndexFunc(changes, func(c fleet.Change) bool { return c.Kind == fleet.KindPolicySet })
	if err != nil || len(changes) != n+1 || at < 0 {
		t.Fatalf("%d changes, %v", len(changes), err)
	}
	var set fleet.PolicySet
	if err := json.Unmarshal(changes[at].Payload, &set); err != nil || set.Version != 1 || len(set.Files) != 1 {
		t.Errorf("policy set %+v, %v", set, err)
	}
	// A server that comes back publishes nothing anew.
	revision := w.fleet.Revision()
	w.open()
	w.run()
	time.Sleep(50 * time.Millisecond)
	if w.fleet.Revision() != revision {
		t.Error("a restart made changes")
	}
}

func TestWhatOneMachineAddsToTheDomainIsBounded(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.MaxBytes = 100 << 10 })
	w.join("m1")
	w.join("m2")
	large := func(instance string, n int) fleet.Observed {
		return w.observed(instance, "orders", fact("label.a", strings.Repeat("x", n), identity.FromOperator))
	}
	var r fleet.Report
	for i := range 50 {
		r.Present = append(r.Present, large(fmt.Sprintf("w-%02d", i), 4000))
	}
	refused := 0
	for _, a := range w.report("m1", r) {
		if a.Refusal != nil {
			refused++
			want(t, a.Refusal, fleet.ErrWorkloadBytes)
		}
	}
	if live := len(w.live()); refused < 26 || live != 50-refused || w.meter.get("fleet_workloads_refused code "+fleet.ErrWorkloadBytes.Code) != int64(refused) {
		t.Errorf("%d refused, %d pushed", refused, live)
	}
	// Neither may one that is there grow beyond it, again and again; another machine is not hindered.
	if a := w.report("m1", fleet.Report{Present: []fleet.Observed{large("w-00", 4096), w.observed("w-01", "orders"), large("w-02", 4096)}}); a[1].Refusal != nil || a[2].Refusal != nil {
		t.Errorf("what shrinks makes room: %+v", a)
	}
	if a := w.report("m2", fleet.Report{Present: []fleet.Observed{large("w-m2", 4000)}}); a[0].Refusal != nil {
		t.Errorf("another machine: %v", a[0].Refusal)
	}
	// What is gone makes room.
	w.report("m1", fleet.Report{Full: true})
	for _, a := range w.report("m1", fleet.Report{Present: []fleet.Observed{large("w-new1", 4000), large("w-new2", 4000)}}) {
		if a.Refusal != nil {
			t.Error(a.Refusal)
		}
	}
}
