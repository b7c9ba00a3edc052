// Package attest says what the kernel and the container engine say of a process: its user, executable, cgroup, systemd
// unit, parents and container, as an [identity.FactSet]. Nothing that a process says of itself (arguments, environment,
// command name) becomes a fact.
//
// Trust: the kernel is trusted; the container engine is, for what it says of containers whose cgroup it made. The
// process is not: its names, its files and the moment at which it ends are an attacker's choice, and it may exec, end
// or leave its pid to another while it is read. A process is therefore pinned by a pidfd and read until two readings
// agree, and every text is parsed as an attacker's.
//
// Source: proc(5), cgroups(7), pidfd_open(2); systemd's cgroup path rules; podman-inspect(1); runc's state.json.
package attest

import (
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Config of an [Attestor]. Its zero value works on any Linux machine.
type Config struct {
	// CgroupRoot is where the unified hierarchy is mounted. Empty: found in mountinfo, hybrid set-ups too.
	CgroupRoot string
	// ProcRoot is where proc is mounted. Empty: /proc.
	ProcRoot string
	// Podman is the podman program and the arguments that precede "inspect". Empty: podman, found in PATH; a machine
	// without it has no podman containers.
	Podman []string
	// RuncRoots are the directories in which runc keeps a directory for each container. Empty: /run/runc.
	RuncRoots []string
	// EngineTimeout bounds one question to a container engine. 0: 5 s.
	EngineTimeout time.Duration
	// MaxExecutable is the largest executable that is hashed, in bytes. 0: 1 GiB.
	MaxExecutable int64

	Meter  event.Meter
	Logger *slog.Logger
}

// Subject is what is known of one process at one moment.
type Subject struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot; with PID it names the process for good.
	Start uint64 `json:"start"`
	// Cgroup is the path within the unified hierarchy ("/system.slice/nginx.service"); CgroupID is the kernel's id of it.
	Cgroup   string           `json:"cgroup"`
	CgroupID uint64           `json:"cgroup_id"`
	Facts    identity.FactSet `json:"facts"`
	// Warnings say, one sentence each, which facts could not be had and why.
	Warnings []string `json:"warnings,omitempty"`
}

// Kind is what a [Target] was named as.
type Kind string

// The kinds of target.
const (
	KindPID    Kind = "pid"
	KindCgroup Kind = "cgroup"
	KindUnit   Kind = "unit"
)

// Target is what a name given by an operator stands for.
type Target struct {
	Kind     Kind   `json:"kind"`
	Cgroup   string `json:"cgroup"` // "/" is the root: it holds processes of any kind, and is no workload
	CgroupID uint64 `json:"cgroup_id"`
	// PIDs are the processes in the cgroup and below it, lowest first; of KindPID that process only.
	PIDs []int  `json:"pids"`
	Unit string `json:"unit,omitempty"` // systemd unit, if the cgroup belongs to one
}

// Codes of refusals of this room.
var (
	ErrGone         = &refusal.Error{Code: "process-gone"}            // ended, or its pid now names another
	ErrKernelThread = &refusal.Error{Code: "kernel-thread"}           // has no executable and is no workload
	ErrNotProcess   = &refusal.Error{Code: "not-a-process"}           // a thread, or no pid at all
	ErrChanging     = &refusal.Error{Code: "process-changing"}        // it never stood still long enough to be read
	ErrName         = &refusal.Error{Code: "target-unknown"}          // nothing bears that name
	ErrAmbiguous    = &refusal.Error{Code: "target-ambiguous"}        // more than one cgroup bears that name
	ErrNoCgroup     = &refusal.Error{Code: "no-unified-cgroup"}       // no cgroup2 mount, or out of sight
	ErrUnsupported  = &refusal.Error{Code: "attest-not-supported"}    // not Linux
	ErrProc         = &refusal.Error{Code: "process-not-readable"}    // proc did not say what is needed
	ErrBusy         = &refusal.Error{Code: "attest-too-many-at-once"} // the bound of readings at once was reached
)
