package sensor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// probe is one question to the kernel. It returns nil only if the kernel did what it was asked.
type probe struct {
	name  Name
	kind  Kind
	least string
	means string
	ask   func(s *scene) error
}

// maxAnswerBytes bounds what is kept of a kernel's answer: a verifier explains itself at length.
const maxAnswerBytes = 300

// Probe asks this kernel for each capability in turn, and returns what it answered. It takes well under a second.
//
// cgroupRoot is the cgroup2 mount (in the unified hierarchy, or beside version 1); hooks are attached to a cgroup made
// below it for the purpose, and removed again. With "" they are recorded as not working, and why.
//
// Errors: only those of ctx. What does not work is an entry of the ledger, never an error. Concurrency: safe; several
// probes, of several processes, do not meet.
func Probe(ctx context.Context, cgroupRoot string) (*Ledger, error) {
	l := &Ledger{Time: time.Now().UTC(), System: runtime.GOOS, Arch: runtime.GOARCH, Kernel: release(), Root: os.Geteuid() == 0, CgroupRoot: cgroupRoot}
	s := &scene{}
	s.cgroup, s.cgroupErr = makeCgroup(cgroupRoot)
	defer func() {
		if err := s.close(); err != nil {
			l.Left = append(l.Left, err.Error())
		}
	}()
	for _, questions := range [][]probe{cgroupProbes, hookProbes(), networkProbes, traceProbes, lsmProbes(), mapProbes(), helperProbes, syscallProbes} {
		for _, p := range questions {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			began := time.Now()
			c := Capability{Name: p.name, Kind: p.kind, Least: p.least, Means: p.means}
			if err := p.ask(s); err != nil {
				c.Error = answer(err)
			} else {
				c.Works = true
			}
			c.Took = time.Since(began)
			l.Entries = append(l.Entries, c)
		}
	}
	return l, nil
}

// answer renders an error in one line.
func answer(err error) string {
	if verifier, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		err = fmt.Errorf("load: %w", verifier.Cause)
		for _, line := range slices.Backward(verifier.Log) {
			if !strings.HasPrefix(line, "processed ") { // statistics, after the reason
				err = fmt.Errorf("%w (%s)", err, line)
				break
			}
		}
	}
	text := strings.Join(strings.Fields(err.Error()), " ")
	// A guess of the library's, which is wrong for programs of a few instructions.
	text = strings.Replace(text, " (MEMLOCK may be too low, consider rlimit.RemoveMemlock)", "", 1)
	if len(text) > maxAnswerBytes {
		text = strings.ToValidUTF8(text[:maxAnswerBytes], "") + "…"
	}
	return text
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// onThread runs f on an operating system thread of its own, which ends with f: whatever f does to it (namespaces,
// filters, restrictions) ends as well. Threads that Go starts meanwhile do not descend from it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies with the goroutine
		if unix.Gettid() != unix.Getpid() {
			done <- f()
			return
		}
		// The first thread cannot end without its process. While this goroutine holds it, another gets another.
		done <- onThread(f)
		runtime.UnlockOSThread()
	}()
	return <-done
}

// always is the body of the smallest program: return n.
func always(n int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, n), asm.Return()}
}

// license lets programs call helpers that the kernel keeps for GPL-compatible ones.
const license = "Dual BSD/GPL"

// load loads a program, and says so if that is what failed.
func load(spec *ebpf.ProgramSpec) (*ebpf.Program, error) {
	spec.License = license
	p, err := ebpf.NewProgram(spec)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	return p, nil
}

// scene is what the probes share.
type scene struct {
	cgroup    string // made for the probe; "" if there is none, and then cgroupErr says why
	cgroupErr error
}

func (s *scene) close() error {
	if s.cgroup == "" {
		return nil
	}
	return removeCgroup(s.cgroup)
}
