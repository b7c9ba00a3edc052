package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// fileID names one content of one file, as far as its metadata can.
//
// Shape: comparable.
type fileID struct {
	devMajor, devMinor uint32
	inode              uint64
	size               int64
	changed, modified  unix.StatxTimestamp
}

// executable is what /proc/PID/exe leads to.
//
// Shape: comparable.
type executable struct {
	link    string // as the kernel shows it now
	id      fileID
	born    unix.StatxTimestamp // of the file; zero if its file system does not say
	regular bool
	none    bool // it may not be looked at
}

// settled is how long a file must have been unchanged before its hash is remembered: within one tick of the clock that
// stamps files, two contents may have the same times.
const settled = 2 * time.Second

// open opens the executable without its file system's help (O_PATH), so that a hostile one cannot hold us up.
func (p *process) openExecutable() (fd int, e executable, err error) {
	if e.link, err = p.link("exe"); err != nil {
		return -1, e, err
	}
	if fd, err = unix.Openat(p.dir, "exe", unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
		return -1, e, err
	}
	s, err := statOf(fd)
	if err != nil {
		_ = unix.Close(fd)
		return -1, e, err
	}
	e.id, e.regular = idOf(s), s.Mode&unix.S_IFMT == unix.S_IFREG
	if s.Mask&unix.STATX_BTIME != 0 {
		e.born = s.Btime
	}
	return fd, e, nil
}

// statOf returns the metadata of a descriptor from memory: AT_STATX_DONT_SYNC asks no server.
func statOf(fd int) (*unix.Statx_t, error) {
	var s unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS|unix.STATX_BTIME|unix.STATX_MNT_ID, &s)
	return &s, err
}

func idOf(s *unix.Statx_t) fileID {
	return fileID{
		devMajor: s.Dev_major, devMinor: s.Dev_minor, inode: s.Ino, size: int64(s.Size), changed: s.Ctime, modified: s.Mtime,
	}
}

const replacedWarning = "executable.path: the file was deleted or replaced while the program runs"

// pathOf returns the path of an executable as a fact, or why there is none. A path is believed if it leads to the same
// file in the agent's own mount namespace: in a namespace of its own a process may have any file at any path. sameMounts
// says whether the process shares the agent's.
func (a *Attestor) pathOf(ctx context.Context, e executable, sameMounts bool) (path, warning string) {
	if strings.HasPrefix(e.link, "/memfd:") {
		return "", "executable.path: the program was executed from memory (memfd) and has no file"
	}
	if e.link == "/" {
		return "", "executable.path: the program is mounted by itself, as runc does with its own before it executes the container's"
	}
	if a.leadsTo(ctx, e.link, e.id) {
		return e.link, ""
	}
	if name, ok := strings.CutSuffix(e.link, deletedMark); ok && sameMounts {
		return name, replacedWarning
	}
	return "", "executable.path: the path is one of the process's own mount namespace and says nothing outside of it"
}

// running is one process that executes one file. A file that was born at the same time under the same number is the same
// one, also after others had the number: no process can choose the time of birth.
//
// Shape: comparable.
type running struct {
	pid                int
	start              uint64
	devMajor, devMinor uint32
	inode              uint64
	born               unix.StatxTimestamp
}

// remembered is [Attestor.pathOf] for a process in a mount namespace of its own, as `redoubt run` makes one: a path that
// was believed stays so while the process executes the same file, also when that is deleted or replaced there (a package
// is upgraded). Of a file that was gone when it was first looked at, or before the agent started, nothing is believed.
func (a *Attestor) remembered(pid int, s snapshot, path, warning string) (_, _ string) {
	if s.exe.born == (unix.StatxTimestamp{}) {
		return path, warning
	}
	id := s.exe.id
	key := running{pid: pid, start: s.start, devMajor: id.devMajor, devMinor: id.devMinor, inode: id.inode, born: s.exe.born}
	if path != "" {
		if a.paths.put(key, path) {
			a.config.Meter.Count("attest_path_memory", 1, "result", "evicted")
		}
		return path, warning
	}
	if name, ok := strings.CutSuffix(s.exe.link, deletedMark); ok {
		if was, ok := a.paths.get(key); ok && was == name {
			return name, replacedWarning
		}
	}
	return path, warning
}

// resolveCached is RESOLVE_CACHED (linux/openat2.h): succeed from the cache of names, or not at all.
const resolveCached = 0x20

// leadsTo reports whether path leads to this file from the agent's root, through no symbolic link (the kernel shows none).
func (a *Attestor) leadsTo(ctx context.Context, path string, id fileID) bool {
	how := unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | resolveCached,
	}
	// A file that runs is in the cache of names, as a rule; this way no file system is asked.
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &how)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINVAL) { // not cached, or a kernel before 5.12
		if a.onFuse(path) {
			return false
		}
		how.Resolve &^= resolveCached
		err = a.slowly(ctx, func(context.Context) (err error) {
			fd, err := unix.Openat2(unix.AT_FDCWD, path, &how)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			return sameFile(fd, id)
		})
		return err == nil
	}
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	return sameFile(fd, id) == nil
}

var errOther = errors.New("it is another file")

func sameFile(fd int, id fileID) error {
	s, err := statOf(fd)
	if err != nil {
		return err
	}
	if now := idOf(s); now.devMajor != id.devMajor || now.devMinor != id.devMinor || now.inode != id.inode {
		return errOther
	}
	return nil
}

// onFuse reports whether path lies under a mount of the agent's namespace for which a user's program answers.
func (a *Attestor) onFuse(path string) bool {
	data, err := readFile("/proc/self/mountinfo")
	if err != nil {
		return true
	}
	mounts, err := parseMountinfo(data)
	if err != nil {
		return true
	}
	for _, m := range mounts {
		if m.fuse() && (path == m.point || strings.HasPrefix(path, strings.TrimSuffix(m.point, "/")+"/")) {
			return true
		}
	}
	return false
}

// errSkipped is why a file was not hashed; its text is the warning.
type errSkipped string

func (e errSkipped) Error() string { return string(e) }

// hash returns the SHA-256 of the executable behind fd (O_PATH), 64 hexadecimal digits. Errors: [errSkipped] if the fact
// cannot be had; a refusal if the bound of files at once was reached; ctx's.
func (a *Attestor) hash(ctx context.Context, p *process, fd int, e executable) (string, error) {
	if !e.regular {
		return "", errSkipped("it is no regular file")
	}
	if e.id.size > a.config.MaxExecutable {
		a.config.Meter.Count("attest_executable_too_large", 1)
		return "", errSkipped(fmt.Sprintf("the file is larger than %d bytes", a.config.MaxExecutable))
	}
	if sum, ok := a.hashes.get(e.id); ok {
		a.config.Meter.Count("attest_hash_cache", 1, "result", "hit")
		return sum, nil
	}
	a.config.Meter.Count("attest_hash_cache", 1, "result", "miss")
	if kind := p.mountKind(fd); (mount{kind: kind}).fuse() {
		return "", errSkipped("a user's program answers for its file system (" + kind + ")")
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) // the reader may outlive this call
	if err != nil {
		return "", err
	}
	var sum string
	sums := make(chan string, 1)
	err = a.slowly(ctx, func(ctx context.Context) error {
		defer func() { _ = unix.Close(own) }()
		s, err := hashFile(ctx, own, e.id)
		sums <- s
		return err
	})
	if err != nil {
		if errors.Is(err, ErrBusy) {
			_ = unix.Close(own)
		}
		return "", err
	}
	sum = <-sums
	if changed := time.Unix(e.id.changed.Sec, int64(e.id.changed.Nsec)); time.Since(changed) > settled {
		if a.hashes.put(e.id, sum) {
			a.config.Meter.Count("attest_hash_cache", 1, "result", "evicted")
		}
	}
	return sum, nil
}

// mountKind returns the type of the file system of a descriptor, by the process's list of mounts; "" if it is not there.
func (p *process) mountKind(fd int) string {
	s, err := statOf(fd)
	if err != nil || s.Mask&unix.STATX_MNT_ID == 0 {
		return ""
	}
	data, err := p.read("mountinfo")
	if err != nil {
		return ""
	}
	mounts, err := parseMountinfo(data)
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		if uint64(m.id) == s.Mnt_id {
			return m.kind
		}
	}
	return ""
}

// hashFile reads the file behind an O_PATH descriptor, which must be id before and after.
func hashFile(ctx context.Context, fd int, id fileID) (string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", errSkipped(fmt.Sprintf("the file cannot be read: %v", err))
	}
	defer func() { _ = f.Close() }()
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fsys); err != nil || fsys.Type == unix.FUSE_SUPER_MAGIC {
		return "", errSkipped("a user's program answers for its file system")
	}
	h := sha256.New()
	b := make([]byte, 256<<10)
	for left := id.size; ; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := f.Read(b)
		h.Write(b[:n])
		if left -= int64(n); left < 0 {
			return "", errSkipped("the file grew while it was read")
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", errSkipped(fmt.Sprintf("the file cannot be read: %v", err))
		}
	}
	s, err := statOf(fd)
	if err != nil || idOf(s) != id {
		return "", errSkipped("the file changed while it was read")
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// slowly runs do, which may hang in a file system, in a goroutine of its own and waits no longer than ctx and hashTime.
// The goroutine keeps its place until do returns; when all places are taken, it refuses.
func (a *Attestor) slowly(ctx context.Context, do func(context.Context) error) error {
	select {
	case a.slow <- struct{}{}:
	default:
		wait, cancel := context.WithTimeout(ctx, a.config.EngineTimeout)
		defer cancel()
		select {
		case a.slow <- struct{}{}:
		case <-wait.Done():
			a.config.Meter.Count("attest_refused", 1, "code", ErrBusy.Code)
			return &refusal.Error{
				Kind: refusal.Exhausted, Code: ErrBusy.Code, What: "reading of an executable",
				Why: fmt.Sprintf("%d files are being read already", maxSlowFiles), Do: "look for a file system that does not answer",
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, hashTime)
	done := make(chan error, 1)
	go func() {
		defer func() { <-a.slow; cancel() }()
		done <- do(ctx)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		select {
		case err := <-done: // it was done first: its end cancels ctx
			return err
		default:
			return ctx.Err()
		}
	}
}
