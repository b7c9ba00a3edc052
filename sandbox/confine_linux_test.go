package sandbox_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/sandbox"
)

func nowFixed() time.Time { return time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC) }

// Each attack is refused in a workload, and succeeds in a privileged one on the same machine.
func TestAttacksAreRefused(t *testing.T) {
	for _, attack := range []string{"io_uring", "packet", "vsock", "vsockonly", "foreign", "sockpkt", "caps", "nnp", "cgroupfs"} {
		t.Run(attack, func(t *testing.T) {
			if attack == "foreign" && runtime.GOARCH != "amd64" {
				t.Skip("there is no foreign entry to the kernel on this architecture")
			}
			out := output(t, spec(t, attack))
			wantRefused(t, out)
			if strings.Contains("io_uring packet vsock vsockonly foreign sockpkt", attack) && !strings.Contains(out, "EPERM") {
				t.Errorf("refused otherwise than by EPERM: %s", out)
			}
			wantSucceeds(t, output(t, privileged(t, attack)))
		})
	}
}

func TestConfinementIsReadBackAndReported(t *testing.T) {
	p := started(t, spec(t, "sleep"))
	c, err := sandbox.Confinement(p.PID())
	if err != nil {
		t.Fatal(err)
	}
	if lacks := c.Lacks(); len(lacks) > 0 {
		t.Errorf("it lacks %q", lacks)
	}
	if c.UIDs != [4]uint32{testUser, testUser, testUser, testUser} || c.GIDs != c.UIDs {
		t.Errorf("users %v, groups %v", c.UIDs, c.GIDs)
	}
	if c.Inheritable|c.Permitted|c.Effective|c.Bounding|c.Ambient != 0 || !c.NoNewPrivs || c.Filters == 0 {
		t.Errorf("got %+v", c)
	}
	if got := c.Protection("m1", "w-1", nil); got.State != policy.NotEnforceable {
		t.Errorf("enforced without a proof: %+v", got)
	}
	proof := []policy.Protection{{Name: sandbox.Whole, State: policy.Enforced, Proved: nowFixed()}}
	if got := c.Protection("m1", "w-1", proof); got.State != policy.Enforced || got.Proved != nowFixed() || got.Workload != "w-1" {
		t.Errorf("got %+v", got)
	}
	mine, err := sandbox.Confinement(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if lacks := mine.Lacks(); len(lacks) < 5 {
		t.Errorf("an ordinary root process lacks only %q", lacks)
	}
}

// Every clause of Lacks is seen by itself.
func TestEveryLackIsSeen(t *testing.T) {
	whole := sandbox.Confined{UIDs: [4]uint32{5, 5, 5, 5}, GIDs: [4]uint32{5, 5, 5, 5}, NoNewPrivs: true, Filters: 1}
	if lacks := whole.Lacks(); len(lacks) != 0 {
		t.Fatalf("got %q", lacks)
	}
	for name, spoil := range map[string]func(*sandbox.Confined){
		"saved uid": func(c *sandbox.Confined) { c.UIDs[2] = 0 }, "gid": func(c *sandbox.Confined) { c.GIDs[0] = 0 },
		"groups": func(c *sandbox.Confined) { c.Groups = []uint32{4} }, "permitted": func(c *sandbox.Confined) { c.Permitted = 1 },
		"effective": func(c *sandbox.Confined) { c.Effective = 1 }, "inheritable": func(c *sandbox.Confined) { c.Inheritable = 1 },
		"ambient": func(c *sandbox.Confined) { c.Ambient = 1 }, "bounding": func(c *sandbox.Confined) { c.Bounding = 1 },
		"new privileges": func(c *sandbox.Confined) { c.NoNewPrivs = false }, "filter": func(c *sandbox.Confined) { c.Filters = 0 },
		"cgroupfs": func(c *sandbox.Confined) { c.WritableCgroupfs = []string{"/x"} },
	} {
		c := whole
		spoil(&c)
		if lacks := c.Lacks(); len(lacks) != 1 {
			t.Errorf("%s: got %q", name, lacks)
		}
	}
}

func TestConfinementOfNobody(t *testing.T) {
	if _, err := sandbox.Confinement(1 << 30); err == nil || !strings.Contains(err.Error(), "no such process") {
		t.Errorf("got %v", err)
	}
}

func TestSecurebitsAreLocked(t *testing.T) {
	if out := output(t, spec(t, "securebits")); out != "0xef <nil> set=operation not permitted\n" {
		t.Errorf("got %q", out)
	}
}

func TestSupplementaryGroupsAreCleared(t *testing.T) {
	needRoot(t)
	before, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setgroups([]int{0, 4, 27}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Setgroups(before) }()
	for name, s := range map[string]sandbox.Spec{"default": spec(t, "sleep"), "privileged": privileged(t, "sleep")} {
		c, err := sandbox.Confinement(started(t, s).PID())
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Groups) != 0 {
			t.Errorf("%s: groups %v", name, c.Groups)
		}
	}
}

func TestDescriptorsAreClosed(t *testing.T) {
	needRoot(t)
	path := filepath.Join(t.TempDir(), "secret")
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_RDWR, 0o600) // without O_CLOEXEC, as a careless library does
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if out := helper(t, nil, "fds"); !strings.Contains(out, "secret") {
		t.Fatalf("the control failed: %s", out)
	}
	for name, s := range map[string]sandbox.Spec{"default": spec(t, "fds"), "privileged": privileged(t, "fds")} {
		s.Env = []string{"GODEBUG=containermaxprocs=0", quickRace} // else the runtime keeps files of cgroupfs open
		out := output(t, s)
		if strings.Contains(out, "secret") || strings.Contains(out, "cgroup") || strings.Count(out, "pipe:") > 2 {
			t.Errorf("%s: open: %s", name, out)
		}
	}
}

func TestKeyringIsNotInherited(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // keyrings are a thread's; this one ends with the test
	if _, err := unix.KeyctlJoinSessionKeyring("redoubt-test"); err != nil {
		t.Skip("no keyrings here:", err)
	}
	if _, err := unix.AddKey("user", "redoubt-secret", []byte("s"), unix.KEY_SPEC_SESSION_KEYRING); err != nil {
		t.Fatal(err)
	}
	if out := helper(t, nil, "key", "redoubt-secret"); out != "err=<nil>\n" {
		t.Fatalf("the control failed: %s", out)
	}
	if out := output(t, spec(t, "key", "redoubt-secret")); strings.Contains(out, "nil") {
		t.Errorf("the workload found the key: %s", out)
	}
}

func TestTerminalOfTheOperatorCannotBeTypedInto(t *testing.T) {
	needRoot(t)
	if data, err := os.ReadFile("/proc/sys/dev/tty/legacy_tiocsti"); err == nil && strings.TrimSpace(string(data)) == "0" {
		t.Skip("TIOCSTI is off on this machine")
	}
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("no pseudo terminals here:", err)
	}
	defer func() { _ = ptmx.Close() }()
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	out := helper(t, &syscall.SysProcAttr{Setsid: true}, "terminal", fmt.Sprintf("/dev/pts/%d", n), testCgroup(t).Path)
	if want := "outside err=errno 0\ninside err=operation not permitted\n"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// playTerminal is an operator's shell: it has a controlling terminal, and hands it to a workload as standard input.
func playTerminal(args []string) int {
	tty, err := os.OpenFile(args[0], os.O_RDWR, 0) // of a session leader without one: becomes the controlling terminal
	if err != nil {
		fmt.Println(err)
		return 1
	}
	run := func(s sandbox.Spec) string {
		r, w, _ := os.Pipe()
		s.Stdin, s.Stdout = tty, w
		p, err := sandbox.Start(nilContext(), s)
		_ = w.Close()
		if err != nil {
			return err.Error()
		}
		b := make([]byte, 100)
		n, _ := r.Read(b)
		_, _ = p.Wait()
		return string(b[:n])
	}
	b := byte('x')
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, tty.Fd(), unix.TIOCSTI, addressOf(&b))
	fmt.Printf("outside err=%v\n", errno)
	fmt.Print("inside ", run(sandbox.Spec{Argv: []string{os.Args[0], workload, "tiocsti"}, Cgroup: args[1], UID: testUser, GID: testUser}))
	return 0
}
