//go:build !linux

package sandbox

import (
	"context"
	"os"
	"runtime"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func unsupported() error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: "sandbox",
		Why: "workloads can be started on Linux only, this is " + runtime.GOOS,
		Do:  "run the agent on a Linux machine; the CLI, server and gateway work here",
	}
}

// Init returns at once: there is nothing to confine with.
func Init() {}

// Process is a started workload; there is none on this system.
type Process struct{}

// Start refuses: this system is not supported.
func Start(context.Context, Spec) (*Process, error) { return nil, unsupported() }

// PID returns 0.
func (*Process) PID() int { return 0 }

// Wait refuses.
func (*Process) Wait() (Exit, error) { return Exit{}, unsupported() }

// Signal refuses.
func (*Process) Signal(os.Signal) error { return unsupported() }

// Cgroup is a directory of the unified hierarchy; there is none on this system.
type Cgroup struct {
	Path string
	ID   uint64
}

// MakeCgroup refuses.
func MakeCgroup(string, string) (*Cgroup, error) { return nil, unsupported() }

// FD returns -1.
func (*Cgroup) FD() int { return -1 }

// Close does nothing.
func (*Cgroup) Close() error { return nil }

// Kill refuses.
func (*Cgroup) Kill() error { return unsupported() }

// Remove refuses.
func (*Cgroup) Remove(context.Context) error { return unsupported() }

// Confinement refuses.
func Confinement(int) (Confined, error) { return Confined{}, unsupported() }

// Prove refuses.
func Prove(context.Context, ProveConfig) ([]policy.Protection, error) { return nil, unsupported() }

// DynamicUser refuses.
func DynamicUser(string, map[uint32]bool) (uint32, error) { return 0, unsupported() }

// LookupUser refuses.
func LookupUser(string) (uid, gid uint32, err error) { return 0, 0, unsupported() }
