package sensor

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

func newMap(spec ebpf.MapSpec) (*ebpf.Map, error) {
	spec.Name = "redoubt_probe"
	m, err := ebpf.NewMap(&spec)
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	return m, nil
}

// Types for maps that ask for a description of their keys and values.
var (
	btfInt  = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	btfLong = &btf.Int{Name: "long", Size: 8}
)

// storage describes a map of values that live and die with a kernel object.
func storage(typ ebpf.MapType) ebpf.MapSpec {
	return ebpf.MapSpec{Type: typ, KeySize: 4, ValueSize: 8, Key: btfInt, Value: btfLong, Flags: unix.BPF_F_NO_PREALLOC}
}

// mapProbes makes a map of each kind that Redoubt uses.
func mapProbes() []probe {
	var out []probe
	for _, m := range []struct {
		name, least, means string
		spec               ebpf.MapSpec
	}{
		{"hash", "3.19", "policy tables", ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1}},
		{"lru_hash", "4.10", "verdict caches, which forget the oldest", ebpf.MapSpec{Type: ebpf.LRUHash, KeySize: 8, ValueSize: 8, MaxEntries: 1}},
		{"lpm_trie", "4.11", "address ranges of policies", ebpf.MapSpec{Type: ebpf.LPMTrie, KeySize: 8, ValueSize: 8, MaxEntries: 1, Flags: unix.BPF_F_NO_PREALLOC}},
		{"percpu_array", "4.6", "counters", ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 8, MaxEntries: 1}},
		{"ring_buffer", "5.8", "events, in order and without loss unseen", ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 1 << 16}},
		{"sock_hash", "4.18", "sockets by address, for steering", ebpf.MapSpec{Type: ebpf.SockHash, KeySize: 8, ValueSize: 8, MaxEntries: 1}},
		{"sk_storage", "5.2", "what is known of a socket", storage(ebpf.SkStorage)},
		{"inode_storage", "5.10", "verdicts cached on the file", storage(ebpf.InodeStorage)},
		{"task_storage", "5.11", "the identity of a process, looked up in no table", storage(ebpf.TaskStorage)},
		{"cgroup_storage", "6.2", "the identity of a workload, on its cgroup", storage(ebpf.CgroupStorage)},
	} {
		out = append(out, probe{Name("map." + m.name), KindMap, m.least, m.means, func(*scene) error {
			made, err := newMap(m.spec)
			if err != nil {
				return err
			}
			return made.Close()
		}})
	}
	return out
}

// loads asks by loading a program alone, where that is what the kernel decides on.
func loads(spec func() ebpf.ProgramSpec) func(*scene) error {
	return func(*scene) error {
		s := spec()
		s.Name = "redoubt_probe"
		p, err := load(&s)
		if err != nil {
			return err
		}
		return p.Close()
	}
}

// helperProbes loads a program that calls each helper as it is to be called, so that the verifier has nothing else to
// refuse.
var helperProbes = []probe{
	{"helper.loop", KindHelper, "5.17", "walks paths in the kernel within the verifier's bounds", loads(func() ebpf.ProgramSpec {
		proto := func(name string, linkage btf.FuncLinkage) *btf.Func {
			return &btf.Func{Name: name, Linkage: linkage, Type: &btf.FuncProto{Return: btfInt, Params: []btf.FuncParam{
				{Name: "i", Type: btfInt}, {Name: "ctx", Type: &btf.Pointer{Target: &btf.Void{}}},
			}}}
		}
		callback := asm.LoadImm(asm.R2, -1, asm.DWord).WithReference("step")
		callback.Src = asm.PseudoFunc
		return ebpf.ProgramSpec{Type: ebpf.RawTracepoint, Instructions: asm.Instructions{
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R1, 1).WithSymbol("entry"), proto("entry", btf.GlobalFunc)),
			callback,
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnLoop.Call(),
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, 1).WithSymbol("step"), proto("step", btf.StaticFunc)),
			asm.Return(),
		}}
	})},
	{"helper.send_signal", KindHelper, "5.3", "ends a process that must not run, before its first instruction", loads(func() ebpf.ProgramSpec {
		return ebpf.ProgramSpec{Type: ebpf.RawTracepoint, Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(unix.SIGKILL)), asm.FnSendSignal.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return(),
		}}
	})},
	{"helper.set_retval", KindHelper, "5.18", "refuses a connection with an error number of our choice", loads(func() ebpf.ProgramSpec {
		return ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, -int32(unix.ECONNREFUSED)), asm.FnSetRetval.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return(),
		}}
	})},
	{"helper.cgroup_id", KindHelper, "4.18", "tells which workload calls", loads(func() ebpf.ProgramSpec {
		return ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: asm.Instructions{
			asm.FnGetCurrentCgroupId.Call(), asm.Mov.Imm(asm.R0, 1), asm.Return(),
		}}
	})},
	{"helper.socket_cookie", KindHelper, "5.8", "tells one connection from another, in every hook that it passes", loads(func() ebpf.ProgramSpec {
		return ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, Instructions: asm.Instructions{
			asm.FnGetSocketCookie.Call(), asm.Mov.Imm(asm.R0, 1), asm.Return(),
		}}
	})},
	{"helper.override_return", KindHelper, "4.16", "refuses a system call by a kprobe", loads(func() ebpf.ProgramSpec {
		return ebpf.ProgramSpec{Type: ebpf.Kprobe, Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, -int32(unix.EPERM)), asm.FnOverrideReturn.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return(),
		}}
	})},
	{"helper.timer", KindHelper, "5.15", "ends what has expired, in the kernel", func(*scene) error {
		timer := &btf.Struct{Name: "bpf_timer", Size: 16, Members: []btf.Member{
			{Name: "a", Type: btfLong}, {Name: "b", Type: btfLong, Offset: 64},
		}}
		value := &btf.Struct{Name: "value", Size: 16, Members: []btf.Member{{Name: "t", Type: timer}}}
		m, err := newMap(ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 16, MaxEntries: 1, Key: btfInt, Value: value})
		if err != nil {
			return err
		}
		defer m.Close()
		const monotonic = 1
		p, err := load(&ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.SchedCLS, Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "end"),
			asm.Mov.Reg(asm.R1, asm.R0),
			asm.LoadMapPtr(asm.R2, m.FD()),
			asm.Mov.Imm(asm.R3, monotonic),
			asm.FnTimerInit.Call(),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
			asm.Return(),
		}})
		if err != nil {
			return err
		}
		return p.Close()
	}},
}

// errNeverRan says that the kernel took a program, and did not run it.
var errNeverRan = errors.New("it was attached, and never ran")
