package story_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/policy"
)

// A set that nobody confirms returns by itself, on the server and on every machine.
func TestUnconfirmedSetReturns(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.shell(t, "orders").fetch(t)
	first := d.apply(t, shop)
	m1.policySet(t, first)
	other := map[string]string{"shop.cedar": strings.Replace(shop["shop.cedar"], `"payments"`, `"ledger"`, 1), "shop.yaml": shop["shop.yaml"]}
	out := must(t, d.cli("apply", "-f", policies(t, other), "--confirm-within", "2s")...)
	contains(t, "apply", out, fmt.Sprintf("policy set %d is in force until", first+1), "redoubt confirm")
	eventually(t, 30*time.Second, "the former set is back on the machine", func() (bool, string) {
		got := m1.askLocal(t, "orders", "payments")
		return got.Allowed() && got.Edition > first+1, fmt.Sprintf("%s by set %d", got.Verdict, got.Edition)
	})
	if got := m1.askLocal(t, "orders", "ledger"); got.Allowed() {
		t.Errorf("the set that was not confirmed still permits, by set %d", got.Edition)
	}
	contains(t, "editions", must(t, d.cli("get", "editions")...), "returned")
	refused(t, 1, []string{"confirm"}, d.cli("confirm")...)

	// One that is confirmed stays.
	must(t, d.cli("apply", "-f", policies(t, other), "--confirm-within", "2s")...)
	must(t, d.cli("confirm")...)
	time.Sleep(2500 * time.Millisecond) // past its time
	if got := m1.askLocal(t, "orders", "ledger"); !got.Allowed() {
		t.Errorf("the confirmed set is gone: %s by set %d", got.Verdict, got.Edition)
	}
	// An unconfirmed one returns although the server was down when its time came.
	must(t, d.cli("apply", "-f", policies(t, shop), "--confirm-within", "2s")...)
	d.server.kill()
	time.Sleep(2 * time.Second)
	d.start(t)
	m1.connected(t)
	eventually(t, 30*time.Second, "the confirmed set is back", func() (bool, string) {
		got := m1.askLocal(t, "orders", "ledger")
		return got.Allowed(), fmt.Sprintf("%s by set %d", got.Verdict, got.Edition)
	})
}

// The panic switch lets everything through, says what would have been refused, and ends by itself.
func TestObserveEndsByItself(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.shell(t, "orders").fetch(t)
	m1.policySet(t, d.apply(t, shop))
	if got := m1.askLocal(t, "orders", "ledger"); got.Allowed() {
		t.Fatalf("before: %s in %s", got.Verdict, got.Mode)
	}
	contains(t, "observe", must(t, d.cli("observe", "--for", "service=orders", "--expires", "4s", "--note", "drill")...), "until")
	eventually(t, 4*time.Second, "the machine observes", func() (bool, string) {
		got := m1.askLocal(t, "orders", "ledger")
		return got.WouldDeny() && got.Mode == policy.Observe, fmt.Sprintf("%s in %s", got.Verdict, got.Mode)
	})
	d.server.kill() // the end needs no server
	eventually(t, 30*time.Second, "it ends by itself", func() (bool, string) {
		got := m1.askLocal(t, "orders", "ledger")
		return !got.Allowed() && got.Mode == policy.Enforce, fmt.Sprintf("%s in %s", got.Verdict, got.Mode)
	})
	d.start(t)
	m1.connected(t)
	contains(t, "the audit log", d.auditLog(t), `"drill"`, "service")
}

// A quarantine is a fact of the workload wherever decisions are made, at once.
func TestQuarantineReachesTheMachine(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	orders.fetch(t)
	m1.policySet(t, d.apply(t, shop))
	if got := m1.askLocal(t, "orders", "payments"); !got.Allowed() {
		t.Fatalf("before: %s: %s", got.Verdict, got.Explanation.Summary)
	}
	type withdrawal struct{ ID string }
	q := document[withdrawal](t, d.cli("quarantine", orders.instance, "--reason", "it beacons")...)
	began := time.Now()
	var got policy.Decision
	eventually(t, 5*time.Second, "the machine refuses", func() (bool, string) {
		got = m1.askLocal(t, "orders", "payments")
		return !got.Allowed(), got.Explanation.Summary
	})
	t.Logf("in force on the machine within %s of the answer", time.Since(began).Round(time.Millisecond))
	if got.Explanation.Reason != policy.ReasonForbid || len(got.Explanation.Deciding) != 1 || got.Explanation.Deciding[0].ID != "no-quarantined" {
		t.Errorf("refused by %+v", got.Explanation)
	}
	if f, ok := got.Request.Facts.Get("risk.quarantined"); !ok || f.Value != true {
		t.Errorf("the decision's facts have no risk.quarantined: %+v", got.Request.Facts.All())
	}
	contains(t, "why", must(t, m1.cli("why", string(got.ID))...), "risk.quarantined = true", "(server", "no-quarantined")
	contains(t, "the audit log", d.auditLog(t), "quarantine.create", orders.instance, "it beacons", q.ID)
	must(t, d.cli("quarantine", "--lift", q.ID)...)
	eventually(t, 5*time.Second, "it is lifted", func() (bool, string) {
		got := m1.askLocal(t, "orders", "payments")
		return got.Allowed(), got.Explanation.Summary
	})
}

// A machine that is revoked is cut off at once, and stays so after a restart; the others notice nothing.
func TestRevokedMachineIsCutOff(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1, m2 := d.join(t, "m1"), d.join(t, "m2")
	w := m1.shell(t, "orders")
	w.fetch(t)
	m1.connected(t)
	must(t, d.cli("revoke", "m1", "--reason", "stolen")...)
	began := time.Now()
	m1.role.says(t, "not connected", "revoked")
	t.Logf("cut off within %s of the answer", time.Since(began).Round(time.Millisecond))
	contains(t, "the audit log", d.auditLog(t), "revocation.create", "stolen")
	late := m1.shell(t, "late")
	if got, why := late.tryFetch(t); why == "" {
		t.Errorf("a revoked machine got %+v", got)
	}
	m1.role.kill()
	m1.start(t)
	m1.role.says(t, "not connected", "revoked")
	if m1.doctor(t).Connection.Connected {
		t.Error("it is connected again")
	}
	contains(t, "machines", lineWith(must(t, d.cli("get", "machines")...), "m1"), "revoked")
	m2.connected(t)
	m2.shell(t, "payments").fetch(t)

	// An identity that is revoked is served no longer either.
	p := m2.shell(t, "doomed")
	p.fetch(t)
	must(t, d.cli("revoke", "spiffe://redoubt.local/service/doomed", "--reason", "leaked")...)
	eventually(t, 5*time.Second, "its SVID is withheld", func() (bool, string) {
		got, why := p.tryFetch(t)
		return strings.Contains(why, "revoked") && strings.Contains(why, "leaked"), got.ID + why
	})
}

// Every decision is explained by its id, wherever it was made.
func TestWhyExplainsDecisions(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.shell(t, "orders", "--label", "tier=gold").fetch(t)
	version := d.apply(t, shop)
	m1.policySet(t, version)
	for _, c := range []struct {
		to      string
		verdict policy.Verdict
		says    []string
	}{
		{"payments", policy.Permit, []string{"PERMIT (permitted)", `decided by permit "orders-to-payments" in shop.cedar`}},
		{"ledger", policy.Deny, []string{"DENY (no-permit)", `nearest    permit "orders-to-payments"`, "ledger"}},
	} {
		r := redoubt(t, d.cli("ask", "Workload:orders", "Net::connect", "Service:"+c.to, "--context", `{"port": 8443}`)...)
		id := strings.TrimSpace(strings.TrimPrefix(lineWith(r.out, "decision "), "decision"))
		if !strings.HasPrefix(id, "d-") || (r.code == 0) != (c.verdict == policy.Permit) {
			t.Fatalf("ask: exit code %d\n%s%s", r.code, r.out, r.err)
		}
		says := append([]string{
			id, fmt.Sprintf("policy set %d", version), "spiffe://redoubt.local/service/orders", `in Service::"orders"`, "label tier = gold",
			"fact workload.service = orders  (operator, epoch", "fact unix.uid", "(kernel", "fact machine.id = m1  (server", `Net::Action::"connect"`,
		}, c.says...)
		contains(t, "why, of the server", must(t, d.cli("why", id)...), append(says, "at server", "context    port = 8443")...)

		local := m1.askLocal(t, "orders", c.to)
		says[0] = string(local.ID)
		contains(t, "why, of the agent", must(t, m1.cli("why", string(local.ID))...), append(says, "at m1, point agent")...)
		eventually(t, 20*time.Second, "the server knows it too", func() (bool, string) {
			r := redoubt(t, d.cli("why", string(local.ID))...)
			return r.code == 0 && strings.Contains(r.out, "at m1, point agent"), r.out + r.err
		})
	}
	refused(t, 1, []string{"decision"}, d.cli("why", "d-00000000000000000000000000")...)
}
