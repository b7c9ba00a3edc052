// Package sensor is the kernel's door: what this kernel lets Redoubt do (the capability [Ledger]), and the bpffs on which
// programs and links outlive the process that loaded them ([Mount], [Pins], [Unpin]).
//
// The ledger is measured, never inferred. Kernels list an LSM and refuse its programs, are built with a feature and locked
// out of it, or have features of later versions ported back; so each capability is a tiny program that is really loaded,
// and attached where attaching is what fails. Attaching is done to objects made for the purpose (a cgroup, a network
// namespace, a file) that are gone when [Probe] returns.
//
// Trust: nothing outside is read but the kernel's answers. Everything here needs root; without it the ledger is true for
// the caller, and says that it was not root.
package sensor

import (
	"fmt"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// Kind groups capabilities by the part of the kernel that grants them.
type Kind string

// The kinds of capability.
const (
	KindCgroupHook Kind = "cgroup hook"   // BPF programs on a cgroup: the network, devices and sysctls of its processes
	KindTrace      Kind = "tracing"       // BPF programs that watch
	KindLSM        Kind = "lsm"           // BPF programs that refuse at the kernel's security hooks
	KindNetwork    Kind = "network"       // BPF programs on interfaces and network namespaces
	KindMap        Kind = "map"           // BPF maps
	KindHelper     Kind = "helper"        // BPF helpers
	KindFilesystem Kind = "filesystem"    // fanotify, Landlock, bpffs
	KindSyscall    Kind = "system call"   // seccomp
	KindProcess    Kind = "process"       // pidfd, cgroup membership
	KindCgroup     Kind = "control group" // the unified hierarchy
)

// Name is the stable name of a capability: "cgroup.connect4", "lsm.file_open".
type Name string

// Capability is one thing that a kernel can do for Redoubt, and whether this kernel did it when asked.
type Capability struct {
	Name  Name   `json:"name"`
	Kind  Kind   `json:"kind"`
	Works bool   `json:"works"`
	Error string `json:"error,omitempty"` // the kernel's answer where it does not work: "attach: operation not permitted"
	Least string `json:"least"`           // the least version of a mainline kernel that has it: "5.7"
	Means string `json:"means"`           // what Redoubt does with it
	// Took is how long it took to find out.
	Took time.Duration `json:"took_ns"`
}

// Ledger is what one machine's kernel can do, as measured at Time.
//
// Shape: JSON; Entries in a fixed order. Concurrency: immutable once returned.
type Ledger struct {
	Time   time.Time `json:"time"`
	System string    `json:"system"` // linux, darwin
	Arch   string    `json:"arch"`
	Kernel string    `json:"kernel"` // release, as uname says it
	Root   bool      `json:"root"`   // whether it was measured with uid 0
	// CgroupRoot is the cgroup2 mount that hooks were attached below; empty if none was given.
	CgroupRoot string       `json:"cgroup_root,omitempty"`
	Entries    []Capability `json:"entries"`
	// Left names what the probe made and could not remove; empty unless something is badly wrong.
	Left []string `json:"left,omitempty"`
}

// ErrUnsupported is the code of every refusal for want of a capability.
var ErrUnsupported = &refusal.Error{Code: "kernel-unsupported"}

// Get returns the capability of this name, if the ledger has it.
func (l *Ledger) Get(name Name) (Capability, bool) {
	i := slices.IndexFunc(l.Entries, func(c Capability) bool { return c.Name == name })
	if i < 0 {
		return Capability{}, false
	}
	return l.Entries[i], true
}

// Works reports whether every one of these capabilities works here. A name that the ledger does not have does not.
func (l *Ledger) Works(names ...Name) bool { return l.Need(names...) == nil }

// Need returns nil if every one of these capabilities works here, else a refusal that names the first that does not, the
// kernel's answer, and the least kernel that has it. Errors: matches [ErrUnsupported].
func (l *Ledger) Need(names ...Name) error {
	for _, name := range names {
		c, ok := l.Get(name)
		if !ok {
			return &refusal.Error{
				Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: "kernel capability " + string(name),
				Why: fmt.Sprintf("it is not in the ledger of this machine (%s)", l.System), Do: "run redoubt doctor to see what is",
			}
		}
		if err := c.refused(l.Kernel); err != nil {
			return err
		}
	}
	return nil
}

// refused returns nil if the capability works, else why and what would change it.
func (c Capability) refused(kernel string) error {
	if c.Works {
		return nil
	}
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: "kernel capability " + string(c.Name),
		Why: fmt.Sprintf("kernel %s answers: %s", kernel, c.Error),
		Do:  "mainline Linux has it from " + c.Least + " on; a newer kernel, one that permits it, or fewer restrictions on this machine may change that",
	}
}

func count(entries []Capability) (works int) {
	for _, c := range entries {
		if c.Works {
			works++
		}
	}
	return works
}

// Summary is one line for people: "41 of 52 kernel capabilities work on Linux 6.18".
func (l *Ledger) Summary() string {
	return fmt.Sprintf("%d of %d kernel capabilities work on %s %s", count(l.Entries), len(l.Entries), l.System, l.Kernel)
}
