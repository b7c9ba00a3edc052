package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// workloadsDir is the cgroup, below the machine's subtree, that holds the cgroups we make.
const workloadsDir = "redoubt"

// dir returns where a cgroup path of the unified hierarchy is in the file system.
func (m *Machine) dir(cgroup string) string { return filepath.Join(m.cfg.CgroupRoot, cgroup) }

// within reports whether a cgroup belongs to this machine's subtree.
func (m *Machine) within(cgroup string) bool {
	return m.cfg.Subtree == "/" || cgroup == m.cfg.Subtree || strings.HasPrefix(cgroup, m.cfg.Subtree+"/")
}

// makeCgroup creates the cgroup of an instance and returns its path and id.
func (m *Machine) makeCgroup(instance string) (string, uint64, error) {
	cgroup := path.Join(m.cfg.Subtree, workloadsDir, instance)
	// 0755: anyone may look; only root may put a process in.
	if err := os.MkdirAll(m.dir(cgroup), 0o755); err != nil {
		return "", 0, &refusal.Error{
			Kind: refusal.Unsupported, Code: "cgroup-create", What: "make a cgroup for the workload", Why: err.Error(),
			Do: "run the agent as root with a writable cgroup v2 hierarchy, or set machine.cgroups to a delegated subtree", Err: err,
		}
	}
	id, err := cgroupID(m.dir(cgroup))
	return cgroup, id, err
}

// cgroupID returns the kernel's id of a cgroup: the inode of its directory.
func cgroupID(dir string) (uint64, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, errors.New("this system has no cgroups")
	}
	return st.Ino, nil
}

// populated reports whether any process is in the cgroup or below it. A cgroup that is gone is not.
func populated(dir string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		// The root cgroup has no cgroup.events, and is always populated.
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return true, nil
		}
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return strings.Contains(string(b), "populated 1"), nil
}

// adopt moves a process and its descendants, as far as they share its cgroup, into the cgroup of an instance.
// What was moved keeps running: nothing is restarted.
func (m *Machine) adopt(cgroup string, pids []int) (int, error) {
	procs, err := os.OpenFile(filepath.Join(m.dir(cgroup), "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = procs.Close() }()
	moved := 0
	for _, pid := range pids {
		_, err := fmt.Fprintf(procs, "%d\n", pid)
		if errors.Is(err, syscall.ESRCH) {
			continue // it ended on its own
		}
		if err != nil {
			return moved, fmt.Errorf("move process %d into %s: %w", pid, cgroup, err)
		}
		moved++
	}
	return moved, nil
}

// removeCgroup removes a cgroup that we made, and the empty ones below it; one that is busy stays until the next look.
func (m *Machine) removeCgroup(cgroup string) {
	top := m.dir(cgroup)
	var dirs []string
	_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		for range 20 {
			// The kernel answers EBUSY for a moment after the last process has gone.
			if err := os.Remove(dir); !errors.Is(err, syscall.EBUSY) {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// RemoveEmptyCgroups removes the cgroups that machines made below a directory of the unified hierarchy and in which nothing
// runs, and returns them. Those of another agent's running workloads are not empty, and stay.
func RemoveEmptyCgroups(subtree string) ([]string, error) {
	top := filepath.Join(subtree, workloadsDir)
	entries, err := os.ReadDir(top)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var removed []string
	for _, e := range entries {
		dir := filepath.Join(top, e.Name())
		if busy, err := populated(dir); e.IsDir() && err == nil && !busy {
			(&Machine{}).removeCgroup(dir)
			removed = append(removed, dir)
		}
	}
	if os.Remove(top) == nil {
		removed = append(removed, top)
	}
	return removed, nil
}
