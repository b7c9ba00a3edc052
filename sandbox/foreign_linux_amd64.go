package sandbox

import (
	"fmt"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// haveForeignCalls says that this build can make system calls of another architecture.
const haveForeignCalls = true

// Numbers of the 32-bit system calls (asm/unistd_32.h).
const (
	i386Socket       = 359
	i386IOUringSetup = 425
)

// int80 makes a 32-bit system call and returns what it returns: a negative errno if it failed.
func int80(nr, a, b, c uint32) int32

// foreignCalls makes the calls that the filter denies by their 64-bit numbers through the 32-bit entry, where the
// numbers differ, and one of x32.
func foreignCalls() outcome {
	calls := []struct {
		name string
		call func() int32
	}{
		{"int 0x80 socket(AF_VSOCK)", func() int32 { return int80(i386Socket, unix.AF_VSOCK, unix.SOCK_STREAM, 0) }},
		{"int 0x80 socket(AF_INET)", func() int32 { return int80(i386Socket, unix.AF_INET, unix.SOCK_STREAM, 0) }},
		{"int 0x80 io_uring_setup", func() int32 { return int80(i386IOUringSetup, 0, 0, 0) }},
		{"x32 getpid", func() int32 {
			r, _, errno := unix.RawSyscall(x32Bit|unix.SYS_GETPID, 0, 0, 0)
			if errno != 0 {
				return -int32(errno)
			}
			return int32(r)
		}},
	}
	for _, c := range calls {
		r, fault := faulting(c.call)
		if fault {
			continue // the kernel has no such entry: the processor refused it
		}
		if r != -int32(unix.EPERM) {
			return outcome{Name: ProtectForeign, How: fmt.Sprintf("%s was answered by %d", c.name, r)}
		}
	}
	return outcome{Name: ProtectForeign, Refused: true, How: "EPERM"}
}

// faulting makes a call that may end in a fault (SIGSEGV), as int 0x80 does where the kernel has no 32-bit calls.
func faulting(call func() int32) (r int32, fault bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			fault = true
		}
	}()
	return call(), false
}
