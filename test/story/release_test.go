package story_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/policy"
)

// eventsOf are the events of one kind that the server has, one line of JSON each.
func (d *domain) eventsOf(t testing.TB, kind string) []string {
	t.Helper()
	out := strings.TrimSpace(must(t, d.cli("events", "--kind", kind, "--limit", "0", "--json")...))
	if out == "" {
		return nil
	}
	return strings.Split(out, "\n")
}

// The break-glass works with the agent running, with the server dead, and with the agent dead; it survives restarts, is
// recorded on the server as soon as that is back, and ends with --resume.
func TestReleaseIsTheBreakGlass(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.shell(t, "orders").fetch(t)
	version := d.apply(t, shop)
	m1.policySet(t, version)
	enforced := func(when string) {
		t.Helper()
		if got := m1.askLocal(t, "orders", "ledger"); got.Allowed() || got.Edition != version {
			t.Fatalf("%s: %s in %s by set %d, want what the policy refuses to be refused", when, got.Verdict, got.Mode, got.Edition)
		}
	}
	lifted := func(when string) {
		t.Helper()
		got := m1.askLocal(t, "orders", "ledger")
		if !got.Allowed() || got.Explanation.Reason != policy.ReasonReleased {
			t.Fatalf("%s: %s, %s in %s, want everything let through", when, got.Verdict, got.Explanation.Reason, got.Mode)
		}
	}
	recorded := func(reason string, releases int) {
		t.Helper()
		eventually(t, 60*time.Second, "the server records the release for "+reason, func() (bool, string) {
			all := d.eventsOf(t, "machine.released")
			return len(all) == releases && strings.Contains(all[0], reason) && strings.Contains(all[0], `"m1"`), fmt.Sprint(all)
		})
	}
	enforced("at first")
	refused(t, 1, []string{"not released"}, m1.cli("release", "--resume")...)

	out := must(t, m1.cli("release", "--reason", "agent runs")...)
	contains(t, "release", out, "released as rl-", "redoubt release --resume", "stays:")
	lifted("agent running")
	contains(t, "doctor", must(t, m1.cli("doctor")...), "RELEASED by", "--resume")
	recorded("agent runs", 1)
	must(t, m1.cli("release", "--resume")...)
	enforced("resumed")

	d.server.kill()
	must(t, m1.cli("release", "--reason", "server is dead")...)
	lifted("server dead")
	m1.role.kill()
	m1.start(t)
	lifted("server dead, agent started again")
	d.start(t)
	m1.connected(t)
	recorded("server is dead", 2)
	must(t, m1.cli("release", "--resume")...)
	enforced("resumed again")

	m1.role.kill()
	must(t, m1.cli("release", "--reason", "agent is dead")...)
	m1.start(t)
	lifted("agent dead")
	m1.connected(t)
	recorded("agent is dead", 3)
	m1.role.kill()
	must(t, m1.cli("release", "--resume")...)
	m1.start(t)
	m1.connected(t)
	enforced("resumed without the agent")
	eventually(t, 30*time.Second, "every end is recorded", func() (bool, string) {
		all := d.eventsOf(t, "machine.resumed")
		return len(all) == 3, fmt.Sprint(all)
	})
	// Nobody releases a machine that has no agent.
	refused(t, 1, []string{"no agent was ever started"}, "release", "--data", t.TempDir())
}
