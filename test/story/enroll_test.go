package story_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
)

// running starts a program that Redoubt knows nothing of: a shell that fetches its SVID when it is told to.
func running(t testing.TB, a *node, attr *syscall.SysProcAttr) *workload {
	t.Helper()
	w := &workload{cmd: exec.Command("sh")}
	w.cmd.Env, w.cmd.Stderr, w.cmd.Dir = environment("SPIFFE_ENDPOINT_SOCKET=unix://"+a.socket), &w.said, "/"
	w.cmd.SysProcAttr = attr
	w.open(t)
	pid, _ := w.sh(t, "echo $$")
	_, _ = fmt.Sscan(pid, &w.pid)
	w.cgroup = cgroupOf(t, w.pid)
	return w
}

// What was running before is adopted as it runs: moved into a cgroup of its own if others share its cgroup, left where it is
// if not.
func TestEnrollAdoptsWhatRuns(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	nobody := func() *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}

	// In a cgroup that others are in too, with a child of its own.
	legacy, neighbour := running(t, m1, in(t, nobody(), m1.cgroups+"/shared")), running(t, m1, in(t, nobody(), m1.cgroups+"/shared"))
	_, _ = legacy.sh(t, "sleep 300 & echo started")
	child, _ := legacy.sh(t, "echo $!")
	t.Cleanup(func() { _, _ = legacy.sh(t, "kill "+child) })
	if got, why := legacy.tryFetch(t); why == "" {
		t.Fatalf("before it was enrolled it got %+v", got)
	}
	refused(t, 1, []string{"holds other programs too", "--stay"}, m1.cli("enroll", fmt.Sprint(legacy.pid), "--service", "legacy", "--stay")...)
	got := document[machine.Workload](t, m1.cli("enroll", fmt.Sprint(legacy.pid), "--service", "legacy", "--label", "tier=old")...)
	if got.Moved != 2 || got.How != machine.ByEnroll {
		t.Errorf("enrolled %+v, want it moved with its child", got)
	}
	for _, pid := range []int{legacy.pid, atoi(child)} {
		if now := cgroupOf(t, pid); now != got.Cgroup || !strings.HasPrefix(now, m1.cgroups+"/") {
			t.Errorf("process %d is in %s, want %s", pid, now, got.Cgroup)
		}
	}
	if now := cgroupOf(t, neighbour.pid); now != m1.cgroups+"/shared" {
		t.Errorf("its neighbour was moved to %s", now)
	}
	if f, why := neighbour.tryFetch(t); why == "" {
		t.Errorf("its neighbour got %+v", f)
	}
	if f := legacy.fetch(t); f.ID != "spiffe://redoubt.local/service/legacy" {
		t.Errorf("it is %s", f.ID)
	}
	refused(t, 1, []string{"already", "workload forget"}, m1.cli("enroll", fmt.Sprint(legacy.pid), "--service", "other")...)
	if p := m1.protection(t, got.Instance); p.State != policy.NotEnforceable || !strings.Contains(p.Reason, "running before Redoubt") {
		t.Errorf("doctor says of it: %+v", p)
	}
	// Naming a process does not make it part of a workload, even if root does.
	orders := m1.shell(t, "orders")
	door := local.NewClient(filepath.Join(m1.data, "agent.sock"))
	defer door.Close()
	if w, err := door.Started(t.Context(), orders.instance, legacy.pid); err == nil || !strings.Contains(err.Error(), "the process is in cgroup") {
		t.Errorf("a process of another cgroup was taken for a workload's first: %+v %v", w, err)
	}
	// Forgotten, it runs on, without an identity.
	must(t, m1.cli("workload", "forget", got.Instance)...)
	if f, why := legacy.tryFetch(t); why == "" {
		t.Errorf("forgotten, it got %+v", f)
	}

	// In a cgroup of its own, by process and by cgroup.
	for i, name := range []string{"pid", "cgroup"} {
		own := fmt.Sprintf("%s/own%d", m1.cgroups, i)
		w := running(t, m1, in(t, nobody(), own))
		what := fmt.Sprint(w.pid)
		if name == "cgroup" {
			what = own
		}
		got := document[machine.Workload](t, m1.cli("enroll", what, "--service", "own-"+name, "--stay")...)
		if got.Moved != 0 || got.Cgroup != own || cgroupOf(t, w.pid) != own {
			t.Errorf("by %s: enrolled %+v, want it where it is", name, got)
		}
		if f := w.fetch(t); f.ID != "spiffe://redoubt.local/service/own-"+name {
			t.Errorf("by %s: it is %s", name, f.ID)
		}
	}
	// A cgroup outside of this machine's subtree is another's.
	outside := running(t, m1, in(t, nobody(), program.cgroups+"/another"))
	refused(t, 1, []string{"outside this machine's subtree"}, m1.cli("enroll", fmt.Sprint(outside.pid), "--service", "theft")...)
	if now := cgroupOf(t, outside.pid); now != outside.cgroup {
		t.Errorf("a process outside of the subtree was moved to %s", now)
	}
	refused(t, 1, []string{"whole machine"}, m1.cli("enroll", "/", "--service", "all")...)
	refused(t, 1, []string{"999999999"}, m1.cli("enroll", "999999999", "--service", "ghost")...)
}

// in lets a process start in a cgroup, which is made.
func in(t testing.TB, attr *syscall.SysProcAttr, cgroup string) *syscall.SysProcAttr {
	t.Helper()
	path := filepath.Join(unified(t), cgroup)
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	return attr
}

func atoi(s string) (n int) {
	_, _ = fmt.Sscan(s, &n)
	return n
}

// A container gets its identity by an issuance rule over what the engine says of it. Nobody registers it.
func TestContainerGetsItsIdentityByRule(t *testing.T) {
	t.Parallel()
	podman := tool(t, "podman")
	tool(t, "runc")
	d := found(t)
	m1 := d.join(t, "m1")
	dir := t.TempDir()
	copyFile(t, program.redoubt, filepath.Join(dir, "redoubt"))
	copyFile(t, program.spiffe, filepath.Join(dir, "spiffeclient"))
	writeFile(t, filepath.Join(dir, "Containerfile"), "FROM scratch\nCOPY --chmod=0755 redoubt spiffeclient /\nLABEL team=shop\nENTRYPOINT [\"/spiffeclient\", \"watch\"]\n")
	image := fmt.Sprintf("localhost/redoubt-story-%d:1", os.Getpid())
	engine := func(args ...string) string {
		t.Helper()
		r := command(t, nil, "", append([]string{podman, "--runtime", "runc", "--cgroup-manager=cgroupfs"}, args...)...)
		if r.code != 0 {
			t.Fatalf("podman %s: %s%s", strings.Join(args, " "), r.out, r.err)
		}
		return strings.TrimSpace(r.out)
	}
	engine("build", "-q", "-t", image, dir)
	t.Cleanup(func() { _ = exec.Command(podman, "rmi", "-f", image).Run() })
	run := func(label, user, parent string) string {
		t.Helper()
		id := engine("run", "-d", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", "--cgroup-parent", parent,
			"--label", "app="+label, "--user", user, "-v", d.dir+":"+d.dir, "--env", "SPIFFE_ENDPOINT_SOCKET=unix://"+m1.socket, image)
		t.Cleanup(func() { _ = exec.Command(podman, "rm", "-f", "-t", "0", id).Run() })
		return id
	}
	d.apply(t, map[string]string{"rules.yaml": fmt.Sprintf(`kind: IssuanceRule
name: shop-containers
spec:
  when: context has container && context.container has image && context.container.image == %q && context.container.label.app == "orders" && context.container.label.team == "shop"
  id: /container/{container.label.app}
`, image)})
	orders, other := run("orders", "1234:1234", m1.cgroups), run("stranger", "0:0", m1.cgroups)
	outside := run("orders", "1234:1234", program.cgroups+"/elsewhere") // another machine's, as it were
	fetch := func(id string) (fetched, string) {
		t.Helper()
		r := command(t, nil, "", podman, "--runtime", "runc", "--cgroup-manager=cgroupfs", "exec", id, "/redoubt", "identity", "fetch", "--json")
		var list []fetched
		if json.Unmarshal([]byte(r.out), &list) != nil || len(list) != 1 {
			return fetched{}, r.out + r.err
		}
		return list[0], ""
	}
	eventually(t, 40*time.Second, "the container's identity", func() (bool, string) {
		got, why := fetch(orders)
		return got.ID == "spiffe://redoubt.local/container/orders", got.ID + why
	})
	got, why := fetch(other)
	if why == "" {
		t.Errorf("the other container got %+v", got)
	}
	contains(t, "the other container", why, "issuance rule", "shop-containers", "identity explain")
	// It runs as root, which nobody said, and is what counts.
	w := document[struct{ Workload machine.Workload }](t, m1.cli("identity", "explain", engine("inspect", "--format", "{{.State.Pid}}", other))...).Workload
	if p := m1.protection(t, w.Instance); !w.Privileged || p.Reason != "privileged workload" {
		t.Errorf("a container that runs as root is shown as %+v", p)
	}
	if got, why := fetch(outside); !strings.Contains(why, "belongs to no workload") {
		t.Errorf("a container outside of this machine's subtree got %+v %s", got, why)
	}
	explained := must(t, m1.cli("identity", "explain", engine("inspect", "--format", "{{.State.Pid}}", orders))...)
	contains(t, "identity explain", explained, "by discovery", image, "container.label.team = shop  (container", "shop-containers", "WON", orders)
	// The program in it is the official client, unmodified.
	contains(t, "go-spiffe in the container", engine("logs", orders), "spiffe://redoubt.local/container/orders", `"verified":true`)
}
