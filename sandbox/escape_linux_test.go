package sandbox_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/sandbox"
)

func wantRefused(t *testing.T, out string) {
	t.Helper()
	if !strings.HasPrefix(out, "refused=true") {
		t.Errorf("the attack succeeded: %s", out)
	}
}

func wantSucceeds(t *testing.T, out string) {
	t.Helper()
	if !strings.HasPrefix(out, "refused=false") {
		t.Errorf("the control failed, so the attack proves nothing here: %s", out)
	}
}

func TestWorkloadCannotLeaveItsCgroup(t *testing.T) {
	wantRefused(t, output(t, spec(t, "leave")))
}

// The measured fact behind "never uid 0", and what Redoubt says of such a workload.
func TestPrivilegedWorkloadLeavesItsCgroup(t *testing.T) {
	wantSucceeds(t, output(t, privileged(t, "leave")))
	p := started(t, privileged(t, "sleep"))
	c, err := sandbox.Confinement(p.PID())
	if err != nil {
		t.Fatal(err)
	}
	got := c.Protection("m1", "w-1", nil)
	if got.State != policy.NotEnforceable || got.Reason != "privileged workload" || got.Change == "" {
		t.Errorf("got %+v", got)
	}
}

// The rule "no root", alone: the directory is reached through a descriptor, past every read-only mount.
func TestWorkloadCannotLeaveThroughAnOpenDirectory(t *testing.T) {
	root, err := os.Open(unified(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }()
	s := spec(t, "write-through-stdin")
	s.Stdin = root
	if out := output(t, s); !strings.HasPrefix(out, "err=permission denied") || strings.Contains(out, "\n0::/\n") {
		t.Errorf("the workload said %q", out)
	}
	s = privileged(t, "write-through-stdin")
	s.Stdin = root
	if out := output(t, s); !strings.HasPrefix(out, "err=<nil>") || !strings.Contains(out, "0::/\n") {
		t.Errorf("the control failed: %q", out)
	}
}

// The rule "cgroupfs is read-only", alone: the directories were given to the workload's user (systemd's Delegate=yes).
func TestCgroupfsIsReadOnlyEvenIfDelegated(t *testing.T) {
	parent := testCgroup(t)
	for _, d := range []string{"", "a", "b"} {
		dir := filepath.Join(parent.Path, d)
		if d != "" {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []string{"", "cgroup.procs"} {
			if err := os.Chown(filepath.Join(dir, f), testUser, testUser); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := sandbox.Spec{
		Argv:   []string{programPath(t), workload, "write", filepath.Join(parent.Path, "b", "cgroup.procs")},
		Cgroup: filepath.Join(parent.Path, "a"), UID: testUser, GID: testUser,
	}
	if out := output(t, s); !strings.Contains(out, "read-only file system") {
		t.Errorf("the workload moved itself: %q", out)
	}
	s.Privileged = true // the same user, without the mount
	if out := output(t, s); out != "err=<nil>\n" {
		t.Errorf("the control failed: %q", out)
	}
	wantRefused(t, output(t, spec(t, "cgroupfs")))
}

// The control of the attack as root of a user namespace: where the workload's cgroup is its user's, a cgroup2 that it mounts
// afresh can be written to, and the probe says so.
func TestAFreshCgroupfsIsTriedToo(t *testing.T) {
	if out := output(t, spec(t, "cgroupfs")); !strings.Contains(out, "fresh mount: EACCES") {
		if strings.Contains(out, "namespace is refused") || strings.Contains(out, "no mount afresh") {
			t.Skip("unprivileged users cannot mount cgroup2 on this machine")
		}
		t.Errorf("got %s", out)
	}
	c := testCgroup(t)
	for _, f := range []string{"", "cgroup.procs"} {
		if err := os.Chown(filepath.Join(c.Path, f), testUser, testUser); err != nil {
			t.Fatal(err)
		}
	}
	s := spec(t, "cgroupfs")
	s.CgroupFD = c.FD()
	out := output(t, s)
	wantSucceeds(t, out)
	if !strings.Contains(out, "a fresh mount of cgroup2") {
		t.Errorf("got %s", out)
	}
}

func TestHostKeepsItsWritableCgroupfs(t *testing.T) {
	output(t, spec(t, "exit", "0"))
	var s unix.Statfs_t
	if err := unix.Statfs(unified(t), &s); err != nil || s.Flags&unix.ST_RDONLY != 0 {
		t.Errorf("the host's cgroupfs became read-only: %v", err)
	}
}

// The step that makes cgroupfs read-only refuses to do so for the whole machine. It is tried in a mount namespace of
// the helper's, so that a failure of this test harms nobody.
func TestCgroupfsOfTheAgentIsLeftAlone(t *testing.T) {
	needRoot(t)
	out := helper(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, "protect-here")
	if !strings.Contains(out, "agent's mount namespace") {
		t.Errorf("got %q", out)
	}
}

// What is mounted on the host later does not appear in the workload: a writable cgroupfs among it.
func TestLaterMountsDoNotAppear(t *testing.T) {
	needRoot(t)
	out := helper(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, "mount-later", testCgroup(t).Path, t.TempDir())
	if out != "outside=true inside=false\n" {
		t.Errorf("got %q", out)
	}
}

// playMountLater mounts cgroupfs, where mounts are shared, after a workload has started.
func playMountLater(args []string) int {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil { // off from the machine's first
		return 1
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return 1
	}
	r, w, _ := os.Pipe()
	p, err := sandbox.Start(context.Background(), sandbox.Spec{
		Argv: []string{os.Args[0], workload, "sleep"}, Cgroup: args[0], UID: testUser, GID: testUser, Stdout: w,
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_, _ = r.Read(make([]byte, 10))
	if err := unix.Mount("none", args[1], "cgroup2", 0, ""); err != nil {
		fmt.Println(err)
		return 1
	}
	seen := func(pid string) bool {
		data, _ := os.ReadFile("/proc/" + pid + "/mountinfo")
		return strings.Contains(string(data), args[1])
	}
	fmt.Printf("outside=%t inside=%t\n", seen("self"), seen(fmt.Sprint(p.PID())))
	_ = p.Signal(syscall.SIGKILL)
	_, _ = p.Wait()
	return 0
}

// Root of namespaces of its own: takes the read-only flag away, mounts cgroupfs afresh, and moves.
func TestUserNamespaceIsNoWayOut(t *testing.T) {
	out := output(t, spec(t, "namespaces"))
	if strings.Contains(out, "not possible here") {
		t.Skip("unprivileged user namespaces are off on this machine")
	}
	if !strings.Contains(out, "inside") || strings.Contains(out, "escaped") || strings.Contains(out, "cleared") {
		t.Errorf("the workload said %q", out)
	}
}

func playNamespaces([]string) int {
	cmd := exec.Command("/proc/self/exe", workload, "namespaces-inside")
	cmd.Stdout = os.Stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWCGROUP,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Run(); err != nil {
		fmt.Println("not possible here:", err)
	}
	return 0
}

func playInside([]string) int {
	fmt.Println("inside, as", os.Geteuid())
	data, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(data)) {
		if !strings.Contains(line, " - cgroup") {
			continue
		}
		point := strings.Fields(line)[4]
		if err := unix.MountSetattr(unix.AT_FDCWD, point, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err == nil {
			fmt.Println("cleared the flag of", point)
		}
		if os.WriteFile(filepath.Join(point, "cgroup.procs"), []byte("0"), 0) == nil {
			fmt.Println("escaped by", point)
		}
	}
	if err := unix.Mount("none", "/tmp", "cgroup2", 0, ""); err != nil {
		fmt.Println("no fresh cgroup2:", err)
	} else if os.WriteFile("/tmp/cgroup.procs", []byte("0"), 0) == nil || os.Mkdir("/tmp/own", 0o755) == nil {
		fmt.Println("escaped by a fresh mount")
	}
	return 0
}

func TestSetUIDProgramGainsNothing(t *testing.T) {
	needRoot(t)
	dir := filepath.Dir(programPath(t))
	bait := filepath.Join(dir, t.Name())
	if err := os.WriteFile(bait, sandbox.RootTester(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(bait, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	control := exec.Command(bait)
	control.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testUser, Gid: testUser}}
	_ = control.Run()
	if control.ProcessState.ExitCode() != sandbox.OnlyRoot {
		t.Skip("the temporary directory does not honour set-user-id bits")
	}
	if out, want := output(t, spec(t, "setuid", bait)), fmt.Sprintf("exit status %d\n", sandbox.OnlyNotRoot); out != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestProveFindsEverythingRefused(t *testing.T) {
	needRoot(t)
	meter := counts{}
	ps, err := sandbox.Prove(t.Context(), sandbox.ProveConfig{CgroupRoot: unified(t), Machine: "m1", Meter: meter})
	if err != nil {
		t.Fatal(err)
	}
	if len(ps) < 9 || ps[0].Name != sandbox.Whole {
		t.Errorf("got %d protections: %+v", len(ps), ps)
	}
	for _, p := range ps {
		if p.State != policy.Enforced || p.Proved.IsZero() || p.Machine != "m1" {
			t.Errorf("%+v", p)
		}
	}
	if meter["sandbox_probes probe run.vsock result refused"] != 1 {
		t.Errorf("counted %v", meter)
	}
	if left, _ := filepath.Glob(unified(t) + fmt.Sprintf("/redoubt-probe-%d-*", os.Getpid())); len(left) > 0 { // other agents prove, too
		t.Errorf("left behind: %v", left)
	}
}

type counts map[string]int64

func (c counts) Count(name string, n int64, labels ...string) {
	c[name+" "+strings.Join(labels, " ")] += n
}

// An agent installed with mode 0700, in a directory that only root may enter, can prove too.
func TestProveWorksFromAPrivateFile(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	own := filepath.Join(dir, "own")
	data, err := os.ReadFile(programPath(t))
	if err == nil {
		err = os.WriteFile(own, data, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(own, workload, "prove", unified(t)).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "err=<nil>") || strings.Contains(string(out), "not enforceable") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestAnAttackThatSucceedsIsNotCalledEnforced(t *testing.T) {
	got, _ := sandbox.Judged(sandbox.ProveConfig{Now: nowFixed, Meter: counts{}}, sandbox.ProtectVsock, false, "a socket was made").([]policy.Protection)
	if len(got) != 3 || got[1].State != policy.Enforced {
		t.Fatalf("got %+v", got)
	}
	for _, p := range []policy.Protection{got[0], got[2]} {
		if p.State != policy.NotEnforceable || !p.Proved.IsZero() || !strings.Contains(p.Reason, "a socket was made") || p.Change == "" {
			t.Errorf("got %+v", p)
		}
	}
}

func TestProveEndsWithItsContext(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := sandbox.Prove(ctx, sandbox.ProveConfig{CgroupRoot: unified(t)}); err == nil {
		t.Error("a proof was made without time")
	}
	if left, _ := filepath.Glob(unified(t) + fmt.Sprintf("/redoubt-probe-%d-*", os.Getpid())); len(left) > 0 { // other agents prove, too
		t.Errorf("left behind: %v", left)
	}
}
