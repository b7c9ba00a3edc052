package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxProcBytes bounds a file of /proc that is read.
const maxProcBytes = 4 << 20

// Confinement reads what the kernel says of a process: what holds now, whoever started it. Errors: matches [ErrGone].
func Confinement(pid int) (Confined, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	c, err := confinementOf(dir, dir+"/root")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Confined{}, &refusal.Error{
			Kind: refusal.Unknown, Code: ErrGone.Code, What: fmt.Sprintf("confinement of process %d", pid),
			Why: "there is no such process", Do: "look at the workloads present with redoubt inventory", Err: err,
		}
	}
	c.PID = pid
	return c, err
}

// confinementOf reads a process's directory in /proc; root is how its file system is reached from here.
func confinementOf(dir, root string) (Confined, error) {
	status, err := readBounded(dir + "/status")
	if err != nil {
		return Confined{}, err
	}
	c, err := parseStatus(status)
	if err != nil {
		return Confined{}, fmt.Errorf("%s/status: %w", dir, err)
	}
	mounts, err := cgroupMounts(dir)
	if err != nil {
		return Confined{}, err
	}
	for _, m := range mounts {
		if m.writable && m.reachable(root) {
			c.WritableCgroupfs = append(c.WritableCgroupfs, m.point)
		}
	}
	return c, nil
}

// parseStatus reads the lines of /proc/PID/status that confinement is made of. Trust: Name is the process's choice; the
// kernel escapes line ends in it (proc(5)).
func parseStatus(data []byte) (Confined, error) {
	var c Confined
	sets := map[string]*uint64{
		"CapInh": &c.Inheritable, "CapPrm": &c.Permitted, "CapEff": &c.Effective, "CapBnd": &c.Bounding, "CapAmb": &c.Ambient,
	}
	seen := 0
	for line := range bytes.Lines(data) {
		key, value, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), ":")
		if !ok {
			continue
		}
		var err error
		fields := strings.Fields(value)
		switch set := sets[key]; {
		case set != nil && len(fields) == 1:
			*set, err = strconv.ParseUint(fields[0], 16, 64)
		case key == "Uid" && len(fields) == 4:
			err = parseIDs(c.UIDs[:], fields)
		case key == "Gid" && len(fields) == 4:
			err = parseIDs(c.GIDs[:], fields)
		case key == "Groups":
			c.Groups = make([]uint32, len(fields))
			err = parseIDs(c.Groups, fields)
			seen-- // not counted: it may be absent in a user namespace
		case key == "NoNewPrivs" && len(fields) == 1:
			c.NoNewPrivs = fields[0] == "1"
		case key == "Seccomp" && len(fields) == 1:
			if fields[0] == "2" {
				c.Filters = max(c.Filters, 1) // a kernel before 5.9 does not count them
			}
		case key == "Seccomp_filters" && len(fields) == 1:
			c.Filters, err = strconv.Atoi(fields[0])
			seen--
		default:
			continue
		}
		if err != nil {
			return Confined{}, fmt.Errorf("%s: %w", key, err)
		}
		seen++
	}
	if want := len(sets) + len([]string{"Uid", "Gid", "NoNewPrivs", "Seccomp"}); seen != want {
		return Confined{}, fmt.Errorf("it has %d of the %d lines needed", seen, want)
	}
	return c, nil
}

func parseIDs(into []uint32, fields []string) error {
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 32)
		if err != nil {
			return err
		}
		into[i] = uint32(n)
	}
	return nil
}

// mount is one cgroup mount of a mount namespace.
type mount struct {
	id       int
	point    string // as seen from the root of the process
	writable bool
}

// reachable reports whether the mount's own path leads to it: not if another mount lies over it or over a directory
// above it. root is put before the path.
func (m mount) reachable(root string) bool {
	var s unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, root+m.point, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &s)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false
	}
	// When the kernel does not say (statx without mount ids, before 5.8), it counts as reachable.
	return err != nil || s.Mask&unix.STATX_MNT_ID == 0 || s.Mnt_id == uint64(m.id)
}

func cgroupMounts(dir string) ([]mount, error) {
	data, err := readBounded(dir + "/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseCgroupMounts(data)
}

// parseCgroupMounts returns the cgroup mounts, of version 1 and 2, of a mountinfo file. Source: proc(5).
func parseCgroupMounts(data []byte) ([]mount, error) {
	var mounts []mount
	for line := range bytes.Lines(data) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 6 || len(rest) < 1 {
			return nil, errors.New("mountinfo: a line is not of the form of proc(5)")
		}
		if rest[0] != "cgroup" && rest[0] != "cgroup2" {
			continue
		}
		id, err := strconv.Atoi(fields[0])
		if err != nil {
			return nil, fmt.Errorf("mountinfo: %w", err)
		}
		readOnly := hasOption(fields[5], "ro") || len(rest) > 2 && hasOption(rest[2], "ro")
		mounts = append(mounts, mount{id: id, point: unescape(fields[4]), writable: !readOnly})
	}
	return mounts, nil
}

func hasOption(list, name string) bool {
	for o := range strings.SplitSeq(list, ",") {
		if o == name {
			return true
		}
	}
	return false
}

// unescape undoes the octal escapes of mountinfo (\040 is a blank).
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxProcBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxProcBytes {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxProcBytes)
	}
	return data, nil
}
