package workload

import (
	"net"
	"os"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// Method is how the kernel was asked who a caller is; better kernels leave less to check.
type Method string

// The methods, best first.
const (
	// ByPeerInfo asks SO_PEERPIDFD who connected and PIDFD_GET_INFO for its cgroup: no pid is ever looked up. Linux 6.13.
	ByPeerInfo Method = "peerpidfd-info"
	// ByPeerPidfd asks SO_PEERPIDFD who connected and reads the cgroup from /proc, then looks whether the process still
	// lives: it held its pid while /proc was read. Linux 6.5.
	ByPeerPidfd Method = "peerpidfd"
	// ByPid opens a pidfd of the pid that SO_PEERCRED remembers. Another process may have that pid by then, so one that
	// started after the connection was accepted is refused; the cgroup is read after that, and then liveness. What stays
	// open is the instant between connect(2) and accept(2), in which all pids would have to be used up once. Linux 5.3.
	ByPid Method = "pid"
)

// The codes of refusals of a caller. Each of them is answered PERMISSION_DENIED.
var (
	// ErrCallerGone says that the process that connected has ended, whoever else holds its socket.
	ErrCallerGone = &refusal.Error{Code: "caller-gone"}
	// ErrCallerMoved says that it is no longer in the cgroup from which it was accepted.
	ErrCallerMoved = &refusal.Error{Code: "caller-moved"}
	// ErrCallerUnknown says that the kernel does not show who it is: another pid or cgroup namespace, or no cgroup.
	ErrCallerUnknown = &refusal.Error{Code: "caller-unknown"}
)

// Options says how callers are identified. The zero value is right outside of tests.
type Options struct {
	// CgroupRoot is where the unified cgroup hierarchy is mounted; "" finds it in the mount table (hybrid too).
	CgroupRoot string
	// Method forces a method; "" takes the best that the kernel has.
	Method Method
	// Accepted is when the connection was accepted, as time since boot (CLOCK_BOOTTIME); 0 is now. Used by [ByPid].
	Accepted time.Duration
}

// Caller is the process at the other end of a connection: the one that called connect(2), held by a pidfd.
//
// Shape: PID is as this process's pid namespace sees it; UID and GID are the effective ids at connect; Cgroup is the path
// within the unified hierarchy, beginning with a slash, and CgroupID the inode number of that directory; Start is when the
// process started, in clock ticks (1/100 s) since boot.
// Zero value: nobody; it is never alive. Concurrency: fields are immutable, methods safe.
type Caller struct {
	PID      int
	UID, GID uint32
	Cgroup   string
	CgroupID uint64
	Start    uint64
	Method   Method

	pidfd *os.File
	root  string // the unified hierarchy
}

// Identify returns who connected to conn. Close the caller when done with it.
//
// Errors: matches [ErrCallerGone] or [ErrCallerUnknown]; "unsupported" where the operating system is not Linux.
// Trust: the peer is hostile. It may have forked, executed another program, passed the socket on, ended, or given up its
// pid to another process; none of that changes who is returned.
func Identify(conn *net.UnixConn, o Options) (*Caller, error) { return identify(conn, o) }

// Alive returns nil while the process lives, [ErrCallerGone] once it has ended (a zombie has ended).
func (c *Caller) Alive() error {
	if c.pidfd == nil || exited(c.pidfd) {
		return callerGone()
	}
	return nil
}

// Verify returns nil while the caller is what it was when it was identified: alive, and in the same cgroup.
// Errors: matches [ErrCallerGone] or [ErrCallerMoved].
func (c *Caller) Verify() error {
	if err := c.Alive(); err != nil {
		return err
	}
	id, err := cgroupNow(c)
	if err != nil {
		return err
	}
	if id != c.CgroupID {
		return &refusal.Error{
			Kind: refusal.Denied, Code: ErrCallerMoved.Code, What: "Workload API",
			Why: "the process that connected has been moved to another cgroup since",
			Do:  "connect again",
		}
	}
	return nil
}

// Wait returns when the process has ended or the caller is closed.
func (c *Caller) Wait() {
	if c.pidfd != nil {
		waitExit(c.pidfd)
	}
}

// Close lets go of the process; [Caller.Alive] fails from then on.
func (c *Caller) Close() error {
	if c.pidfd == nil {
		return nil
	}
	return c.pidfd.Close()
}

func callerGone() error {
	return &refusal.Error{
		Kind: refusal.Denied, Code: ErrCallerGone.Code, What: "Workload API",
		Why: "the process that connected has ended; an identity is not inherited with a socket",
		Do:  "connect from the process that needs the identity",
	}
}

func callerUnknown(why, do string) error {
	return &refusal.Error{Kind: refusal.Denied, Code: ErrCallerUnknown.Code, What: "Workload API", Why: why, Do: do}
}
