//go:build linux

package workload_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity/workload"
)

var methods = []workload.Method{workload.ByPeerInfo, workload.ByPeerPidfd, workload.ByPid}

// usable skips a method that this kernel does not have.
func usable(t *testing.T, m workload.Method) {
	t.Helper()
	if c := identifySelf(t, m); c.Method != m {
		t.Skipf("this kernel identifies callers by %q", c.Method)
	}
}

// identifySelf connects and identifies this process.
func identifySelf(t *testing.T, m workload.Method) *workload.Caller {
	t.Helper()
	server, client := pair(t)
	defer func() { _ = client.Close() }()
	c, err := workload.Identify(server, workload.Options{Method: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// listenUnix listens on a socket that everybody may connect to.
func listenUnix(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	return ln, path
}

func pair(t *testing.T) (server, client *net.UnixConn) {
	t.Helper()
	ln, path := listenUnix(t)
	client, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	server, err = ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return server, client
}

func TestIdentifySaysWhoConnected(t *testing.T) {
	cgroup := newCgroup(t, "who")
	for _, m := range methods {
		t.Run(string(m), func(t *testing.T) {
			usable(t, m)
			ln, path := listenUnix(t)
			p := run(t, "connect", cgroup, path, "12345")
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
			if c.PID != p.cmd.Process.Pid || c.UID != 12345 || c.GID != 12346 || c.Cgroup != cgroup {
				t.Errorf("got %+v, want pid %d, user 12345, group 12346, cgroup %s", c, p.cmd.Process.Pid, cgroup)
			}
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(cgroupRoot(t), cgroup), &st); err != nil || c.CgroupID != st.Ino {
				t.Errorf("cgroup id %d, want inode %d", c.CgroupID, st.Ino)
			}
			if stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.PID)); !strings.Contains(string(stat), fmt.Sprintf(" %d ", c.Start)) {
				t.Errorf("start %d is not in %s", c.Start, stat)
			}
			if err := c.Verify(); err != nil {
				t.Errorf("Verify: %v", err)
			}
			waited := make(chan struct{})
			go func() { defer close(waited); c.Wait() }()
			_ = p.stdin.Close()
			select {
			case <-waited:
			case <-time.After(2 * time.Second):
				t.Error("Wait has not returned although the process has ended")
			}
			wantCode(t, c.Verify(), "caller-gone") // a zombie still has a pid and a cgroup
			p.end()
			wantCode(t, c.Alive(), "caller-gone")
			wantCode(t, c.Verify(), "caller-gone")
		})
	}
}

func TestTheBestMethodIsTakenUnlessOneIsForced(t *testing.T) {
	best := identifySelf(t, "").Method
	for _, m := range methods {
		if got := identifySelf(t, m).Method; got != m && got != best {
			t.Errorf("forced %s, got %s", m, got)
		}
	}
	if slices.Index(methods, best) > slices.Index(methods, identifySelf(t, workload.ByPid).Method) {
		t.Errorf("%s was taken although a better one works", best)
	}
	t.Logf("this kernel identifies callers by %s", best)
}

func TestAClosedCallerIsGone(t *testing.T) {
	for _, m := range methods {
		c := identifySelf(t, m)
		waited := make(chan struct{})
		go func() { defer close(waited); c.Wait() }()
		_ = c.Close()
		<-waited
		wantCode(t, c.Alive(), "caller-gone")
		wantCode(t, c.Verify(), "caller-gone")
	}
	wantCode(t, (&workload.Caller{}).Verify(), "caller-gone")
}

// A process asks for the identity of another one: by name, and it gets its own alone.
func TestAnImpostorGetsItsOwnIdentityOnly(t *testing.T) {
	good, bad := newCgroup(t, "good"), newCgroup(t, "bad")
	for _, m := range methods {
		t.Run(string(m), func(t *testing.T) {
			usable(t, m)
			b := newBoard(t)
			b.grant(good, serviceID(t, "good"))
			e := serve(t, workload.Config{Source: b, Method: m})
			if got := run(t, "watch", good, e.socket).next(t); got.ID != "spiffe://example.test/service/good" {
				t.Errorf("the owner got %+v", got)
			}
			if got := run(t, "watch", bad, e.socket).next(t); got.Code != "PermissionDenied" || !strings.Contains(got.Message, bad+": no issuance rule") {
				t.Errorf("the impostor got %+v", got)
			}
		})
	}
}

// What counts is who connected. A process that hands its connected socket to another has lent it its identity while it
// lives itself, as it could have given it the key. When it has ended the loan ends: no push, no answer.
func TestABorrowedConnectionEndsWithItsOwner(t *testing.T) {
	lender, borrower := newCgroup(t, "lender"), newCgroup(t, "borrower")
	for _, m := range methods {
		t.Run(string(m), func(t *testing.T) {
			usable(t, m)
			b := newBoard(t)
			b.grant(lender, serviceID(t, "lender"))
			b.grant(borrower, serviceID(t, "borrower"))
			e := serve(t, workload.Config{Source: b, Method: m})
			p := run(t, "lend", lender, e.socket, filepath.Join(cgroupRoot(t), borrower))
			if got := p.next(t); got.ID != "spiffe://example.test/service/lender" {
				t.Fatalf("while the owner lives the borrower got %+v", got)
			}
			b.rotate()
			if got := p.next(t); got.ID != "spiffe://example.test/service/lender" {
				t.Fatalf("while the owner lives the borrower was pushed %+v", got)
			}
			p.end() // the owner; the borrower goes on
			got := p.next(t)
			if got.Code != "PermissionDenied" || got.Message != "Workload API: the process that connected has ended; "+
				"an identity is not inherited with a socket; connect from the process that needs the identity" {
				t.Errorf("when the owner has ended the borrower got %+v", got)
			}
			b.rotate() // no push, and nobody keeps the connection open
			if got := p.next(t); got.Code != "Unavailable" || !strings.Contains(got.Message, "the borrowed connection is closed") {
				t.Errorf("when the owner has ended the borrower still has its connection: %+v", got)
			}
		})
	}
}

func TestACallerThatWasMovedLosesItsStream(t *testing.T) {
	before, after := newCgroup(t, "before"), newCgroup(t, "after")
	for _, m := range methods {
		t.Run(string(m), func(t *testing.T) {
			usable(t, m)
			b := newBoard(t)
			b.grant(before, serviceID(t, "before"))
			b.grant(after, serviceID(t, "after"))
			e := serve(t, workload.Config{Source: b, Method: m})
			p := run(t, "watch", before, e.socket)
			if got := p.next(t); got.ID != "spiffe://example.test/service/before" {
				t.Fatalf("got %+v", got)
			}
			procs := filepath.Join(cgroupRoot(t), after, "cgroup.procs")
			if err := os.WriteFile(procs, []byte(strconv.Itoa(p.cmd.Process.Pid)), 0o600); err != nil {
				t.Fatal(err)
			}
			b.rotate()
			if got := p.next(t); got.Code != "PermissionDenied" || !strings.Contains(got.Message, "moved to another cgroup since; connect again") {
				t.Errorf("after the move it was pushed %+v", got)
			}
			if got := e.meter.get("workloadapi_refused reason caller-moved"); got != 1 {
				t.Errorf("counted %d", got)
			}
		})
	}
}

// Signing takes time: a caller that ended or was moved meanwhile is not answered.
func TestACallerThatWasMovedWhileItsAnswerWasMadeIsNotAnswered(t *testing.T) {
	before, after := newCgroup(t, "asking"), newCgroup(t, "elsewhere")
	b := newBoard(t)
	b.grant(before, serviceID(t, "before"))
	procs := filepath.Join(cgroupRoot(t), after, "cgroup.procs")
	b.signing = func(c *workload.Caller) { _ = os.WriteFile(procs, []byte(strconv.Itoa(c.PID)), 0o600) }
	e := serve(t, workload.Config{Source: b})
	if got := run(t, "ask", before, e.socket).next(t); got.Code != "PermissionDenied" || got.ID != "" {
		t.Errorf("it was answered %+v", got)
	}
}

func TestTenThousandConnectionsOfOneProcess(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b, HandshakeTimeout: time.Minute})
	p := run(t, "flood", "", e.socket, "10000")
	got := p.next(t)
	if got.Open != workload.DefaultMaxConnsPerProcess || got.Refused != 10000-got.Open {
		t.Errorf("%d connections are open and %d refused, want %d and the rest", got.Open, got.Refused, workload.DefaultMaxConnsPerProcess)
	}
	if got.Clear < 9000 {
		t.Errorf("%d of %d refusals say why", got.Clear, got.Refused)
	}
	if n := e.meter.get("workloadapi_refused reason process-connections"); n != int64(got.Refused) {
		t.Errorf("counted %d", n)
	}
	if other := run(t, "watch", "", e.socket).next(t); other.ID != "spiffe://example.test/service/orders" {
		t.Errorf("another process gets %+v", other)
	}
}
