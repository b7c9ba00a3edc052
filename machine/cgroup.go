package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
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

// processes returns the processes in a cgroup and below it, lowest first.
func processes(dir string) []int {
	var pids []int
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil //nolint:nilerr // a cgroup that went away meanwhile has none
		}
		raw, _ := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		for line := range strings.Lines(string(raw)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	slices.Sort(pids)
	return pids
}

// adoptRounds bounds how often a tree of processes that forks while it is moved is looked at again.
const adoptRounds = 20

// adopt moves processes into the cgroup of an instance, and looks again until family (which tells who is left) tells of
// nobody. What was moved keeps running: nothing is restarted.
func (m *Machine) adopt(cgroup string, family func() []int) (int, error) {
	procs, err := os.OpenFile(filepath.Join(m.dir(cgroup), "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = procs.Close() }()
	moved := 0
	for range adoptRounds {
		left := family()
		if len(left) == 0 {
			return moved, nil
		}
		for _, pid := range left {
			_, err := fmt.Fprintf(procs, "%d\n", pid)
			if errors.Is(err, syscall.ESRCH) {
				continue // it ended on its own
			}
			if err != nil {
				return moved, fmt.Errorf("move process %d into %s: %w", pid, cgroup, err)
			}
			moved++
		}
	}
	return moved, &refusal.Error{
		Kind: refusal.Conflict, Code: "restless-processes", What: "move running processes into a cgroup of their own",
		Why: "they start others faster than these can be moved", Do: "try again, or enroll the cgroup as a whole",
	}
}

// giveBack moves what was adopted back to where it was, after an enrollment that failed, and returns that failure. What
// could not be moved back is said in it: it is nobody's until it is enrolled again.
func (m *Machine) giveBack(from, to string, cause error) error {
	back, err := os.OpenFile(filepath.Join(m.dir(to), "cgroup.procs"), os.O_WRONLY, 0)
	if err == nil {
		for range adoptRounds {
			left := processes(m.dir(from))
			if len(left) == 0 {
				break
			}
			for _, pid := range left {
				_, _ = fmt.Fprintf(back, "%d\n", pid)
			}
		}
		_ = back.Close()
	}
	if left := processes(m.dir(from)); len(left) > 0 {
		cause = errors.Join(cause, fmt.Errorf("%d processes stay in %s and have no identity: enroll that cgroup, or end them", len(left), from))
	}
	m.sweep(from)
	return cause
}

// sweep removes a cgroup of ours, or keeps it for another look while something is in it.
func (m *Machine) sweep(cgroup string) {
	if busy, err := populated(m.dir(cgroup)); err != nil || !busy {
		m.removeCgroup(cgroup)
	}
	if _, err := os.Stat(m.dir(cgroup)); err == nil {
		m.mu.Lock()
		if len(m.husks) < MaxWorkloads {
			m.husks = append(m.husks, cgroup)
		}
		m.mu.Unlock()
	}
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

// RemoveEmptyCgroups removes the cgroups that the state in stateDir says were made for workloads and in which nothing runs,
// and returns them. root is where the unified hierarchy is mounted, subtree the machine's part of it. Cgroups of other agents
// stay, and so do those in which something runs.
func RemoveEmptyCgroups(stateDir, root, subtree string) ([]string, error) {
	raw, err := os.ReadFile(filepath.Join(stateDir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	var removed []string
	for _, cgroup := range s.Husks {
		dir := filepath.Join(root, cgroup)
		if busy, err := populated(dir); err == nil && !busy {
			(&Machine{}).removeCgroup(dir)
			removed = append(removed, dir)
		}
	}
	for _, w := range s.Workloads {
		dir := filepath.Join(root, w.Cgroup)
		if id, err := cgroupID(dir); !w.Ours || err != nil || id != w.CgroupID {
			continue
		}
		if busy, err := populated(dir); err == nil && !busy {
			(&Machine{}).removeCgroup(dir)
			removed = append(removed, dir)
		}
	}
	if top := filepath.Join(subtree, workloadsDir); os.Remove(top) == nil { // only if it is empty
		removed = append(removed, top)
	}
	return removed, nil
}
