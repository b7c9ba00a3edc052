package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sandbox"
)

func nilContext() context.Context { return context.Background() }

func addressOf(b *byte) uintptr { return uintptr(unsafe.Pointer(b)) }

func TestProgramGetsExactlyWhatWasGiven(t *testing.T) {
	c := testCgroup(t)
	out := output(t, sandbox.Spec{
		Argv: []string{programPath(t), workload, "show", "a b", "\xff\xfe", ""}, Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix:///x", "B=\xff"},
		Dir: "/usr", Cgroup: c.Path, UID: testUser, GID: testUser + 1,
	})
	want := fmt.Sprintf("args=%q\nenv=%q\ndir=/usr\nuid=%d gid=%d\n", []string{"a b", "\xff\xfe", ""}, []string{"SPIFFE_ENDPOINT_SOCKET=unix:///x", "B=\xff"}, testUser, testUser+1)
	if !strings.HasPrefix(out, want) {
		t.Errorf("got %q, want %q", out, want)
	}
	if !strings.Contains(out, "0::/"+filepath.Base(c.Path)+"\n") {
		t.Errorf("it is not in its cgroup: %q", out)
	}
}

func TestExitAndSignals(t *testing.T) {
	if _, exit := run(t, spec(t, "exit", "7")); exit.Status() != 7 || exit.Code != 7 {
		t.Errorf("got %+v", exit)
	}
	p := started(t, spec(t, "sleep"))
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait()
	if err != nil || exit.Signal != syscall.SIGTERM || exit.Status() != 143 {
		t.Errorf("got %+v, %v", exit, err)
	}
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a signal to the dead: %v", err)
	}
}

func TestProgramsThatCannotBeExecuted(t *testing.T) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		name   string
		argv0  string
		env    []string
		status int
		why    string
	}{
		{"missing", dir + "/none", nil, 127, "no such program"},
		{"missing directory", "/none/none", nil, 127, "no such program"},
		{"not in PATH", "redoubt-none", []string{"PATH=/usr/bin:/bin"}, 127, "no such program"},
		{"no PATH", "sh", nil, 127, "no such program"},
		{"not executable", write("plain", "#!/bin/sh\n", 0o644), nil, 126, "may not execute"},
		{"of root only", write("secret", "#!/bin/sh\n", 0o700), nil, 126, "may not execute"},
		{"not executable in PATH", "plain", []string{"PATH=" + dir}, 126, "may not execute"},
		{"no interpreter", write("lost", "#!/none/sh\n", 0o755), nil, 126, "interpreter"},
		{"no format", write("text", "hello", 0o755), nil, 126, "no program"},
		{"a directory", dir, nil, 126, "may not execute"},
		{"huge arguments", "/bin/sh", []string{"A=" + strings.Repeat("x", 200<<10)}, 126, "larger than the kernel takes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := sandbox.Start(t.Context(), sandbox.Spec{Argv: []string{c.argv0}, Env: c.env, CgroupFD: testCgroup(t).FD(), UID: testUser, GID: testUser})
			e := refusal.As(err)
			if e == nil || sandbox.ExitStatus(err) != c.status || !strings.Contains(e.Why, c.why) || e.Do == "" {
				t.Errorf("got %v, status %d", err, sandbox.ExitStatus(err))
			}
		})
	}
	t.Run("relative PATH is no PATH", func(t *testing.T) {
		write("here", "#!/bin/sh\n", 0o755)
		_, err := sandbox.Start(t.Context(), sandbox.Spec{Argv: []string{"here"}, Dir: dir, Env: []string{"PATH=.:"}, CgroupFD: testCgroup(t).FD(), UID: testUser, GID: testUser})
		if !errors.Is(err, sandbox.ErrMissing) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("found in the workload's own PATH", func(t *testing.T) {
		_, exit := run(t, sandbox.Spec{Argv: []string{"sh", "-c", "exit 3"}, Env: []string{"PATH=/none:/usr/bin:/bin"}, CgroupFD: testCgroup(t).FD(), UID: testUser, GID: testUser})
		if exit.Status() != 3 {
			t.Errorf("got %+v", exit)
		}
	})
}

func TestSpecsThatAreRefused(t *testing.T) {
	good := spec(t, "exit", "0")
	for _, c := range []struct {
		name  string
		spoil func(*sandbox.Spec)
		code  *refusal.Error
	}{
		{"root", func(s *sandbox.Spec) { s.UID = 0 }, sandbox.ErrRootUser},
		{"root's group", func(s *sandbox.Spec) { s.GID = 0 }, sandbox.ErrRootUser},
		{"nobody's number", func(s *sandbox.Spec) { s.UID = 1<<32 - 1 }, sandbox.ErrSpec},
		{"nobody's group", func(s *sandbox.Spec) { s.GID = 1<<32 - 1 }, sandbox.ErrSpec},
		{"no program", func(s *sandbox.Spec) { s.Argv = nil }, sandbox.ErrSpec},
		{"empty program", func(s *sandbox.Spec) { s.Argv = []string{""} }, sandbox.ErrSpec},
		{"zero byte", func(s *sandbox.Spec) { s.Env = []string{"A=\x00B=1"} }, sandbox.ErrSpec},
		{"no cgroup", func(s *sandbox.Spec) { s.CgroupFD = 0 }, sandbox.ErrSpec},
		{"not a cgroup", func(s *sandbox.Spec) { s.CgroupFD, s.Cgroup = 0, "/tmp" }, sandbox.ErrStep},
		{"missing cgroup", func(s *sandbox.Spec) { s.CgroupFD, s.Cgroup = 0, "/none" }, sandbox.ErrStep},
		{"missing directory", func(s *sandbox.Spec) { s.Dir = "/none" }, sandbox.ErrStep},
		{"forbidden directory", func(s *sandbox.Spec) { s.Dir = "/root" }, sandbox.ErrStep},
		{"too large", func(s *sandbox.Spec) { s.Env = []string{strings.Repeat("x", sandbox.MaxSpecBytes)} }, sandbox.ErrSpec},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := good
			c.spoil(&s)
			p, err := sandbox.Start(t.Context(), s)
			if p != nil || !errors.Is(err, c.code) || refusal.As(err).Do == "" || refusal.As(err).Why == "" {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A directory that is no cgroup is refused for what it is, before anything is started.
func TestAPlainDirectoryIsNoCgroup(t *testing.T) {
	s := spec(t, "exit", "0")
	s.CgroupFD, s.Cgroup = 0, t.TempDir()
	if _, err := sandbox.Start(t.Context(), s); err == nil || !strings.Contains(err.Error(), "no directory of the unified hierarchy") {
		t.Errorf("got %v", err)
	}
}

// A program that does not call Init would start itself for ever.
func TestStartWithoutInitIsRefused(t *testing.T) {
	s := spec(t, "exit", "0")
	defer sandbox.Disarm()()
	if _, err := sandbox.Start(t.Context(), s); !errors.Is(err, sandbox.ErrSpec) || !strings.Contains(err.Error(), "Init") {
		t.Errorf("got %v", err)
	}
}

// Each capability that a step needs is taken away in turn: the start is refused by that step, and nothing ran.
func TestAFailedStepRefusesTheStart(t *testing.T) {
	for _, c := range []struct {
		capability int
		step       string
	}{
		{unix.CAP_SYS_ADMIN, "mount namespace"},
		{unix.CAP_SETPCAP, "bounding set"},
		{unix.CAP_SETGID, "groups"},
		{unix.CAP_SETUID, "user"},
	} {
		t.Run(c.step, func(t *testing.T) {
			ran := filepath.Join(t.TempDir(), "ran")
			out := helper(t, nil, "without-capability", fmt.Sprint(c.capability), testCgroup(t).Path, ran)
			if !strings.Contains(out, fmt.Sprintf("step %q failed", c.step)) || !strings.Contains(out, "code=sandbox-step") {
				t.Errorf("got %q", out)
			}
			if _, err := os.Stat(ran); err == nil {
				t.Error("the program ran")
			}
		})
	}
}

func playWithoutCapability(args []string) int {
	runtime.LockOSThread()
	var capability uintptr
	_, _ = fmt.Sscan(args[0], &capability)
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
		fmt.Println(err)
		return 1
	}
	_, err := sandbox.Start(nilContext(), sandbox.Spec{
		Argv: []string{"/bin/sh", "-c", "echo ran > " + args[2]}, Cgroup: args[1], UID: testUser, GID: testUser,
	})
	if e := refusal.As(err); e != nil {
		fmt.Printf("code=%s ", e.Code)
	}
	fmt.Println(err)
	return 0
}

func TestStartEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := sandbox.Start(ctx, spec(t, "exit", "0")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// And in the middle, wherever that is: an error or a running program, never a stray one.
	s := spec(t, "sleep")
	for d := time.Duration(0); d < 8*time.Millisecond; d += time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		p, err := sandbox.Start(ctx, s)
		cancel()
		if err == nil {
			_ = p.Signal(syscall.SIGKILL)
			if exit, err := p.Wait(); err != nil || exit.Signal != syscall.SIGKILL {
				t.Errorf("got %+v, %v", exit, err)
			}
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	}
}

func TestInitStepOutsideAStartIsHarmless(t *testing.T) {
	p, err := os.StartProcess("/proc/self/exe", []string{"redoubt-sandbox"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	state, err := p.Wait()
	if err != nil || state.ExitCode() != 1 {
		t.Errorf("got %v, %v", state, err)
	}
}

func BenchmarkStart(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("a workload can be started by root only")
	}
	cgroup := benchCgroup(b)
	for b.Loop() {
		p, err := sandbox.Start(b.Context(), sandbox.Spec{Argv: []string{"/bin/true"}, CgroupFD: cgroup.FD(), UID: testUser, GID: testUser})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Wait(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStartPlain is the yardstick of BenchmarkStart: the same program, without any confinement.
func BenchmarkStartPlain(b *testing.B) {
	for b.Loop() {
		p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Wait(); err != nil {
			b.Fatal(err)
		}
	}
}
