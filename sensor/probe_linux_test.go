package sensor_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/sensor"
)

// asNobody is the variable that makes this test binary print a ledger and end.
const asNobody = "REDOUBT_TEST_LEDGER"

func TestMain(m *testing.M) {
	if root, ok := os.LookupEnv(asNobody); ok {
		l, err := sensor.Probe(context.Background(), root)
		if err == nil {
			err = json.NewEncoder(os.Stdout).Encode(l)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	usedFirstThread = usesFirstThread()
	os.Exit(m.Run())
}

var usedFirstThread bool // set before the tests run, read by one of them

// usesFirstThread reports whether restrictions would ever be put on the thread that cannot end. It must be called on
// that thread: with one processor, a goroutine that is started there runs there.
func usesFirstThread() (used bool) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for range 100 {
		_ = sensor.OnThread(func() error {
			used = used || unix.Gettid() == unix.Getpid()
			return nil
		})
	}
	return used
}

func TestTheFirstThreadIsNeverRestricted(t *testing.T) {
	if usedFirstThread {
		t.Error("a probe ran on the first thread, which keeps what is done to it")
	}
}

// needRoot returns the cgroup2 mount of this machine.
func needRoot(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it loads BPF programs and makes cgroups")
	}
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Skip("there is no cgroup2 mount in a usual place")
	return ""
}

// traces is what a probe of this process could leave behind.
func traces(t testing.TB, cgroups string) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{filepath.Join(cgroups, fmt.Sprintf("redoubt-probe-%d-*", os.Getpid())), filepath.Join(os.TempDir(), fmt.Sprintf("redoubt-probe-%d-*", os.Getpid()))} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "redoubt-probe") {
			out = append(out, line)
		}
	}
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		if info, err := p.Info(); err == nil && info.Name == "redoubt_probe" {
			out = append(out, fmt.Sprintf("program %d", id))
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && (strings.Contains(target, "bpf") || strings.Contains(target, "redoubt-probe") || strings.Contains(target, "fanotify") || strings.Contains(target, "seccomp")) {
			out = append(out, "descriptor "+target)
		}
	}
	return out
}

func TestTheLedgerIsWholeAndNothingIsLeft(t *testing.T) {
	root := needRoot(t)
	l, err := sensor.Probe(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[sensor.Name]bool{}
	for _, c := range l.Entries {
		if seen[c.Name] || c.Kind == "" || c.Least == "" || c.Means == "" || c.Works == (c.Error != "") || strings.ContainsAny(c.Error, "\n\t") || len(c.Error) > 310 {
			t.Errorf("entry %+v", c)
		}
		seen[c.Name] = true
		if !c.Works {
			t.Logf("%s: %s", c.Name, c.Error)
		}
	}
	if l.System != "linux" || l.Kernel == "" || !l.Root || l.CgroupRoot != root || len(l.Left) != 0 {
		t.Errorf("ledger: %s %s root=%v %s left=%v", l.System, l.Kernel, l.Root, l.CgroupRoot, l.Left)
	}
	// What every kernel that can run Redoubt as root has.
	for _, name := range []sensor.Name{"cgroup.v2", "map.hash", "process.pidfd", "seccomp.filter"} {
		if c, ok := l.Get(name); !ok || !c.Works {
			t.Errorf("%s: %+v", name, c)
		}
	}
	// The kernel lets go of programs and namespaces a moment after their last holder.
	var left []string
	for range 100 {
		if left = traces(t, root); len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("left behind: %s", strings.Join(left, "\n"))
}

// TestProofsAndAttachmentsAgree: where a hook can be attached and processes can be started in cgroups, the refusal is
// proved, so that an attached program that is never run would be found.
func TestProofsAndAttachmentsAgree(t *testing.T) {
	l, err := sensor.Probe(t.Context(), needRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	if l.Works("cgroup.connect4", "cgroup.clone_into") && !l.Works("cgroup.denies") {
		c, _ := l.Get("cgroup.denies")
		t.Errorf("hooks can be attached, and do not refuse: %s", c.Error)
	}
	if l.Works("lsm.denies") != l.Works("lsm.file_open") {
		t.Error("BPF LSM programs can be attached, and do not refuse, or the other way round")
	}
}

func TestTwiceTheSameAnswer(t *testing.T) {
	root := needRoot(t)
	var ledgers [2]*sensor.Ledger
	var both sync.WaitGroup
	for i := range ledgers { // at once, since probes must not meet
		both.Go(func() {
			var err error
			if ledgers[i], err = sensor.Probe(t.Context(), root); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	works := func(l *sensor.Ledger) (out []sensor.Name) {
		for _, c := range l.Entries {
			if c.Works {
				out = append(out, c.Name)
			}
		}
		return out
	}
	if d := cmp.Diff(works(ledgers[0]), works(ledgers[1])); d != "" {
		t.Errorf("two probes at once differ:\n%s", d)
	}
}

func TestWithoutACgroupHooksAreRecordedAsNotWorking(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for root, why := range map[string]string{
		"": "no cgroup2 mount is known", t.TempDir(): "is not a cgroup2 mount", "/nonexistent": "no such file or directory",
	} {
		l, err := sensor.Probe(t.Context(), root)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range l.Entries {
			if c.Kind != sensor.KindCgroupHook && c.Kind != sensor.KindCgroup {
				continue
			}
			if c.Works || !strings.Contains(c.Error, why) {
				t.Errorf("with root %q, %s: works=%v, %q", root, c.Name, c.Works, c.Error)
			}
		}
		if !l.Works("map.hash") {
			t.Error("the rest was not asked")
		}
	}
}

func TestAnEndedContextEndsTheProbe(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if l, err := sensor.Probe(ctx, ""); !errors.Is(err, context.Canceled) || l != nil {
		t.Errorf("%v, %v", l, err)
	}
}

// TestNobodysLedger measures as uid 65534: the ledger is true for that caller, and says so.
func TestNobodysLedger(t *testing.T) {
	root := needRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "r") // a place that nobody can reach
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "ledger")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, content, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program)
	cmd.Dir, cmd.Env = "/", []string{asNobody + "=" + root}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var l sensor.Ledger
	if err := json.Unmarshal(out, &l); err != nil {
		t.Fatal(err)
	}
	if l.Root || l.Works("cgroup.connect4") || l.Works("bpffs.pin") || l.Works("lsm.denies") {
		t.Errorf("nobody can: %s", out)
	}
	if !l.Works("process.pidfd", "seccomp.filter") {
		t.Errorf("nobody cannot even: %s", out)
	}
}

// TestAKilledProbesCgroupIsSweptUp and one whose process lives is not.
func TestAKilledProbesCgroupIsSweptUp(t *testing.T) {
	root := needRoot(t)
	dead := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^$")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(root, fmt.Sprintf("redoubt-probe-%d-stale", dead.Process.Pid))
	young := filepath.Join(root, fmt.Sprintf("redoubt-probe-%d-young", dead.Process.Pid))
	alive := filepath.Join(root, fmt.Sprintf("redoubt-probe-%d-alive", os.Getppid()))
	hourAgo := time.Now().Add(-time.Hour)
	for _, dir := range []string{stale, young, alive} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		defer unix.Rmdir(dir)
		if dir == young {
			continue
		}
		if err := os.Chtimes(dir, hourAgo, hourAgo); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := sensor.Probe(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cgroup of a dead probe is still there: %v", err)
	}
	for _, dir := range []string{young, alive} {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("the cgroup of a probe that may live was removed: %v", err)
		}
	}
}

// TestThreadsComeBackClean: what probes do to their threads (namespaces, filters, Landlock) is seen by no other.
func TestThreadsComeBackClean(t *testing.T) {
	root := needRoot(t)
	look := func() (out []string) {
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			status, err := os.ReadFile(task + "/status")
			if err != nil {
				continue // ended meanwhile
			}
			net, _ := os.Readlink(task + "/ns/net")
			mnt, _ := os.Readlink(task + "/ns/mnt")
			state := net + " " + mnt
			for line := range strings.Lines(string(status)) {
				if strings.HasPrefix(line, "NoNewPrivs") || strings.HasPrefix(line, "Seccomp:") {
					state += " " + strings.Join(strings.Fields(line), "")
				}
			}
			if !slices.Contains(out, state) {
				out = append(out, state)
			}
		}
		slices.Sort(out)
		return out
	}
	before := look()
	if _, err := sensor.Probe(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	var after []string
	for range 100 { // threads end a moment after their goroutines
		if after = look(); slices.Equal(before, after) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("threads (-before +after):\n%s", cmp.Diff(before, after))
}

func BenchmarkProbe(b *testing.B) {
	root := needRoot(b)
	for b.Loop() {
		if _, err := sensor.Probe(b.Context(), root); err != nil {
			b.Fatal(err)
		}
	}
}
