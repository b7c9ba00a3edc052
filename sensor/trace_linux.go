package sensor

import (
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// syscallSymbol is the kernel's function behind a system call.
func syscallSymbol(name string) string {
	switch runtime.GOARCH {
	case "amd64":
		return "__x64_sys_" + name
	case "arm64":
		return "__arm64_sys_" + name
	default:
		return "sys_" + name
	}
}

// thread is the calling thread as bpf_get_current_pid_tgid gives it.
func thread() int64 { return int64(unix.Getpid())<<32 | int64(unix.Gettid()) }

// marks is a program that sets the one value of m to 1 if it runs on the thread me, and returns 0.
func marks(m *ebpf.Map, me int64) asm.Instructions {
	return asm.Instructions{
		asm.FnGetCurrentPidTgid.Call(),
		asm.LoadImm(asm.R1, me, asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R1, "end"),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, m.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "end"),
		asm.StoreImm(asm.R0, 0, 1, asm.Word),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
		asm.Return(),
	}
}

// watches asks by attaching a program that watches getpgid, calling that on this thread, and looking whether the
// program has run. It does nothing to other threads, and is gone within a millisecond or two.
func watches(spec ebpf.ProgramSpec, attach func(*ebpf.Program) (link.Link, error)) func(*scene) error {
	return func(*scene) error {
		return onThread(func() error {
			m, err := newMap(ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
			if err != nil {
				return err
			}
			defer m.Close()
			s := spec
			s.Name, s.Instructions = "redoubt_probe", marks(m, thread())
			p, err := load(&s)
			if err != nil {
				return err
			}
			defer p.Close()
			l, err := attach(p)
			if err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			defer l.Close()
			if _, err := unix.Getpgid(0); err != nil {
				return fmt.Errorf("getpgid: %w", err)
			}
			var ran uint32
			if err := m.Lookup(uint32(0), &ran); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			if ran == 0 {
				return errNeverRan
			}
			return nil
		})
	}
}

// ownTracefs shows the calling thread a tracefs, which gives tracepoints their numbers, where the machine has mounted
// none: the kernel is asked here, and not what happens to be mounted.
func ownTracefs() error {
	const dir = "/sys/kernel/tracing"
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.TRACEFS_MAGIC {
		return nil
	}
	if err := ownMounts(); err != nil {
		return err
	}
	if err := unix.Mount("redoubt-probe", dir, "tracefs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount tracefs: %w", err)
	}
	return nil
}

func attachTracing(p *ebpf.Program) (link.Link, error) {
	return link.AttachTracing(link.TracingOptions{Program: p})
}

var traceProbes = []probe{
	{
		"trace.raw_tracepoint", KindTrace, "4.17", "sees exec, fork and exit of every process",
		watches(ebpf.ProgramSpec{Type: ebpf.RawTracepoint}, func(p *ebpf.Program) (link.Link, error) {
			return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: p})
		}),
	},
	{
		"trace.tp_btf", KindTrace, "5.5", "sees the same with typed arguments",
		watches(ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "sys_enter"}, attachTracing),
	},
	{
		"trace.tracepoint", KindTrace, "4.7", "sees single system calls",
		watches(ebpf.ProgramSpec{Type: ebpf.TracePoint}, func(p *ebpf.Program) (link.Link, error) {
			if err := ownTracefs(); err != nil {
				return nil, err
			}
			return link.Tracepoint("syscalls", "sys_enter_getpgid", p, nil)
		}),
	},
	{
		"trace.kprobe", KindTrace, "4.1", "sees any function of the kernel",
		watches(ebpf.ProgramSpec{Type: ebpf.Kprobe}, func(p *ebpf.Program) (link.Link, error) {
			if err := ownTracefs(); err != nil {
				return nil, err
			}
			return link.Kprobe(syscallSymbol("getpgid"), p, nil)
		}),
	},
	{
		"trace.fentry", KindTrace, "5.5", "sees any function of the kernel, for less",
		watches(ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: syscallSymbol("getpgid")}, attachTracing),
	},
	{
		"trace.fexit", KindTrace, "5.5", "sees what a function of the kernel has answered",
		watches(ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFExit, AttachTo: syscallSymbol("getpgid")}, attachTracing),
	},
	{"trace.iter_task", KindTrace, "5.8", "lists the processes that were there before Redoubt", func(*scene) error {
		p, err := load(&ebpf.ProgramSpec{
			Name: "redoubt_probe", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "task", Instructions: always(0),
		})
		if err != nil {
			return err
		}
		defer p.Close()
		l, err := link.AttachIter(link.IterOptions{Program: p})
		if err != nil {
			return fmt.Errorf("attach: %w", err)
		}
		defer func() { _ = l.Close() }()
		r, err := l.Open()
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		_, err = io.Copy(io.Discard, r)
		return errors.Join(err, r.Close())
	}},
}

// lsmHooks are the security hooks at which Redoubt refuses, where the kernel lets it.
var lsmHooks = []struct{ hook, least, means string }{
	{"bprm_check_security", "5.7", "refuses to execute a program"},
	{"file_open", "5.7", "refuses to open a file"},
	{"file_mprotect", "5.7", "refuses to make memory executable"},
	{"mmap_file", "5.7", "refuses to map code"},
	{"socket_create", "5.7", "refuses kinds of sockets that no cgroup hook sees: AF_PACKET, vsock"},
	{"socket_connect", "5.7", "refuses a connection of any protocol"},
	{"task_fix_setuid", "5.7", "refuses to become another user"},
	{"ptrace_access_check", "5.7", "refuses to trace another process"},
	{"sb_mount", "5.7", "refuses to mount"},
	{"bpf", "5.7", "protects Redoubt's own programs"},
}

// lsmProbes first has the kernel refuse something for real; then it attaches a program that refuses nothing to each hook.
func lsmProbes() []probe {
	out := []probe{{"lsm.denies", KindLSM, "5.7", "proof that BPF LSM refuses: this thread asks for its own priority again, and gets EPERM", lsmDenies}}
	for _, h := range lsmHooks {
		out = append(out, probe{Name("lsm." + h.hook), KindLSM, h.least, h.means, func(*scene) error {
			l, err := attachLSM(h.hook, always(0))
			if err != nil {
				return err
			}
			return l.Close()
		}})
	}
	return out
}

func attachLSM(hook string, body asm.Instructions) (link.Link, error) {
	p, err := load(&ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.LSM, AttachType: ebpf.AttachLSMMac, AttachTo: hook, Instructions: body})
	if err != nil {
		return nil, err
	}
	defer p.Close() // the link holds it
	l, err := link.AttachLSM(link.LSMOptions{Program: p})
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	return l, nil
}

// lsmDenies finds out whether the kernel asks BPF at all: one that was booted without `bpf` in lsm= takes every program,
// attaches it, and never calls it.
func lsmDenies(*scene) error {
	return onThread(func() error {
		nice := func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, priority()) }
		if err := nice(); err != nil {
			return fmt.Errorf("setpriority, before any program: %w", err)
		}
		l, err := attachLSM("task_setnice", asm.Instructions{
			asm.FnGetCurrentPidTgid.Call(),
			asm.LoadImm(asm.R1, thread(), asm.DWord),
			asm.Mov.Reg(asm.R2, asm.R0),
			asm.Mov.Imm(asm.R0, 0),
			asm.JNE.Reg(asm.R2, asm.R1, "end"),
			asm.Mov.Imm(asm.R0, -int32(unix.EPERM)),
			asm.Return().WithSymbol("end"),
		})
		if err != nil {
			return err
		}
		defer l.Close()
		if err := nice(); !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%w: is bpf missing in the kernel's lsm= parameter?", errNeverRan)
		}
		return nil
	})
}

// priority is the nice value of the calling thread. The system call answers 20 minus that.
func priority() int {
	n, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return 0
	}
	return 20 - n
}
