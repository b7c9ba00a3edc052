// Package sandbox starts a workload in a cgroup of its own, without privileges. It is what `redoubt run` does to the
// program it starts: the program enters its cgroup at clone, and between clone and exec a re-executed init step (see
// [Init]) takes away what would let it leave: root, capabilities, supplementary groups, a writable cgroupfs, set-user-id
// programs, the operator's terminal and keyring, inherited descriptors, and the system calls that no point of Redoubt
// sees (io_uring, packet and vsock sockets, the calls of foreign architectures).
//
// Every step is checked. One that fails refuses the start, with its name, the reason and what to do; no program is ever
// started half confined. What holds is read back from the kernel before exec ([Confinement]) and proved by attack
// ([Prove]), because a rule that was set is not yet a rule that holds.
//
// Trust: the program is not trusted, nor is what it does to its environment once it runs. The caller, who is root of
// the machine, is. Not defended against: another process of the same user outside the cgroup, which the program may
// trace or have its files run by (a dynamic user has none; see [DynamicUser]), and bugs of the kernel. A privileged
// workload ([Spec.Privileged]) is root and may leave when it likes; it is reported as not enforceable.
//
// Source: clone3(2), capabilities(7), seccomp(2), mount_namespaces(7), keyrings(7); OCI Runtime Specification 1.0.2 for
// the order of the steps.
package sandbox

import (
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Spec says what to start, as whom and where.
//
// Zero value: refused; Argv, UID and GID (unless Privileged) and a cgroup must be given.
type Spec struct {
	// Argv is the program and its arguments. A name without a slash is looked up in the PATH of Env, as the workload's
	// user, in absolute directories only.
	Argv []string
	// Env is the whole environment of the program (key=value); nothing is inherited and nothing added.
	Env []string
	// Dir is the working directory, entered as the workload's user. Empty: "/".
	Dir string
	// CgroupFD is an open directory of the unified hierarchy (O_PATH will do), which Start does not close. 0: open
	// Cgroup.
	CgroupFD int
	// Cgroup is the path of that directory in the file system ("/sys/fs/cgroup/redoubt/w-1"). Ignored if CgroupFD is set.
	Cgroup string
	// UID and GID of the program. 0 is refused unless Privileged.
	UID, GID uint32
	// Privileged leaves the program its capabilities, system calls and cgroupfs, and allows UID 0. It still has a
	// cgroup and a session of its own and no descriptors of the caller's, but nothing holds it there.
	Privileged bool
	// Stdin, Stdout and Stderr of the program; nil is /dev/null.
	Stdin, Stdout, Stderr *os.File
}

// Exit is how a program ended.
type Exit struct {
	Code   int            // exit code, or -1 if a signal ended it
	Signal syscall.Signal // the signal that ended it, or 0
}

// Status returns the exit status a shell would show: the code, or 128 plus the signal.
func (e Exit) Status() int {
	if e.Signal != 0 {
		return 128 + int(e.Signal)
	}
	return e.Code
}

// Codes of refusals of this room.
var (
	ErrSpec          = &refusal.Error{Code: "sandbox-spec"}            // the Spec is wrong
	ErrRootUser      = &refusal.Error{Code: "sandbox-root-user"}       // uid or gid 0 without Privileged
	ErrStep          = &refusal.Error{Code: "sandbox-step"}            // a step of the confinement failed
	ErrMissing       = &refusal.Error{Code: "program-not-found"}       // exit status 127
	ErrNotExecutable = &refusal.Error{Code: "program-not-executable"}  // exit status 126
	ErrNoUser        = &refusal.Error{Code: "sandbox-no-user"}         // no such user, or no dynamic one is free
	ErrUnsupported   = &refusal.Error{Code: "sandbox-not-supported"}   // not Linux
	ErrCgroup        = &refusal.Error{Code: "sandbox-cgroup"}          // a cgroup could not be made or removed
	ErrGone          = &refusal.Error{Code: "sandbox-process-is-gone"} // no such process (any more)
)

// Exit statuses by the convention of shells and env(1).
const (
	StatusRefused       = 1
	StatusNotExecutable = 126
	StatusMissing       = 127
)

// ExitStatus returns the exit status with which a launcher reports a failure of [Start]: 127 if the program was not
// found, 126 if it could not be executed, else 1.
func ExitStatus(err error) int {
	switch {
	case errors.Is(err, ErrMissing):
		return StatusMissing
	case errors.Is(err, ErrNotExecutable):
		return StatusNotExecutable
	default:
		return StatusRefused
	}
}

// Confined is what the kernel says of a process, as far as it keeps a workload where it was put.
type Confined struct {
	PID        int
	UIDs, GIDs [4]uint32 // real, effective, saved, file system
	Groups     []uint32
	// Inheritable, Permitted, Effective, Bounding and Ambient are the five capability sets.
	Inheritable, Permitted, Effective, Bounding, Ambient uint64
	NoNewPrivs                                           bool
	// Filters is how many seccomp filters are installed.
	Filters int
	// WritableCgroupfs lists the cgroup mounts that are writable in the process's mount namespace, whoever may write.
	WritableCgroupfs []string
}

// Names of the protections that [Prove] reports.
//
// Of cgroupfs it is said that no write succeeds, not that all of it is read-only: as root of a user namespace a workload
// may mount cgroup2 afresh, writable, and sees its own cgroup and what is below. What refuses the write there is that the
// directories belong to root, as those of [MakeCgroup] do; a workload whose cgroup was given to its user can divide it,
// but not leave it.
const (
	Whole              = "run.confinement"     // all of the following
	ProtectCgroup      = "run.leave-cgroup"    // moving itself out of its cgroup
	ProtectCgroupfs    = "run.cgroupfs"        // writing to any cgroup mount, also as root of a user namespace
	ProtectIOUring     = "run.io-uring"        // io_uring_setup, io_uring_enter, io_uring_register
	ProtectPacket      = "run.packet-socket"   // AF_PACKET sockets, also as root of a user namespace
	ProtectVsock       = "run.vsock"           // AF_VSOCK sockets
	ProtectForeign     = "run.foreign-syscall" // 32-bit and x32 system calls
	ProtectCaps        = "run.capabilities"    // the five capability sets are empty
	ProtectNoNewPrivs  = "run.no-new-privs"    // privileges cannot be gained by exec
	ProtectSetUID      = "run.setuid"          // a set-user-id root program gains nothing
	reasonPrivileged   = "privileged workload"
	changePrivileged   = "run it without --privileged, as an unprivileged user"
	changeNotOurs      = "start it with redoubt run, which confines it"
	changeUntried      = "see that the machine has memory, processes and descriptors to spare; it is tried again"
	changeProbeFailure = "report this with the output of redoubt doctor: the rule is set but does not hold"
)

// Privileged returns the protection of a workload that was started with [Spec.Privileged].
func Privileged(machine, workload string) policy.Protection {
	return policy.Protection{
		Machine: machine, Workload: workload, Name: Whole,
		State: policy.NotEnforceable, Reason: reasonPrivileged, Change: changePrivileged,
	}
}

// ProveConfig says where [Prove] may try.
type ProveConfig struct {
	// CgroupRoot is a directory of the unified hierarchy in which a throw-away cgroup may be made.
	CgroupRoot string
	// Machine is copied into the protections.
	Machine string
	// UID to run as, with a group of the same number. 0: a dynamic one.
	UID uint32
	// Taken are user ids that a dynamic one must not be.
	Taken map[uint32]bool
	// Meter counts sandbox_probes{probe,result}. nil: [event.NoMeter].
	Meter event.Meter
	// Now is the clock of Proved. nil: time.Now.
	Now func() time.Time
}

// Lacks says, one clause each, what keeps this process from being held in its cgroup; none if it is confined as [Start]
// confines.
func (c Confined) Lacks() []string {
	var lacks []string
	add := func(bad bool, why string) {
		if bad {
			lacks = append(lacks, why)
		}
	}
	add(slices.Contains(c.UIDs[:], 0), "it runs as root")
	add(slices.Contains(c.GIDs[:], 0), "its group is root's")
	add(len(c.Groups) > 0, "it has supplementary groups")
	add(c.Permitted|c.Effective|c.Inheritable|c.Ambient != 0, "it has capabilities")
	add(c.Bounding != 0, "its capability bounding set is not empty")
	add(!c.NoNewPrivs, "it may gain privileges by exec (no_new_privs is not set)")
	add(c.Filters == 0, "its system calls are not filtered")
	add(len(c.WritableCgroupfs) > 0, "cgroupfs is writable in its mount namespace")
	return lacks
}

// Protection returns the protection of the workload that this is, given what [Prove] found on the machine. It is
// enforced only if nothing lacks and the attack on the whole was refused.
func (c Confined) Protection(machine, workload string, proofs []policy.Protection) policy.Protection {
	p := policy.Protection{Machine: machine, Workload: workload, Name: Whole, State: policy.NotEnforceable}
	lacks := c.Lacks()
	i := slices.IndexFunc(proofs, func(p policy.Protection) bool { return p.Name == Whole })
	switch {
	case c.UIDs[1] == 0:
		return Privileged(machine, workload)
	case len(lacks) > 0:
		p.Reason, p.Change = strings.Join(lacks, "; "), changeNotOurs
	case i < 0:
		p.Reason, p.Change = "no probe has proved it on this machine yet", "run redoubt doctor"
	default:
		p.State, p.Proved, p.Reason, p.Change = proofs[i].State, proofs[i].Proved, proofs[i].Reason, proofs[i].Change
	}
	return p
}
