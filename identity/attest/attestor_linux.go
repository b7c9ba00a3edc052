package attest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of this room.
const (
	maxProcBytes     = 4 << 20 // of one file of proc
	maxParents       = 32      // of the chain of parents
	maxReadings      = 4       // of a process that changes while it is read
	maxHashes        = 4096    // executables whose hash is remembered
	maxPaths         = 4096    // processes in mount namespaces of their own whose path is remembered
	maxRecords       = 1024    // containers whose record is remembered
	maxRuncs         = 1024    // containers of runc that are looked at
	maxCgroups       = 65536   // cgroups that are walked through
	maxPIDs          = 65536   // processes of one target
	maxSlowFiles     = 4       // files that are read at once
	maxEngineCalls   = 4       // questions to engines at once
	defaultMaxBinary = 1 << 30
	defaultTimeout   = 5 * time.Second
	hashTime         = 30 * time.Second // to hash one executable
	engineRest       = 10 * time.Second // how long an engine that did not answer is left alone
)

// Attestor reads facts of processes.
//
// Concurrency: safe.
type Attestor struct {
	config  Config
	hashes  *bounded[fileID, string]
	paths   *bounded[running, string]
	records *bounded[containerKey, record]
	runcs   *bounded[string, runcFile]
	slow    chan struct{} // a token for each file that is being read
	engines chan struct{} // a token for each question to an engine
	rest    *restUntil
	// between is called after the facts were read and before they are checked again; for tests.
	between func()
}

// New returns an Attestor. Errors: matches [ErrNoCgroup] if no unified hierarchy is mounted.
func New(c Config) (*Attestor, error) {
	if c.CgroupRoot == "" {
		root, err := CgroupRoot()
		if err != nil {
			return nil, err
		}
		c.CgroupRoot = root
	}
	c.CgroupRoot = filepath.Clean(c.CgroupRoot)
	if !isCgroup2(c.CgroupRoot) {
		return nil, noCgroup(c.CgroupRoot + " is not where a cgroup2 hierarchy is mounted")
	}
	if c.ProcRoot == "" {
		c.ProcRoot = "/proc"
	}
	if len(c.Podman) == 0 {
		if path, err := exec.LookPath(podman); err == nil {
			c.Podman = []string{path}
		}
	}
	if len(c.RuncRoots) == 0 {
		c.RuncRoots = []string{"/run/runc"}
	}
	if c.EngineTimeout <= 0 {
		c.EngineTimeout = defaultTimeout
	}
	if c.MaxExecutable <= 0 {
		c.MaxExecutable = defaultMaxBinary
	}
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Attestor{
		config: c, hashes: newBounded[fileID, string](maxHashes), paths: newBounded[running, string](maxPaths), records: newBounded[containerKey, record](maxRecords),
		runcs: newBounded[string, runcFile](maxRuncs), slow: make(chan struct{}, maxSlowFiles),
		engines: make(chan struct{}, maxEngineCalls), rest: &restUntil{}, between: func() {},
	}, nil
}

// CgroupRoot returns the directory at which the unified hierarchy is mounted.
func (a *Attestor) CgroupRoot() string { return a.config.CgroupRoot }

// CgroupRoot returns the directory at which the unified hierarchy is mounted, hybrid set-ups included. Errors: matches
// [ErrNoCgroup].
func CgroupRoot() (string, error) {
	data, err := readFile("/proc/self/mountinfo")
	if err != nil {
		return "", noCgroup(err.Error())
	}
	mounts, err := parseMountinfo(data)
	if err != nil {
		return "", noCgroup(err.Error())
	}
	for _, m := range mounts {
		if m.kind == "cgroup2" && m.root == "/" && isCgroup2(m.point) {
			return m.point, nil
		}
	}
	return "", noCgroup("no cgroup2 hierarchy is mounted here as a whole")
}

// CgroupIDOf returns the kernel's id of the cgroup whose directory is path: its inode, on the 64-bit machines that
// Redoubt is built for. Errors: matches [ErrNoCgroup] if path is no cgroup.
func CgroupIDOf(path string) (uint64, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, noCgroup(fmt.Sprintf("%s: %v", path, err))
	}
	defer func() { _ = unix.Close(fd) }()
	var fsys unix.Statfs_t
	var s unix.Stat_t
	if err := unix.Fstatfs(fd, &fsys); err != nil || fsys.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, noCgroup(path + " is not in a cgroup2 hierarchy")
	}
	if err := unix.Fstat(fd, &s); err != nil {
		return 0, noCgroup(fmt.Sprintf("%s: %v", path, err))
	}
	return s.Ino, nil
}

func isCgroup2(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

func noCgroup(why string) error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: ErrNoCgroup.Code, What: "cgroup of a workload", Why: why,
		Do: "mount a cgroup2 hierarchy in the agent's namespaces (systemd does so, also in hybrid mode)",
	}
}

// process is one process's directory in proc, held open: what is read through it is of this process or fails, whoever
// has the pid by then.
type process struct {
	pid   int
	dir   int // O_PATH
	pidfd int // -1 on a kernel without (before 5.3)
}

// open pins a process. Errors: matches [ErrGone] or [ErrNotProcess].
func (a *Attestor) open(pid int) (*process, error) {
	if pid <= 0 {
		return nil, a.refuse(ErrNotProcess, refusal.Invalid, pid, "a process id is a positive number", "give the number of a process")
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ENOSYS):
		pidfd = -1
	case errors.Is(err, unix.ESRCH):
		return nil, a.gone(pid, "there is no such process")
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return nil, a.refuse(ErrNotProcess, refusal.Invalid, pid, "it is a thread of a process", "give the process's own number (Tgid in /proc/PID/status)")
	case err != nil:
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	p := &process{pid: pid, pidfd: pidfd, dir: -1}
	p.dir, err = unix.Open(filepath.Join(a.config.ProcRoot, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		p.close()
		if errors.Is(err, unix.ENOENT) {
			return nil, a.gone(pid, "there is no such process")
		}
		return nil, a.unreadable(pid, err)
	}
	return p, nil
}

func (p *process) close() {
	if p.pidfd >= 0 {
		_ = unix.Close(p.pidfd)
	}
	if p.dir >= 0 {
		_ = unix.Close(p.dir)
	}
}

// alive reports whether the pinned process has not ended. While it has not, its pid is nobody else's.
func (p *process) alive() bool {
	if p.pidfd < 0 {
		return true // the start times are compared, which is all such a kernel allows
	}
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err != nil || n == 0 // readable: it has ended
}

// read returns a file of the process's directory.
func (p *process) read(name string) ([]byte, error) {
	fd, err := unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return readAll(os.NewFile(uintptr(fd), name))
}

// link returns what a link of the process's directory points to.
func (p *process) link(name string) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.dir, name, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

func (p *process) stat() (stat, error) {
	data, err := p.read("stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(data)
}

// ended reports whether an error of reading says that the process is no more.
func ended(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist) }

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return readAll(f)
}

// readAll reads and closes f.
func readAll(f *os.File) ([]byte, error) {
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxProcBytes+1))
	if err == nil && len(data) > maxProcBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxProcBytes)
	}
	return data, err
}

func (a *Attestor) refuse(code *refusal.Error, kind refusal.Kind, pid int, why, do string) error {
	a.config.Meter.Count("attest_refused", 1, "code", code.Code)
	return &refusal.Error{Kind: kind, Code: code.Code, What: fmt.Sprintf("facts of process %d", pid), Why: why, Do: do}
}

func (a *Attestor) gone(pid int, why string) error {
	return a.refuse(ErrGone, refusal.Unknown, pid, why, "nothing is left to identify; start it again")
}

func (a *Attestor) unreadable(pid int, err error) error {
	e := a.refuse(ErrProc, refusal.Unsupported, pid, fmt.Sprintf("proc cannot be read: %v", err), "run the agent as root, with CAP_SYS_PTRACE and /proc mounted without subset=pid")
	refusal.As(e).Err = err
	return e
}

// onlyRootAbove reports whether every directory above the cgroup is root's alone to make cgroups in, so that its name
// is root's word. A directory that was delegated to a user is not.
func (a *Attestor) onlyRootAbove(path string) bool {
	for at := filepath.Dir(path); ; at = filepath.Dir(at) {
		var s unix.Stat_t
		if err := unix.Lstat(filepath.Join(a.config.CgroupRoot, at), &s); err != nil || s.Uid != 0 || s.Mode&0o022 != 0 {
			return false
		}
		if at == "/" || at == "." {
			return true
		}
	}
}

// dirOf returns the directory of a cgroup path.
func (a *Attestor) dirOf(cgroup string) string {
	return filepath.Join(a.config.CgroupRoot, strings.TrimPrefix(cgroup, "/"))
}
