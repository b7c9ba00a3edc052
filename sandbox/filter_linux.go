package sandbox

import (
	"errors"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (linux/seccomp.h). Arguments are 64 bits; the kernel reads the low half of socket's,
// which is the first of the two words on the little-endian machines that nativeArch knows.
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArg0   = 16
	offsetArg1   = 24
)

// x32Bit marks the x32 system calls of amd64, which share its architecture. The invalid number -1 has it too.
const x32Bit = 0x40000000

// sockPacket is SOCK_PACKET, by which AF_INET makes a packet socket (net/socket.c, __sock_create); sockTypeMask is
// SOCK_TYPE_MASK, which takes SOCK_CLOEXEC and SOCK_NONBLOCK off the type.
const (
	sockPacket   = 10
	sockTypeMask = 0xf
)

// nativeArch is the audit architecture of this build, or 0 where the filter is not known to be right.
func nativeArch() uint32 {
	switch runtime.GOARCH {
	case "amd64":
		return unix.AUDIT_ARCH_X86_64
	case "arm64":
		return unix.AUDIT_ARCH_AARCH64
	default:
		return 0
	}
}

// filterSystemCalls installs the filter on this thread; exec carries it to the program, and fork to its children.
func filterSystemCalls(wire) error {
	arch := nativeArch()
	if arch == 0 {
		return errors.New("no filter is known for this architecture")
	}
	prog := filter(arch)
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	return asError(errno)
}

// filter returns the classic BPF program: EPERM for the calls of another architecture, for io_uring (whose operations no
// later rule sees), and for packet and vsock sockets (which no cgroup hook sees); everything else is allowed.
func filter(arch uint32) []unix.SockFilter {
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jset = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		and  = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
	)
	// A jump to deny or allow is written as a mark and resolved below.
	const next, deny, allow = 0, 254, 255
	p := []unix.SockFilter{
		{Code: load, K: offsetArch},
		{Code: jeq, K: arch, Jt: next, Jf: deny}, // int 0x80, 32-bit programs
		{Code: load, K: offsetNumber},
	}
	if arch == unix.AUDIT_ARCH_X86_64 {
		p = append(p, unix.SockFilter{Code: jset, K: x32Bit, Jt: deny, Jf: next})
	}
	for _, nr := range []uint32{unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER} {
		p = append(p, unix.SockFilter{Code: jeq, K: nr, Jt: deny, Jf: next})
	}
	p = append(
		p,
		unix.SockFilter{Code: jeq, K: unix.SYS_SOCKET, Jt: next, Jf: allow},
		unix.SockFilter{Code: load, K: offsetArg0},
		unix.SockFilter{Code: jeq, K: unix.AF_PACKET, Jt: deny, Jf: next},
		unix.SockFilter{Code: jeq, K: unix.AF_VSOCK, Jt: deny, Jf: next},
		unix.SockFilter{Code: jeq, K: unix.AF_INET, Jt: next, Jf: allow},
		unix.SockFilter{Code: load, K: offsetArg1},
		unix.SockFilter{Code: and, K: sockTypeMask},
		unix.SockFilter{Code: jeq, K: sockPacket, Jt: deny, Jf: allow},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	)
	resolve := func(mark uint8, at int) uint8 {
		switch mark {
		case allow:
			return uint8(len(p) - 2 - at - 1)
		case deny:
			return uint8(len(p) - 1 - at - 1)
		default:
			return mark
		}
	}
	for i := range p {
		if p[i].Code == jeq || p[i].Code == jset {
			p[i].Jt, p[i].Jf = resolve(p[i].Jt, i), resolve(p[i].Jf, i)
		}
	}
	return p
}
