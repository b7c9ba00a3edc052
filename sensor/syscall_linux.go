package sensor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// pollPatience bounds, in milliseconds, the wait for an event that a probe has caused itself.
const pollPatience = 2000

// errNoEvent says that the kernel took a mark or filter, and told nothing.
var errNoEvent = errors.New("nothing was told of what happened")

// errAllowed says that the kernel took a refusal, and did not refuse.
var errAllowed = errors.New("it was set, and what it refuses was allowed all the same")

// wantErrno returns nil if got is what a refusal looks like.
func wantErrno(got error, want unix.Errno) error {
	if got == nil {
		return errAllowed
	}
	if !errors.Is(got, want) {
		return fmt.Errorf("it was to be refused with %w, and ended with: %w", want, got)
	}
	return nil
}

var syscallProbes = []probe{
	{"seccomp.filter", KindSyscall, "3.17", "denies io_uring, AF_PACKET and vsock to workloads", func(*scene) error {
		return onThread(func() error {
			if _, err := seccomp(0, unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM)); err != nil {
				return err
			}
			return wantErrno(filtered(), unix.EPERM)
		})
	}},
	{"seccomp.notify", KindSyscall, "5.0", "asks a supervisor about single system calls", func(*scene) error { return onThread(seccompNotify) }},
	{"landlock.files", KindFilesystem, "5.13", "shuts a workload out of paths, from the launcher on", func(*scene) error {
		return onThread(func() error {
			if err := landlock(unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_READ_FILE}, 8); err != nil {
				return err
			}
			fd, err := unix.Open("/proc/self/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				_ = unix.Close(fd)
			}
			return wantErrno(err, unix.EACCES)
		})
	}},
	{"landlock.tcp", KindFilesystem, "6.7", "shuts a workload out of TCP ports", func(*scene) error {
		return onThread(func() error {
			if err := landlock(unix.LandlockRulesetAttr{Handled_access_net: unix.LANDLOCK_ACCESS_NET_CONNECT_TCP}, 16); err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return wantErrno(unix.Connect(fd, &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}}), unix.EACCES)
		})
	}},
	{"landlock.scope", KindFilesystem, "6.12", "shuts a workload off from signals and abstract sockets of others", func(*scene) error {
		return onThread(func() error {
			const signals = 2
			if err := unix.Kill(1, 0); err != nil || os.Getpid() == 1 {
				return errors.New("there is no process outside that could be signalled, so that nothing can be proved")
			}
			if err := landlock(unix.LandlockRulesetAttr{Scoped: signals}, 24); err != nil {
				return err
			}
			return wantErrno(unix.Kill(1, 0), unix.EPERM)
		})
	}},
	{"fanotify.open", KindFilesystem, "2.6.37", "decides the opening of files where there is no BPF LSM", func(*scene) error { return fanotifyDenies() }},
	{"fanotify.exec", KindFilesystem, "5.0", "decides the execution of files where there is no BPF LSM", func(*scene) error {
		return onOwnFilesystem("tmpfs", func(dir string) error {
			file := filepath.Join(dir, "probe")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				return err
			}
			return fanotify(file, unix.FAN_MARK_ADD, unix.FAN_OPEN_EXEC_PERM, nil)
		})
	}},
	{"fanotify.filesystem", KindFilesystem, "4.20", "the same on a whole file system, so that no bind mount passes it by", func(*scene) error {
		return onOwnFilesystem("tmpfs", func(dir string) error {
			return fanotify(dir, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN_PERM, nil)
		})
	}},
	{"bpffs.pin", KindFilesystem, "4.4", "programs outlive the agent that loaded them, and can be lifted without it", func(*scene) error {
		return onOwnFilesystem("", pinAndUnpin)
	}},
	{"process.pidfd", KindProcess, "5.3", "holds a process so that its number cannot come to mean another", func(*scene) error {
		fd, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.PidfdSendSignal(fd, 0, nil, 0)
	}},
	{"process.peer_pidfd", KindProcess, "6.5", "tells which process is at the other end of the Workload API (SO_PEERPIDFD)", func(*scene) error { return peerPIDFD() }},
	{"process.pidfd_info", KindProcess, "6.13", "tells its user and cgroup without a race (PIDFD_GET_INFO)", func(*scene) error { return pidfdInfo() }},
}

// The number and size of PIDFD_GET_INFO as it was when it came (Linux 6.13); later kernels take it still.
const (
	pidfdInfoVersion0 = 0xc040ff0b
	pidfdInfoMask     = unix.PIDFD_INFO_PID | unix.PIDFD_INFO_CREDS | unix.PIDFD_INFO_CGROUPID
)

func pidfdInfo() error {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info := unix.PidfdInfo{Mask: pidfdInfoMask}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdInfoVersion0, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return errno
	}
	if info.Mask&pidfdInfoMask != pidfdInfoMask || int(info.Tgid) != os.Getpid() || info.Cgroupid == 0 {
		return fmt.Errorf("it answers with mask %#x, process %d and cgroup %d", info.Mask, info.Tgid, info.Cgroupid)
	}
	return nil
}

func peerPIDFD() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return err
	}
	if !strings.Contains(string(info), fmt.Sprintf("Pid:\t%d\n", os.Getpid())) {
		return errors.New("it names another process")
	}
	return nil
}

// seccomp sets a filter on the calling thread that answers getsid with action and allows everything else.
func seccomp(flags uintptr, action uint32) (listener int, err error) {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("no_new_privs: %w", err)
	}
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_GETSID, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: action},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// filtered makes the call that the filter is about. Not by unix.Getsid: that takes calls for quick ones, and would
// keep its processor while a supervisor thinks.
func filtered() error {
	if _, _, errno := unix.Syscall(unix.SYS_GETSID, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// struct seccomp_notif and struct seccomp_notif_resp, of which only the id and the answer matter here.
type (
	seccompNotif struct {
		id   uint64
		rest [72]byte
	}
	seccompResponse struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

func seccompNotify() error {
	fd, err := seccomp(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, unix.SECCOMP_RET_USER_NOTIF)
	if err != nil {
		return err
	}
	answered := make(chan error, 1)
	go func() {
		answered <- func() error {
			defer unix.Close(fd) // whoever still waits gets ENOSYS
			if err := wait(fd); err != nil {
				return err
			}
			var in seccompNotif
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&in))); errno != 0 {
				return fmt.Errorf("receive: %w", errno)
			}
			out := seccompResponse{id: in.id, errno: -int32(unix.EPERM)}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&out))); errno != 0 {
				return fmt.Errorf("answer: %w", errno)
			}
			return nil
		}()
	}()
	got := filtered()
	if err := <-answered; err != nil {
		return err
	}
	return wantErrno(got, unix.EPERM)
}

// wait waits for something to read on fd.
func wait(fd int) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, pollPatience)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("poll: %w", err)
		case n == 0:
			return errNoEvent
		}
		return nil
	}
}

// landlock restricts the calling thread. size is how much of attr this version of Landlock knows.
func landlock(attr unix.LandlockRulesetAttr, size uintptr) error {
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return fmt.Errorf("create ruleset: %w", errno)
	}
	defer unix.Close(int(fd))
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("restrict: %w", errno)
	}
	return nil
}

// fanotify marks path, and calls then, if there is something to do, with the group.
func fanotify(path string, flags uint, mask uint64, then func(group int) error) error {
	group, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fanotify_init: %w", err)
	}
	defer unix.Close(group) // whatever still waits for a verdict is allowed
	if err := unix.FanotifyMark(group, flags, mask, unix.AT_FDCWD, path); err != nil {
		return fmt.Errorf("fanotify_mark: %w", err)
	}
	if then == nil {
		return nil
	}
	return then(group)
}

// scratchPattern names temporary files after the process, so that what a killed one leaves can be told from a living one's.
func scratchPattern() string { return fmt.Sprintf("redoubt-probe-%d-*", os.Getpid()) }

// fanotifyDenies has a file of its own opened, and refuses that.
func fanotifyDenies() error {
	f, err := os.CreateTemp("", scratchPattern())
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	defer f.Close()
	opened := make(chan error, 1)
	err = fanotify(f.Name(), unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, func(group int) error {
		go func() {
			fd, err := unix.Open(f.Name(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				_ = unix.Close(fd)
			}
			opened <- err
		}()
		if err := wait(group); err != nil {
			return err
		}
		return denyNext(group)
	})
	if err != nil {
		return err // by now the group is closed, and the opener, if there is one, let through
	}
	return wantErrno(<-opened, unix.EPERM)
}

// denyNext reads one permission event, and answers no.
func denyNext(group int) error {
	var event unix.FanotifyEventMetadata
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&event)), unsafe.Sizeof(event)) // of one event, since one was caused
	if n, err := unix.Read(group, buf); err != nil || n != len(buf) {
		return fmt.Errorf("read event: %d bytes, %w", n, err)
	}
	defer unix.Close(int(event.Fd))
	answer := unix.FanotifyResponse{Fd: event.Fd, Response: unix.FAN_DENY}
	if _, err := unix.Write(group, unsafe.Slice((*byte)(unsafe.Pointer(&answer)), unsafe.Sizeof(answer))); err != nil {
		return fmt.Errorf("answer event: %w", err)
	}
	return nil
}

// ownMounts gives the calling thread a mount namespace of its own, out of which nothing leaks.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	return nil
}

// onOwnFilesystem calls f with an empty directory on a thread with a mount namespace of its own, so that nothing that is
// mounted there is seen outside, or outlives it. If fstype is not empty, a file system of that type is mounted first.
func onOwnFilesystem(fstype string, f func(dir string) error) error {
	dir, err := os.MkdirTemp("", scratchPattern())
	if err != nil {
		return err
	}
	err = onThread(func() error {
		if err := ownMounts(); err != nil {
			return err
		}
		if fstype != "" {
			if err := unix.Mount("redoubt-probe", dir, fstype, unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
				return fmt.Errorf("mount %s: %w", fstype, err)
			}
		}
		return f(dir)
	})
	return errors.Join(err, os.Remove(dir))
}

// pinAndUnpin goes the way of the agent and of release.
func pinAndUnpin(dir string) error {
	if err := Mount(dir); err != nil {
		return err
	}
	m, err := newMap(ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Pin(filepath.Join(dir, "probe")); err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	removed, err := Unpin(dir)
	if err == nil && len(removed) != 1 {
		err = fmt.Errorf("unpinned %d objects of 1", len(removed))
	}
	return errors.Join(err, Unmount(dir))
}
