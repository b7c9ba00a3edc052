package sandbox_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/sandbox"
)

// workload is the first argument by which this test program plays a workload; the next names what it does.
const workload = "play-workload"

func TestMain(m *testing.M) {
	sandbox.Init()
	if len(os.Args) > 2 && os.Args[1] == workload {
		os.Exit(play(os.Args[2], os.Args[3:]))
	}
	code := m.Run()
	if program.dir != "" {
		_ = os.RemoveAll(program.dir)
	}
	os.Exit(code)
}

// play is what a workload of the tests does; what it finds goes to standard output.
func play(what string, args []string) int {
	if attack, ok := sandbox.Attacks[what]; ok {
		refused, how := attack()
		fmt.Printf("refused=%v %s\n", refused, how)
		return 0
	}
	switch what {
	case "fds": // before the runtime opens any
		entries, _ := os.ReadDir("/proc/self/fd")
		for _, e := range entries {
			to, _ := os.Readlink("/proc/self/fd/" + e.Name())
			fmt.Println(e.Name(), to)
		}
	case "exit":
		code, _ := strconv.Atoi(args[0])
		return code
	case "sleep":
		fmt.Println("ready")
		time.Sleep(time.Minute)
	case "show":
		dir, _ := os.Getwd()
		cgroup, _ := os.ReadFile("/proc/self/cgroup")
		fmt.Printf("args=%q\nenv=%q\ndir=%s\nuid=%d gid=%d\n%s", args, os.Environ(), dir, os.Geteuid(), os.Getegid(), cgroup)
	case "securebits":
		bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
		_, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, 0, 0)
		fmt.Printf("%#x %v set=%v\n", bits, err, errno)
	case "write-through-stdin":
		// A directory of cgroupfs was left open: a path that no mount of ours lies on.
		fd, err := unix.Openat(0, "cgroup.procs", unix.O_WRONLY, 0)
		if err == nil {
			_, err = unix.Write(fd, []byte("0"))
		}
		cgroup, _ := os.ReadFile("/proc/self/cgroup")
		fmt.Printf("err=%v\n%s", err, cgroup)
	case "write":
		fmt.Printf("err=%v\n", os.WriteFile(args[0], []byte("0"), 0))
	case "key":
		_, err := unix.KeyctlSearch(unix.KEY_SPEC_SESSION_KEYRING, "user", args[0], 0)
		fmt.Printf("err=%v\n", err)
	case "tiocsti":
		b := byte('x')
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, 0, unix.TIOCSTI, uintptr(unsafe.Pointer(&b)))
		fmt.Printf("err=%v\n", errno)
	case "protect-here":
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return 98
		}
		fmt.Println(sandbox.ProtectCgroupfsHere())
	case "mount-later":
		return playMountLater(args)
	case "terminal":
		return playTerminal(args)
	case "without-capability":
		return playWithoutCapability(args)
	case "namespaces":
		return playNamespaces(args)
	case "namespaces-inside":
		return playInside(args)
	case "setuid":
		err := exec.Command(args[0]).Run()
		fmt.Printf("%v\n", err)
	case "prove-nosuid":
		if err := nosuidBaits(); err != nil {
			fmt.Println(err)
			return 1
		}
		return play("prove", args)
	case "prove":
		ps, err := sandbox.Prove(context.Background(), sandbox.ProveConfig{CgroupRoot: args[0]})
		for _, p := range ps {
			fmt.Printf("%s=%s %s\n", p.Name, p.State, p.Reason)
		}
		fmt.Printf("err=%v\n", err)
	default:
		return 99
	}
	return 0
}

// program is this test program where an unprivileged user can execute it.
var program struct {
	once      sync.Once
	dir, path string
	err       error
}

func programPath(t *testing.T) string {
	t.Helper()
	program.once.Do(func() {
		program.err = func() error {
			dir, err := os.MkdirTemp("", "r")
			if err != nil {
				return err
			}
			program.dir, program.path = dir, filepath.Join(dir, "workload")
			if err := os.Chmod(dir, 0o755); err != nil {
				return err
			}
			data, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				return err
			}
			return os.WriteFile(program.path, data, 0o755)
		}()
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	return program.path
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a workload can be started by root only")
	}
}

// unified returns where the unified hierarchy is mounted.
func unified(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); strings.Contains(line, " - cgroup2 ") {
			return f[4]
		}
	}
	t.Skip("no unified hierarchy is mounted")
	return ""
}

// testCgroup makes a cgroup that is gone, with all that runs in it, when the test ends.
func testCgroup(t *testing.T) *sandbox.Cgroup {
	t.Helper()
	needRoot(t)
	c, err := sandbox.MakeCgroup(unified(t), identity.Unique("redoubt-test"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := c.Kill(); err != nil {
			t.Error(err)
		}
		if err := c.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

const testUser = 61999

// quickRace spares the second that a program built with -race waits at its end.
const quickRace = "GORACE=atexit_sleep_ms=0"

// spec is that of a workload that plays what args say.
func spec(t *testing.T, args ...string) sandbox.Spec {
	t.Helper()
	return sandbox.Spec{
		Argv: append([]string{programPath(t), workload}, args...), CgroupFD: testCgroup(t).FD(), UID: testUser, GID: testUser,
		Env: []string{quickRace},
	}
}

// privileged is spec with Privileged, as root.
func privileged(t *testing.T, args ...string) sandbox.Spec {
	t.Helper()
	s := spec(t, args...)
	s.Privileged, s.UID, s.GID = true, 0, 0
	return s
}

// run starts spec and returns what it wrote and how it ended.
func run(t *testing.T, s sandbox.Spec) (string, sandbox.Exit) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	s.Stdout, s.Stderr = w, os.Stderr
	p, err := sandbox.Start(t.Context(), s)
	_ = w.Close()
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return string(out), exit
}

// output is run of something that ends well.
func output(t *testing.T, s sandbox.Spec) string {
	t.Helper()
	out, exit := run(t, s)
	if exit.Status() != 0 {
		t.Fatalf("the workload ended with %d and said %q", exit.Status(), out)
	}
	return out
}

// started starts spec and waits until it says that it is ready.
func started(t *testing.T, s sandbox.Spec) *sandbox.Process {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	s.Stdout = w
	p, err := sandbox.Start(t.Context(), s)
	_ = w.Close()
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	var b [6]byte
	if _, err := io.ReadFull(r, b[:]); err != nil || !bytes.HasPrefix(b[:], []byte("ready")) {
		t.Fatalf("the workload said %q: %v", b, err)
	}
	return p
}

// helper runs this test program as an ordinary process.
func helper(t *testing.T, attr *syscall.SysProcAttr, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), programPath(t), append([]string{workload}, args...)...)
	cmd.SysProcAttr, cmd.Env = attr, append(os.Environ(), quickRace)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}
