package story_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
)

// protection is what the agent says of one workload's confinement.
func (a *node) protection(t testing.TB, instance string) policy.Protection {
	t.Helper()
	for _, p := range a.doctor(t).Protections {
		if p.Workload == instance && p.Name == machine.Confinement {
			return p
		}
	}
	return policy.Protection{}
}

// A workload cannot leave its cgroup; a privileged one can, and is never called anything else than not enforceable.
func TestEscapeInBothForms(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	root := unified(t)
	escape := "echo 0 > " + filepath.Join(root, "cgroup.procs")
	where := func(w *workload) string { t.Helper(); return cgroupOf(t, w.pid) }

	plain := m1.shell(t, "plain")
	if uid := uidOf(t, plain.pid); uid == 0 {
		t.Error("a workload runs as uid 0")
	}
	out, code := plain.sh(t, escape)
	if code == 0 {
		t.Errorf("a workload wrote into the root's cgroup.procs: %s", out)
	}
	out, _ = plain.sh(t, "mkdir -p /tmp/e && mount -t cgroup2 none /tmp/e; rmdir /tmp/e; "+program.redoubt+" demo attack leave-cgroup")
	contains(t, "the attack from within", out, `"got":"refused"`)
	if got := where(plain); got != plain.cgroup || !strings.HasPrefix(got, m1.cgroups+"/") {
		t.Errorf("it is in %s, was put into %s", got, plain.cgroup)
	}
	eventually(t, 30*time.Second, "its confinement is proved", func() (bool, string) {
		p := m1.protection(t, plain.instance)
		raw, _ := json.Marshal(p)
		return p.State == policy.Enforced && !p.Proved.IsZero(), string(raw)
	})

	rooted := m1.shell(t, "rooted", "--privileged", "--user", "root")
	eventually(t, 20*time.Second, "redoubt run --privileged says so", func() (bool, string) {
		said := rooted.said.String()
		return strings.Contains(said, "not enforceable: privileged workload"), said
	})
	if p := m1.protection(t, rooted.instance); p.State != policy.NotEnforceable || p.Reason != "privileged workload" {
		t.Errorf("doctor says of a privileged workload: %+v", p)
	}
	contains(t, "doctor", must(t, m1.cli("doctor")...), "privileged workload")
	if out, code := rooted.sh(t, escape); code != 0 {
		t.Fatalf("root could not leave its cgroup: then it need not be called unenforceable: %s", out)
	}
	if got := where(rooted); got != "/" {
		t.Errorf("it is in %s", got)
	}
	// Out of its cgroup it has no identity any more.
	if got, why := rooted.tryFetch(t); why == "" {
		t.Errorf("outside of its cgroup it got %+v", got)
	}
	// Without --privileged nobody runs as root, and the server hears the truth.
	refused(t, 1, []string{"uid 0", "--privileged", "not enforceable"}, m1.cli("run", "--service", "x", "--user", "root", "--", "true")...)
	eventually(t, 30*time.Second, "GET /v1/protections says so", func() (bool, string) {
		out := must(t, d.cli("get", "protections")...)
		return strings.Contains(out, "enforced") && strings.Contains(out, "m1"), out
	})
}
