package workload

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of start times in /proc: USER_HZ is 100 on every architecture that Redoubt runs on.
const tick = 10 * time.Millisecond

// cgroupAttempts bounds how often a cgroup is read again because the process was moved meanwhile.
const cgroupAttempts = 4

// maxProcFile bounds what is read of a file in /proc.
const maxProcFile = 64 << 10

func identify(conn *net.UnixConn, o Options) (*Caller, error) {
	if o.CgroupRoot == "" {
		root, err := unifiedRoot()
		if err != nil {
			return nil, err
		}
		o.CgroupRoot = root
	}
	if o.Accepted == 0 {
		o.Accepted = sinceBoot()
	}
	cred, pidfd, err := connected(conn, o.Method)
	if err != nil {
		return nil, err
	}
	c := &Caller{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, Method: ByPeerPidfd, pidfd: pidfd, root: o.CgroupRoot}
	if pidfd == nil {
		err = c.byPid(o)
	} else {
		err = c.byPidfd(o)
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// connected returns the credentials of who connected, and a pidfd of it where the kernel has SO_PEERPIDFD, else nil.
func connected(conn *net.UnixConn, method Method) (*unix.Ucred, *os.File, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, nil, fmt.Errorf("identify caller: %w", err)
	}
	var (
		cred             *unix.Ucred
		fd               = -1
		credErr, peerErr error
	)
	if err := raw.Control(func(s uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if method != ByPid {
			fd, peerErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	}); err != nil {
		return nil, nil, fmt.Errorf("identify caller: %w", err)
	}
	switch {
	case credErr != nil:
		return nil, nil, fmt.Errorf("identify caller: SO_PEERCRED: %w", credErr)
	case cred.Pid <= 0:
		if fd >= 0 && peerErr == nil {
			_ = unix.Close(fd)
		}
		return nil, nil, callerUnknown("the caller is in a pid namespace that the agent cannot see into",
			"run the agent in the machine's first pid namespace")
	case method == ByPid || errors.Is(peerErr, unix.ENOPROTOOPT):
		return cred, nil, nil
	case errors.Is(peerErr, unix.ESRCH), errors.Is(peerErr, unix.EINVAL), errors.Is(peerErr, unix.ENODATA):
		return nil, nil, callerGone() // before 6.16 no pidfd can be had of a process that was reaped
	case peerErr != nil:
		return nil, nil, fmt.Errorf("identify caller: SO_PEERPIDFD: %w", peerErr)
	}
	return cred, pidfdFile(fd), nil
}

// byPidfd fills in c, whose pidfd names who connected whatever became of its pid.
func (c *Caller) byPidfd(o Options) error {
	for range cgroupAttempts {
		var (
			id    uint64
			known bool
			err   error
		)
		if o.Method != ByPeerPidfd {
			if id, known, err = infoCgroup(c.pidfd); err != nil {
				return err
			}
		}
		if err := c.readProc(); err != nil {
			return err
		}
		// The path was read by pid. The process had that pid all along if it still lives now.
		if err := c.Alive(); err != nil {
			return err
		}
		if !known {
			return nil
		}
		c.Method = ByPeerInfo
		if id == c.CgroupID {
			return nil
		}
	}
	return callerUnknown("the caller was moved from cgroup to cgroup while it was identified", "connect again")
}

// byPid fills in c by the pid that connected, which may be another process's by now.
func (c *Caller) byPid(o Options) error {
	c.Method = ByPid
	fd, err := unix.PidfdOpen(c.PID, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return callerGone()
	}
	if err != nil {
		return fmt.Errorf("identify caller: pidfd_open: %w", err)
	}
	c.pidfd = pidfdFile(fd)
	if c.Start, err = startTime(c.PID); err != nil {
		return callerGone()
	}
	// Who started after the connection was accepted cannot have made it: the pid was given to another process.
	if c.Start > uint64(o.Accepted/tick) {
		return callerGone()
	}
	if err := c.readProc(); err != nil {
		return err
	}
	return c.Alive()
}

// readProc fills in what is read by pid: start time, cgroup. The caller of it checks that the process outlived the reading.
func (c *Caller) readProc() (err error) {
	if c.Start, err = startTime(c.PID); err != nil {
		return callerGone()
	}
	c.Cgroup, c.CgroupID, err = readCgroup(c.root, c.PID)
	return err
}

// cgroupNow returns the id of the cgroup that the caller is in now.
func cgroupNow(c *Caller) (uint64, error) {
	if c.Method == ByPeerInfo {
		id, known, err := infoCgroup(c.pidfd)
		if err != nil || known {
			return id, err
		}
	}
	_, id, err := readCgroup(c.root, c.PID)
	if err != nil {
		return 0, err
	}
	return id, c.Alive()
}

// infoCgroup asks PIDFD_GET_INFO; known is false where the kernel does not have it.
func infoCgroup(pidfd *os.File) (id uint64, known bool, err error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CGROUPID}
	if cerr := control(pidfd, func(fd int) { err = unix.IoctlPidfdInfo(fd, &info) }); cerr != nil {
		return 0, false, callerGone() // closed: nobody is held any more
	}
	switch {
	case err == nil:
		return info.Cgroupid, info.Mask&unix.PIDFD_INFO_CGROUPID != 0, nil
	case errors.Is(err, unix.ESRCH):
		return 0, false, callerGone()
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return 0, false, nil // Linux before 6.13
	default:
		return 0, false, fmt.Errorf("identify caller: PIDFD_GET_INFO: %w", err)
	}
}

func startTime(pid int) (uint64, error) {
	text, err := readProcFile(pid, "stat")
	if err != nil {
		return 0, err
	}
	return parseStart(text)
}

// parseStart returns field 22 of /proc/PID/stat. Trust: the second field is the process's own choice, parentheses and
// blanks included, so fields are counted after the last one (proc_pid_stat(5)).
func parseStart(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("parse /proc/PID/stat: no command name")
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < 20 {
		return 0, errors.New("parse /proc/PID/stat: too few fields")
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

func readCgroup(root string, pid int) (string, uint64, error) {
	text, err := readProcFile(pid, "cgroup")
	if err != nil {
		return "", 0, callerGone()
	}
	path, err := parseCgroup(text)
	if err != nil {
		return "", 0, err
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &st); err != nil {
		return "", 0, callerUnknown("the caller's cgroup is not below the unified hierarchy that the agent sees",
			"mount cgroup2 for the agent, in the machine's first cgroup namespace")
	}
	return path, st.Ino, nil
}

// parseCgroup returns the path in the unified hierarchy from /proc/PID/cgroup (cgroups(7): the line of hierarchy 0).
// Trust: whoever may make cgroups chooses their names.
func parseCgroup(text []byte) (string, error) {
	for line := range bytes.Lines(text) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), "0::")
		if !ok {
			continue
		}
		switch {
		case strings.HasSuffix(path, " (deleted)"):
			return "", callerUnknown("the caller's cgroup has been removed", "start it in a cgroup that exists")
		case !strings.HasPrefix(path, "/") || path == "/.." || strings.HasPrefix(path, "/../"):
			return "", callerUnknown("the caller's cgroup is outside of the agent's cgroup namespace",
				"run the agent in the machine's first cgroup namespace")
		}
		return path, nil
	}
	return "", callerUnknown("the caller is in no cgroup of the unified hierarchy", "mount cgroup2 (hybrid is enough)")
}

func readProcFile(pid int, name string) ([]byte, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/" + name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, maxProcFile))
}

// unifiedRoot finds the mount point of cgroup2.
func unifiedRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// proc_pid_mountinfo(5): "… root mountpoint options [tags] - type source superoptions".
		mount, kind, ok := strings.Cut(lines.Text(), " - ")
		if fields := strings.Fields(mount); ok && strings.HasPrefix(kind, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	return "", callerUnknown("no unified cgroup hierarchy is mounted", "mount cgroup2 (hybrid is enough)")
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // cannot fail since Linux 2.6.39; 0 is refused by every comparison
	}
	return time.Duration(ts.Nano())
}

// pidfdFile hands a pidfd to the runtime's poller, so that waiting for its process takes no thread.
func pidfdFile(fd int) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), "pidfd")
}

func control(f *os.File, do func(fd int)) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { do(int(fd)) })
}

// exited reports whether the process of pidfd has ended, or pidfd was closed (pidfd_open(2): readable means ended).
func exited(pidfd *os.File) bool {
	gone := true
	err := control(pidfd, func(fd int) { gone = readable(fd) })
	return err != nil || gone
}

// waitExit blocks until the process of pidfd has ended or pidfd is closed.
func waitExit(pidfd *os.File) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool { return readable(int(fd)) }) // an error means closed
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n > 0
	}
}

// peerIDs returns the pid and user that connected, for the bounds on connections.
func peerIDs(conn *net.UnixConn) (pid int, uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(s uintptr) { cred, err = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, 0, cerr
	}
	if err != nil {
		return 0, 0, err
	}
	return int(cred.Pid), cred.Uid, nil
}

// descriptors returns how many files this process may open.
func descriptors() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > 1<<30 {
		return 1 << 30
	}
	return int(limit.Cur)
}
