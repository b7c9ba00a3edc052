package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// Cgroup is a directory of the unified hierarchy that this process made.
//
// Concurrency: Kill is safe; Close and Remove are called once, last.
type Cgroup struct {
	Path string // in the file system
	ID   uint64 // the kernel's id of it: the inode of the directory
	fd   int
}

// MakeCgroup makes the cgroup parent/name and opens it; parent is made too if it is missing. name is one path element.
// Errors: matches [ErrCgroup]; of kind Conflict if it exists.
func MakeCgroup(parent, name string) (*Cgroup, error) {
	what := fmt.Sprintf("cgroup %q", filepath.Join(parent, name))
	if name == "" || name == "." || name == ".." || len(name) > 200 || strings.ContainsAny(name, "/\n\x00") || strings.HasPrefix(name, "cgroup.") {
		return nil, cgroupRefused(refusal.Invalid, what, errors.New("its name is not one path element that cgroupfs takes"), "give another name")
	}
	if err := makeParents(parent); err != nil {
		return nil, cgroupRefused(refusal.Unsupported, what, err, advice["cgroup"])
	}
	path := filepath.Join(parent, name)
	switch err := os.Mkdir(path, 0o755); {
	case errors.Is(err, fs.ErrExist):
		return nil, cgroupRefused(refusal.Conflict, what, err, "end the workload that has it, or give another name")
	case err != nil:
		return nil, cgroupRefused(refusal.Unsupported, what, err, advice["cgroup"])
	}
	fd, err := unix.Open(path, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		_ = os.Remove(path)
		return nil, cgroupRefused(refusal.Unsupported, what, err, advice["cgroup"])
	}
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		_ = unix.Close(fd)
		_ = os.Remove(path)
		return nil, cgroupRefused(refusal.Unsupported, what, err, advice["cgroup"])
	}
	return &Cgroup{Path: path, ID: s.Ino, fd: fd}, nil
}

// makeParents makes dir, if the nearest directory that exists is one of cgroup2: elsewhere it would make plain
// directories that hold nobody.
func makeParents(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("%q is no absolute path", dir)
	}
	var s unix.Statfs_t
	at := filepath.Clean(dir)
	for {
		err := unix.Statfs(at, &s)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOENT) || at == "/" {
			return fmt.Errorf("%s: %w", at, err)
		}
		at = filepath.Dir(at)
	}
	if s.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is not in a cgroup2 hierarchy", dir)
	}
	return os.MkdirAll(dir, 0o755)
}

func cgroupRefused(kind refusal.Kind, what string, err error, do string) error {
	return &refusal.Error{Kind: kind, Code: ErrCgroup.Code, What: what, Why: err.Error(), Do: do, Err: err}
}

// FD returns the open directory, for [Spec.CgroupFD]; it is closed by Close.
func (c *Cgroup) FD() int { return c.fd }

// Close closes the descriptor; the cgroup stays.
func (c *Cgroup) Close() error {
	fd := c.fd
	c.fd = -1
	if fd < 0 {
		return nil
	}
	return unix.Close(fd)
}

// Kill kills every process in the cgroup and below, those that are being forked too.
func (c *Cgroup) Kill() error {
	err := os.WriteFile(filepath.Join(c.Path, "cgroup.kill"), []byte("1"), 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Before Linux 5.14: until none is left. A fork bomb may outrun this; the caller's context ends it in Remove.
	return c.walk(func(dir string) error {
		data, err := readBounded(filepath.Join(dir, "cgroup.procs"))
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		return err
	})
}

// removePause is how long Remove waits between tries: a killed process leaves its cgroup a moment after its end.
const removePause = 2 * time.Millisecond

// Remove waits until the cgroup is empty, removes it with those below, and closes the descriptor. A cgroup that is
// gone already is no error. Errors: ctx's, wrapped in a refusal that matches [ErrCgroup].
func (c *Cgroup) Remove(ctx context.Context) error {
	defer func() { _ = c.Close() }()
	for {
		err := c.walk(os.Remove)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return cgroupRefused(refusal.Unavailable, "removal of cgroup "+c.Path, err, "remove the directory by hand")
		}
		select {
		case <-ctx.Done():
			return cgroupRefused(refusal.Unavailable, "removal of cgroup "+c.Path, errors.Join(ctx.Err(), err), "end its processes first")
		case <-time.After(removePause):
		}
	}
}

// walk calls do for every directory of the cgroup, the deepest first.
func (c *Cgroup) walk(do func(dir string) error) error {
	var dirs []string
	err := filepath.WalkDir(c.Path, func(path string, d fs.DirEntry, err error) error {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if d != nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, dir := range slices.Backward(dirs) {
		if err := do(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
