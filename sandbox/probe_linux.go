package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// What the prober is asked for, as its first argument; else the name of one attack.
const probeAll = "all"

// attackInChild are the attacks that need a process of their own: to be root of a user namespace, or to die of.
const (
	childPacket  = "child-packet"
	childForeign = "child-foreign"
	childCgroup  = "child-cgroupfs"
	childControl = "child-control" // attacks nothing: shows that a child can be started
)

// probeMain is the program of the throw-away workload: it attacks its confinement and prints the outcomes.
func probeMain(args []string) int {
	if len(args) == 0 {
		return StatusRefused
	}
	switch args[0] {
	case childPacket:
		return printed(packetSockets())
	case childForeign:
		return printed(foreignCalls())
	case childCgroup:
		return printed(writeAsRoot())
	case childControl:
		return printed(outcome{Refused: true, How: "started"})
	case probeAll:
	default:
		return StatusRefused
	}
	bait := ""
	if len(args) > 1 {
		bait = args[1]
	}
	outcomes := []outcome{
		leaveCgroup(), writeCgroupfs(), ioUring(), packet(), vsock(), capabilities(), noNewPrivs(), setUID(bait),
	}
	if haveForeignCalls {
		outcomes = append(outcomes, inChild(ProtectForeign, childForeign))
	}
	return printed(outcomes...)
}

func printed(outcomes ...outcome) int {
	if err := json.NewEncoder(os.Stdout).Encode(outcomes); err != nil {
		return StatusRefused
	}
	return 0
}

// inChild runs one attack in a process of its own. One that does not answer, because it could not be started or was
// killed, has not been made.
func inChild(name, attack string) outcome {
	o, err := runChild(attack, nil)
	if err != nil {
		return outcome{Name: name, Untried: true, How: fmt.Sprintf("its process did not come to it: %v", err)}
	}
	return o
}

func runChild(attack string, attr *syscall.SysProcAttr) (outcome, error) {
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe") // bounded by the caller, who kills the cgroup
	cmd.Args = []string{probeName, attack}
	cmd.Env = []string{}
	cmd.SysProcAttr = attr
	out, err := cmd.Output()
	if err != nil {
		return outcome{}, err
	}
	var o []outcome
	if err := json.Unmarshal(out, &o); err != nil {
		return outcome{}, err
	}
	if len(o) != 1 {
		return outcome{}, fmt.Errorf("it answered with %d outcomes", len(o))
	}
	return o[0], nil
}

// inNamespaces runs one attack as root of a user namespace and of one of each of kinds. A kernel that makes none for an
// unprivileged user has refused the attack at its first step; that it is the kernel, and not a want of memory or of
// processes, is told by a child that starts without them and by the error.
func inNamespaces(name, attack string, kinds map[string]uintptr) outcome {
	if o := inChild(name, childControl); o.Untried {
		return o
	}
	id := func(n int) []syscall.SysProcIDMap { return []syscall.SysProcIDMap{{HostID: n, Size: 1}} }
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: id(os.Getuid()), GidMappings: id(os.Getgid()),
	}
	none := noneAllowed("user")
	for kind, flag := range kinds {
		attr.Cloneflags |= flag
		none = none || noneAllowed(kind)
	}
	o, err := runChild(attack, attr)
	if err == nil {
		return o
	}
	var ended *exec.ExitError
	if errno := asErrno(err); !errors.As(err, &ended) && noNamespace(errno, none) {
		return outcome{Name: name, Refused: true, How: "a user namespace is refused: " + unix.ErrnoName(errno)}
	}
	return outcome{Name: name, Untried: true, How: fmt.Sprintf("its process did not come to it: %v", err)}
}

// noNamespace reports whether errno is the answer of a kernel that makes no such namespace for this user: by a rule
// (EPERM, EACCES), because it has none (EINVAL), or because none are allowed (ENOSPC, which a full table answers too).
func noNamespace(errno unix.Errno, noneAllowed bool) bool {
	switch errno {
	case unix.EPERM, unix.EACCES, unix.EINVAL:
		return true
	case unix.ENOSPC:
		return noneAllowed
	default:
		return false
	}
}

// noneAllowed reports whether namespaces of a kind are off for everyone (namespaces(7)).
func noneAllowed(kind string) bool {
	data, err := os.ReadFile("/proc/sys/user/max_" + kind + "_namespaces")
	return err == nil && strings.TrimSpace(string(data)) == "0"
}

// worst returns an outcome that was not refused, else one of an attack that was not made, else the last.
func worst(outcomes ...outcome) outcome {
	for _, bad := range []func(outcome) bool{outcome.succeeded, func(o outcome) bool { return o.Untried }} {
		if i := slices.IndexFunc(outcomes, bad); i >= 0 {
			return outcomes[i]
		}
	}
	return outcomes[len(outcomes)-1]
}

// leaveCgroup writes itself into the root of every cgroup mount and into its parent, and looks where it is then.
func leaveCgroup() outcome {
	before, _ := os.ReadFile("/proc/self/cgroup")
	mounts, err := cgroupMounts("/proc/self")
	if err != nil || len(before) == 0 {
		return outcome{Name: ProtectCgroup, Untried: true, How: fmt.Sprintf("it cannot be seen where it is: %v", err)}
	}
	if len(mounts) == 0 {
		return outcome{Name: ProtectCgroup, Untried: true, How: "no cgroup mount is to be seen"}
	}
	var last error
	for _, m := range mounts {
		for _, dir := range []string{m.point, filepath.Join(m.point, filepath.Dir(unifiedPath(before)))} {
			f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("0")
				_ = f.Close()
			}
			last = err
		}
	}
	after, _ := os.ReadFile("/proc/self/cgroup")
	if string(before) != string(after) {
		return outcome{Name: ProtectCgroup, How: fmt.Sprintf("it moved to %s", unifiedPath(after))}
	}
	return outcome{Name: ProtectCgroup, Refused: true, How: fmt.Sprint(last)}
}

// unifiedPath returns the path in the unified hierarchy of a /proc/PID/cgroup file.
func unifiedPath(data []byte) string {
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n")
		}
	}
	return "/"
}

// writeCgroupfs reports whether a cgroup mount can be written to, apart from who it is; and whether any can as root of
// a user namespace, where a writable cgroup2 is to be had for nothing and only the owner of the directories counts.
func writeCgroupfs() outcome {
	mounts, err := cgroupMounts("/proc/self")
	if err != nil {
		return outcome{Name: ProtectCgroupfs, Untried: true, How: err.Error()}
	}
	if len(mounts) == 0 {
		return outcome{Name: ProtectCgroupfs, Untried: true, How: "no cgroup mount is to be seen"}
	}
	for _, m := range mounts {
		var s unix.Statfs_t
		if m.reachable("") && unix.Statfs(m.point, &s) == nil && s.Flags&unix.ST_RDONLY == 0 {
			return outcome{Name: ProtectCgroupfs, How: m.point + " is writable"}
		}
	}
	return worst(
		outcome{Name: ProtectCgroupfs, Refused: true, How: "EROFS"},
		inNamespaces(ProtectCgroupfs, childCgroup, map[string]uintptr{"mnt": syscall.CLONE_NEWNS, "cgroup": syscall.CLONE_NEWCGROUP}),
	)
}

// writeAsRoot attacks as root of a user, a mount and a cgroup namespace: it takes the read-only flag off the mounts that
// it has and mounts cgroup2 afresh, and tries to move itself and to make a cgroup in each.
func writeAsRoot() outcome {
	mounts, err := cgroupMounts("/proc/self")
	if err != nil {
		return outcome{Name: ProtectCgroupfs, Untried: true, How: err.Error()}
	}
	var how []string
	for _, m := range mounts {
		_ = unix.MountSetattr(unix.AT_FDCWD, m.point, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}) // it is the write that counts
		dir, err := unix.Open(m.point, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // it cannot be reached, so not be written to
		}
		err = writeInto(dir)
		_ = unix.Close(dir)
		if err == nil {
			return outcome{Name: ProtectCgroupfs, How: "as root of a user namespace it wrote to " + m.point}
		}
		how = append(how, unix.ErrnoName(asErrno(err)))
	}
	fresh, err := freshCgroupfs()
	if err != nil {
		if errno := asErrno(err); errno != unix.EPERM && errno != unix.EACCES {
			return outcome{Name: ProtectCgroupfs, Untried: true, How: fmt.Sprintf("cgroup2 was not mounted afresh: %v", err)}
		}
		return outcome{Name: ProtectCgroupfs, Refused: true, How: fmt.Sprintf("%s, and no mount afresh: %v", strings.Join(how, ", "), err)}
	}
	defer func() { _ = unix.Close(fresh) }()
	err = writeInto(fresh)
	if err == nil {
		return outcome{Name: ProtectCgroupfs, How: "as root of a user namespace it wrote to a fresh mount of cgroup2"}
	}
	how = append(how, "a fresh mount: "+unix.ErrnoName(asErrno(err)))
	return outcome{Name: ProtectCgroupfs, Refused: true, How: strings.Join(how, ", ")}
}

// freshCgroupfs mounts cgroup2, writable, at no path and returns its root.
func freshCgroupfs() (int, error) {
	config, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer func() { _ = unix.Close(config) }()
	if err := unix.FsconfigCreate(config); err != nil {
		return -1, fmt.Errorf("fsconfig: %w", err)
	}
	dir, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return dir, nil
}

// writeInto moves this process into a directory of cgroupfs, or makes one in it. Error: both failed, the first reason.
func writeInto(dir int) error {
	procs, err := unix.Openat(dir, "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(procs, []byte("0"))
		_ = unix.Close(procs)
	}
	const own = "redoubt-probe-own"
	if err != nil && unix.Mkdirat(dir, own, 0o755) == nil {
		_ = unix.Unlinkat(dir, own, unix.AT_REMOVEDIR)
		err = nil
	}
	return err
}

func ioUring() outcome {
	for _, nr := range []uintptr{unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER} {
		// Arguments without sense: a call that reaches the kernel fails otherwise than by EPERM.
		if _, _, errno := unix.Syscall6(nr, ^uintptr(0), 0, 0, 0, 0, 0); errno != unix.EPERM {
			return outcome{Name: ProtectIOUring, How: fmt.Sprintf("call %d was answered by %v", nr, errno)}
		}
	}
	return outcome{Name: ProtectIOUring, Refused: true, How: "EPERM"}
}

// packet tries as it is, and as root of a user and network namespace, where CAP_NET_RAW is to be had for nothing.
func packet() outcome {
	return worst(packetSockets(), inNamespaces(ProtectPacket, childPacket, map[string]uintptr{"net": syscall.CLONE_NEWNET}))
}

func packetSockets() outcome {
	return worst(
		trySocket(ProtectPacket, unix.AF_PACKET, unix.SOCK_RAW), trySocket(ProtectPacket, unix.AF_PACKET, unix.SOCK_DGRAM),
		trySocket(ProtectPacket, unix.AF_INET, sockPacket),
	)
}

func vsock() outcome {
	return worst(trySocket(ProtectVsock, unix.AF_VSOCK, unix.SOCK_STREAM), trySocket(ProtectVsock, unix.AF_VSOCK, unix.SOCK_DGRAM))
}

// trySocket makes a socket. A refusal is one of a rule; a kernel without the family, or out of memory, has shown no rule.
func trySocket(name string, family, kind int) outcome {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		ruled := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
		return outcome{Name: name, Refused: ruled, Untried: !ruled, How: unix.ErrnoName(asErrno(err))}
	}
	_ = unix.Close(fd)
	return outcome{Name: name, How: fmt.Sprintf("a socket of family %d, type %d was made", family, kind)}
}

func asErrno(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

func capabilities() outcome {
	c, err := confinementOf("/proc/self", "")
	if err != nil {
		return outcome{Name: ProtectCaps, Untried: true, How: err.Error()}
	}
	if c.Inheritable|c.Permitted|c.Effective|c.Bounding|c.Ambient != 0 {
		return outcome{Name: ProtectCaps, How: fmt.Sprintf(
			"inheritable %x, permitted %x, effective %x, bounding %x, ambient %x",
			c.Inheritable, c.Permitted, c.Effective, c.Bounding, c.Ambient,
		)}
	}
	return outcome{Name: ProtectCaps, Refused: true, How: "all five sets are empty"}
}

func noNewPrivs() outcome {
	set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil || set != 1 {
		return outcome{Name: ProtectNoNewPrivs, How: "no_new_privs is not set"}
	}
	return outcome{Name: ProtectNoNewPrivs, Refused: true, How: "set"}
}

// setUID executes the set-user-id root program, by which the same user outside becomes root.
func setUID(bait string) outcome {
	if bait == "" {
		return outcome{Name: ProtectSetUID, Untried: true, How: noBait}
	}
	cmd := exec.CommandContext(context.Background(), bait)
	cmd.Env = []string{}
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return outcome{Name: ProtectSetUID, Untried: true, How: fmt.Sprintf("the program was not started: %v", err)}
	}
	switch cmd.ProcessState.ExitCode() {
	case statusIsRoot:
		return outcome{Name: ProtectSetUID, How: "it became root"}
	case statusNotRoot:
		return outcome{Name: ProtectSetUID, Refused: true, How: "it stayed who it was"}
	default:
		return outcome{Name: ProtectSetUID, Untried: true, How: fmt.Sprintf("the program ended otherwise: %v", err)}
	}
}
