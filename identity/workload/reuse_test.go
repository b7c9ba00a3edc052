//go:build linux

package workload_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/refusal"
)

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if !errors.Is(err, &refusal.Error{Code: code}) {
		t.Errorf("got %v, want a refusal with code %s", err, code)
	}
}

// insidePidNamespace is set where pids are ours alone to give.
const insidePidNamespace = "REDOUBT_TEST_PIDNS"

// A process connects and ends, and another one, of another workload, is given its pid: whether that happens before the
// caller is identified or after, nobody is taken for somebody else.
//
// The test runs again in a pid namespace of its own, in which it chooses the next pid (ns_last_pid).
func TestPidReuse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a pid namespace needs root")
	}
	if os.Getenv(insidePidNamespace) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPidReuse$", "-test.v")
		cmd.Env = append(os.Environ(), insidePidNamespace+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		switch {
		case err == nil && strings.Contains(string(out), "--- SKIP: "), errors.Is(err, unix.EPERM):
			t.Skipf("not all of it can be tried here: %v\n%s", err, out)
		case err != nil || !strings.Contains(string(out), "--- PASS: TestPidReuse"):
			t.Errorf("in the pid namespace: %v\n%s", err, out)
		}
		return
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		t.Skipf("cannot mount /proc: %v", err)
	}
	attacker, victim := newCgroup(t, "attacker"), newCgroup(t, "victim")
	for _, m := range methods {
		t.Run(string(m)+" before", func(t *testing.T) {
			usable(t, m)
			ln, path := listenUnix(t)
			p := run(t, "connect", attacker, path)
			conn, err := ln.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			accepted := sinceBoot(t)
			reuse(t, p, victim)
			c, err := workload.Identify(conn, workload.Options{Method: m, Accepted: accepted})
			if err == nil {
				t.Errorf("pid %d, which connected from %s, is taken for a process in %s", c.PID, attacker, c.Cgroup)
			}
			wantCode(t, err, "caller-gone")
		})
		t.Run(string(m)+" after", func(t *testing.T) {
			usable(t, m)
			ln, path := listenUnix(t)
			p := run(t, "connect", attacker, path)
			conn, err := ln.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			c, err := workload.Identify(conn, workload.Options{Method: m})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			if c.Cgroup != attacker {
				t.Fatalf("cgroup %s, want %s", c.Cgroup, attacker)
			}
			reuse(t, p, victim)
			wantCode(t, c.Alive(), "caller-gone")
			wantCode(t, c.Verify(), "caller-gone")
		})
	}
}

// reuse ends p and starts a process with its pid in another cgroup.
func reuse(t *testing.T, p *program, cgroup string) {
	t.Helper()
	pid := p.cmd.Process.Pid
	p.end()
	time.Sleep(50 * time.Millisecond) // start times have a resolution of 10 ms
	dir, err := os.Open(filepath.Join(cgroupRoot(t), cgroup))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	for range 50 { // a thread of this process may take the pid first
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Appendf(nil, "%d", pid-1), 0o600); err != nil {
			t.Skipf("cannot choose the next pid: %v", err)
		}
		cmd := exec.Command("sleep", "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		if cmd.Process.Pid == pid {
			t.Cleanup(stop)
			return
		}
		stop()
	}
	t.Skipf("pid %d was not given again", pid)
}

func sinceBoot(t *testing.T) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
