package sandbox

import (
	"context"
	"os"

	"github.com/redoubtsec/redoubt/policy"
)

// Init is the first line of main: in a re-executed init step it confines itself and becomes the program, and never
// returns; in any other process it returns at once.
func Init() {}

// Process is a workload that was started by [Start].
//
// Concurrency: safe, except that Wait is called once.
type Process struct{ proc *os.Process }

// Start starts the program of spec, confined, and returns when it was executed. ctx bounds the start only. Errors:
// matches [ErrSpec], [ErrRootUser], [ErrStep], [ErrMissing] or [ErrNotExecutable]; nothing runs then.
func Start(context.Context, Spec) (*Process, error) { return nil, nil }

// PID returns the process id, in the caller's namespace.
func (p *Process) PID() int { return p.proc.Pid }

// Wait waits for the end of the program and reaps it.
func (p *Process) Wait() (Exit, error) { return Exit{}, nil }

// Signal sends a signal. Errors: [os.ErrProcessDone] once it has been reaped.
func (p *Process) Signal(sig os.Signal) error { return p.proc.Signal(sig) }

// Cgroup is a directory of the unified hierarchy that this process made.
type Cgroup struct {
	Path string // in the file system
	ID   uint64 // the kernel's id of it: the inode of the directory
	fd   int
}

// MakeCgroup makes the cgroup parent/name and opens it. parent is made too if it is missing.
func MakeCgroup(parent, name string) (*Cgroup, error) { return nil, nil }

// FD returns the open directory, for [Spec.CgroupFD]; it is closed by Close.
func (c *Cgroup) FD() int { return c.fd }

// Close closes the descriptor; the cgroup stays.
func (c *Cgroup) Close() error { return nil }

// Kill kills every process in the cgroup and below.
func (c *Cgroup) Kill() error { return nil }

// Remove waits until the cgroup is empty, removes it and closes the descriptor.
func (c *Cgroup) Remove(ctx context.Context) error { return nil }

// Confinement reads what the kernel says of a process.
func Confinement(pid int) (Confined, error) { return Confined{}, nil }

// Prove attacks a throw-away workload's confinement from within and reports what was refused.
func Prove(ctx context.Context, c ProveConfig) ([]policy.Protection, error) { return nil, nil }

// DynamicUser returns a user id that nothing else on the machine uses.
func DynamicUser(name string, taken map[uint32]bool) (uint32, error) { return 0, nil }

// LookupUser returns the user id and primary group of a user given by name or number.
func LookupUser(name string) (uid, gid uint32, err error) { return 0, 0, nil }
