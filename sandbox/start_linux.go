package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of what crosses the two pipes.
const (
	// maxSpecBytes bounds the spec that the init step reads: the kernel takes at most a third of that for argv and env.
	maxSpecBytes = 16 << 20
	// maxReportBytes bounds what the init step may report.
	maxReportBytes = 64 << 10
)

// The descriptors of the init step.
const (
	specFD   = 3
	reportFD = 4
	selfFD   = 5 // this executable, of a probe only
)

// armed is set by Init: a Start in a program that does not call Init would execute that program again, and again.
var armed atomic.Bool

// wire is the spec as the init step reads it, as JSON. Bytes, because arguments and environment need not be UTF-8.
type wire struct {
	Argv, Env  [][]byte
	Dir        []byte
	UID, GID   uint32
	Privileged bool
	// HostMounts names the mount namespace of the agent ("mnt:[4026531841]"), which the init step must not change.
	HostMounts string
	// Self executes descriptor selfFD instead of Argv[0].
	Self bool
}

// Process is a workload that was started by [Start].
//
// Concurrency: safe, except that Wait is called once.
type Process struct{ proc *os.Process }

// Start starts the program of spec, confined, and returns once it was executed. ctx bounds the start only; the caller
// waits for the process, forwards signals to it and kills it, or its cgroup.
//
// Errors: matches [ErrSpec], [ErrRootUser], [ErrStep], [ErrMissing] or [ErrNotExecutable], or ctx's; nothing runs then.
func Start(ctx context.Context, spec Spec) (*Process, error) { return start(ctx, spec, nil) }

func start(ctx context.Context, spec Spec, self *os.File) (*Process, error) {
	if err := check(spec); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	what := "start of " + program(spec)
	cgroup := spec.CgroupFD
	if cgroup == 0 {
		fd, err := unix.Open(spec.Cgroup, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, stepRefused(what, "cgroup", fmt.Errorf("open %s: %w", spec.Cgroup, err))
		}
		defer func() { _ = unix.Close(fd) }()
		cgroup = fd
	}
	if !onCgroup2(cgroup) {
		return nil, stepRefused(what, "cgroup", errors.New("it is no directory of the unified hierarchy (cgroup2)"))
	}
	files, release, err := standardFiles(spec)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer release()
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, stepRefused(what, "mount namespace", err)
	}
	return launch(ctx, what, cgroup, files, self, encode(spec, mounts, self != nil))
}

func check(spec Spec) error {
	bad := func(why, do string) error {
		return &refusal.Error{Kind: refusal.Invalid, Code: ErrSpec.Code, What: "start of " + program(spec), Why: why, Do: do}
	}
	switch {
	case !armed.Load():
		return bad("sandbox.Init was not called, so this program cannot be its own init step", "call it in the first line of main")
	case len(spec.Argv) == 0 || spec.Argv[0] == "":
		return bad("no program is given", "name one after --")
	case spec.CgroupFD < 0 || spec.CgroupFD == 0 && spec.Cgroup == "":
		return bad("no cgroup is given", "make one for it with sandbox.MakeCgroup")
	case spec.UID == ^uint32(0) || spec.GID == ^uint32(0):
		return bad("user and group 4294967295 stand for nobody", "give another")
	case !spec.Privileged && (spec.UID == 0 || spec.GID == 0):
		return &refusal.Error{
			Kind: refusal.Denied, Code: ErrRootUser.Code, What: "start of " + program(spec),
			Why: "root, even without capabilities, leaves its cgroup by writing one file",
			Do:  "give an unprivileged --user and group, or accept with --privileged that nothing holds it",
		}
	}
	for _, list := range [][]string{spec.Argv, spec.Env, {spec.Dir}} {
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return bad("an argument, variable or directory holds a zero byte", "leave it out")
			}
		}
	}
	return nil
}

func program(spec Spec) string {
	if len(spec.Argv) == 0 || spec.Argv[0] == "" {
		return "a workload"
	}
	return fmt.Sprintf("%q", spec.Argv[0])
}

// onCgroup2 reports whether the descriptor is a directory of the unified hierarchy.
func onCgroup2(fd int) bool {
	var s unix.Statfs_t
	return unix.Fstatfs(fd, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

// standardFiles returns descriptors 0 to 2 and what closes those that were opened here.
func standardFiles(spec Spec) ([]*os.File, func(), error) {
	files := []*os.File{spec.Stdin, spec.Stdout, spec.Stderr}
	var null *os.File
	for i, f := range files {
		if f != nil {
			continue
		}
		if null == nil {
			var err error
			if null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
				return nil, nil, err
			}
		}
		files[i] = null
	}
	return files, func() {
		if null != nil {
			_ = null.Close()
		}
	}, nil
}

func encode(spec Spec, mounts string, self bool) []byte {
	bytesOf := func(list []string) [][]byte {
		out := make([][]byte, len(list))
		for i, s := range list {
			out[i] = []byte(s)
		}
		return out
	}
	data, _ := json.Marshal(wire{ // plain data: cannot fail
		Argv: bytesOf(spec.Argv), Env: bytesOf(spec.Env), Dir: []byte(spec.Dir),
		UID: spec.UID, GID: spec.GID, Privileged: spec.Privileged, HostMounts: mounts, Self: self,
	})
	return data
}

// launch re-executes this program as the init step in the cgroup, hands it the spec and reads its report.
func launch(ctx context.Context, what string, cgroup int, files []*os.File, self *os.File, spec []byte) (*Process, error) {
	if len(spec) > maxSpecBytes {
		return nil, &refusal.Error{
			Kind: refusal.Exhausted, Code: ErrSpec.Code, What: what,
			Why: fmt.Sprintf("arguments and environment are larger than %d bytes as a whole", maxSpecBytes), Do: "pass large data in a file",
		}
	}
	specR, specW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = specW.Close() }()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		_ = specR.Close()
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	defer func() { _ = reportR.Close() }()
	files = append(files, specR, reportW)
	if self != nil {
		files = append(files, self)
	}
	proc, err := os.StartProcess("/proc/self/exe", []string{initName}, &os.ProcAttr{
		Dir: "/", Files: files,
		Env: []string{"GOMAXPROCS=1", "GOGC=off", "GOTRACEBACK=none"}, // of the init step; the program gets spec.Env
		Sys: &syscall.SysProcAttr{
			UseCgroupFD: true, CgroupFD: cgroup, // CLONE_INTO_CGROUP: not one instruction runs outside
			// A session of its own: the operator's terminal is not its controlling terminal, so TIOCSTI cannot type there.
			Setsid: true,
		},
	})
	_ = specR.Close()
	_ = reportW.Close()
	if err != nil {
		return nil, stepRefused(what, "cgroup", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = proc.Kill() })
	_, sendErr := specW.Write(spec)
	_ = specW.Close()
	report, readErr := io.ReadAll(io.LimitReader(reportR, maxReportBytes))
	if !stop() {
		_, _ = proc.Wait()
		return nil, ctx.Err()
	}
	if readErr == nil && string(report) == reportConfined {
		return &Process{proc: proc}, nil
	}
	_ = proc.Kill()
	state, _ := proc.Wait()
	return nil, refused(what, report, state, errors.Join(sendErr, readErr))
}

// refused turns the report of an init step that did not end in exec into a refusal.
func refused(what string, report []byte, state *os.ProcessState, cause error) error {
	var f failure
	if err := json.Unmarshal([]byte(strings.TrimPrefix(string(report), reportConfined)), &f); err != nil || f.Code == "" {
		return stepRefused(what, "init", errors.Join(fmt.Errorf("the init step ended without a word (%v)", state), cause))
	}
	return &refusal.Error{Kind: f.Kind, Code: f.Code, What: what, Why: f.Why, Do: f.Do, Err: syscall.Errno(f.Errno)}
}

// PID returns the process id, in the caller's pid namespace.
func (p *Process) PID() int { return p.proc.Pid }

// Wait waits for the end of the program and reaps it. Errors: the process was waited for already.
func (p *Process) Wait() (Exit, error) {
	state, err := p.proc.Wait()
	if err != nil {
		return Exit{}, err
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return Exit{Code: -1, Signal: status.Signal()}, nil
	}
	return Exit{Code: state.ExitCode()}, nil
}

// Signal sends a signal to the program, not to its children. Errors: [os.ErrProcessDone] once it has been reaped.
func (p *Process) Signal(sig os.Signal) error { return p.proc.Signal(sig) }
