package attest

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// kernelThread is PF_KTHREAD of the flags in /proc/PID/stat (linux/sched.h).
const kernelThread = 0x00200000

// stat is what is used of /proc/PID/stat.
//
// Shape: comparable.
type stat struct {
	state  byte
	parent int
	flags  uint64
	start  uint64 // clock ticks since boot
}

// ended reports whether the process is dead and waits for its parent to take note.
func (s stat) ended() bool { return s.state == 'Z' || s.state == 'X' || s.state == 'x' }

var errForm = errors.New("it is not of the form of proc(5)")

// parseStat reads /proc/PID/stat. Trust: the command name in it is the process's choice and may hold blanks, parentheses
// and numbers; what follows the last parenthesis is the kernel's. Source: proc(5).
func parseStat(data []byte) (stat, error) {
	end := bytes.LastIndexByte(data, ')')
	if end < 0 {
		return stat{}, errForm
	}
	fields := strings.Fields(string(data[end+1:]))
	// Numbers as in proc(5), where the state is field 3.
	const first, parent, flags, start = 3, 4, 9, 22
	if len(fields) <= start-first || len(fields[0]) != 1 {
		return stat{}, errForm
	}
	s := stat{state: fields[0][0]}
	var err error
	if s.parent, err = strconv.Atoi(fields[parent-first]); err != nil || s.parent < 0 {
		return stat{}, errForm
	}
	if s.flags, err = strconv.ParseUint(fields[flags-first], 10, 64); err != nil {
		return stat{}, errForm
	}
	if s.start, err = strconv.ParseUint(fields[start-first], 10, 64); err != nil {
		return stat{}, errForm
	}
	return s, nil
}

// ids are the user and group ids of a process: real, effective, saved, file system.
//
// Shape: comparable.
type ids struct{ uid, gid [4]uint32 }

// mixed reports whether the process can change between users.
func (i ids) mixed() bool {
	return i.uid != [4]uint32{i.uid[0], i.uid[0], i.uid[0], i.uid[0]} || i.gid != [4]uint32{i.gid[0], i.gid[0], i.gid[0], i.gid[0]}
}

// parseStatus reads the ids of /proc/PID/status. Trust: Name is the process's choice; the kernel escapes line ends in it,
// so that no line begins with what it wrote. Source: proc(5).
func parseStatus(data []byte) (ids, error) {
	var i ids
	seen := 0
	for line := range bytes.Lines(data) {
		key, value, _ := strings.Cut(string(line), ":")
		var into *[4]uint32
		switch key {
		case "Uid":
			into = &i.uid
		case "Gid":
			into = &i.gid
		default:
			continue
		}
		fields := strings.Fields(value)
		if len(fields) != len(into) {
			return ids{}, errForm
		}
		for n, f := range fields {
			id, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return ids{}, errForm
			}
			into[n] = uint32(id)
		}
		seen++
	}
	if seen != 2 {
		return ids{}, errForm
	}
	return i, nil
}

// mount is one line of /proc/PID/mountinfo.
type mount struct {
	id    int
	root  string // of the mount within its file system
	point string // seen from the root of the process
	kind  string // file system type
}

// fuse reports whether a user's program answers for this file system: reading from it may hang, and what it says may
// change between two readings.
func (m mount) fuse() bool {
	return m.kind == "fuse" || strings.HasPrefix(m.kind, "fuse.") || m.kind == "fuseblk"
}

// parseMountinfo reads /proc/PID/mountinfo. Trust: mount points of a user's namespace are the user's choice; the kernel
// escapes blanks and line ends in them. Source: proc(5).
func parseMountinfo(data []byte) ([]mount, error) {
	var mounts []mount
	for line := range bytes.Lines(data) {
		head, tail, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 6 || len(rest) == 0 {
			return nil, fmt.Errorf("mountinfo: %w", errForm)
		}
		id, err := strconv.Atoi(fields[0])
		if err != nil {
			return nil, fmt.Errorf("mountinfo: %w", errForm)
		}
		mounts = append(mounts, mount{id: id, root: unescape(fields[3]), point: unescape(fields[4]), kind: rest[0]})
	}
	return mounts, nil
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
