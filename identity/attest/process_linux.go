package attest

import "context"

// Attestor reads facts of processes.
//
// Concurrency: safe.
type Attestor struct{ config Config }

// New returns an Attestor.
func New(c Config) (*Attestor, error) { return &Attestor{config: c}, nil }

// CgroupRoot returns the directory at which the unified hierarchy is mounted.
func (a *Attestor) CgroupRoot() string { return a.config.CgroupRoot }

// Process returns what is known of the process now.
func (a *Attestor) Process(ctx context.Context, pid int) (Subject, error) { return Subject{}, nil }

// Resolve returns what name (a systemd unit, a process id or a cgroup path) stands for.
func (a *Attestor) Resolve(ctx context.Context, name string) (Target, error) { return Target{}, nil }

// Containers returns the first process of every container that runs now.
func (a *Attestor) Containers(ctx context.Context) ([]Subject, error) { return nil, nil }

// CgroupRoot returns the directory at which the unified hierarchy is mounted, hybrid set-ups included.
func CgroupRoot() (string, error) { return "", nil }

// CgroupIDOf returns the kernel's id of the cgroup whose directory is path.
func CgroupIDOf(path string) (uint64, error) { return 0, nil }
