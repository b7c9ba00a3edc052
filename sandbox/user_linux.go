package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// The range in which systemd allocates the users of DynamicUser=yes; distributions assign none of it.
// Source: systemd.io, Users, Groups, UIDs and GIDs.
const (
	DynamicUserFirst = 61184
	DynamicUserLast  = 65519
)

// systemdDynamic holds an entry, named by user id, for each dynamic user that systemd has allocated.
const systemdDynamic = "/run/systemd/dynamic-uid"

// DynamicUser returns a user id that is in none of taken, /etc/passwd, /etc/group, systemd's own allocations, and not
// used by a running process; the group of the same number goes with it. The search begins at a number that depends on
// name only, so that a service usually gets its old one back. Users that only a directory service knows are not seen.
//
// Two callers may be given the same id: whoever allocates passes those that are starting in taken. Errors: matches
// [ErrNoUser].
func DynamicUser(name string, taken map[uint32]bool) (uint32, error) {
	used, err := usedIDs()
	if err != nil {
		return 0, fmt.Errorf("dynamic user: %w", err)
	}
	const size = DynamicUserLast - DynamicUserFirst + 1
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // a hash never fails to write
	for i := range uint32(size) {
		id := DynamicUserFirst + (h.Sum32()%size+i)%size
		if taken[id] || used[id] {
			continue
		}
		if _, err := os.Lstat(filepath.Join(systemdDynamic, strconv.Itoa(int(id)))); err == nil {
			continue
		}
		return id, nil
	}
	return 0, &refusal.Error{
		Kind: refusal.Exhausted, Code: ErrNoUser.Code, What: "dynamic user",
		Why: fmt.Sprintf("all of %d to %d are in use", DynamicUserFirst, DynamicUserLast), Do: "give a user with --user",
	}
}

// usedIDs returns the ids that accounts and processes have. Of a process that ends meanwhile nothing is needed.
func usedIDs() (map[uint32]bool, error) {
	used := map[uint32]bool{}
	for _, file := range []string{"/etc/passwd", "/etc/group"} { // the id is the third field of both
		data, err := readBounded(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		addAccounts(used, data)
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		status, err := readBounded(filepath.Join("/proc", d.Name(), "status"))
		if err != nil {
			continue
		}
		c, err := parseStatus(status)
		if err != nil {
			return nil, fmt.Errorf("process %s: %w", d.Name(), err)
		}
		for _, ids := range [][]uint32{c.UIDs[:], c.GIDs[:], c.Groups} {
			for _, id := range ids {
				used[id] = true
			}
		}
	}
	return used, nil
}

// addAccounts adds the ids of a file of the form of passwd(5) or group(5).
func addAccounts(used map[uint32]bool, data []byte) {
	for line := range bytes.Lines(data) {
		fields := strings.SplitN(string(line), ":", 5)
		if len(fields) < 4 {
			continue
		}
		if id, err := strconv.ParseUint(fields[2], 10, 32); err == nil {
			used[uint32(id)] = true
		}
	}
}

// LookupUser returns the user id and primary group of a user given by name or number. A number without an account has
// the group of the same number. Errors: matches [ErrNoUser].
func LookupUser(name string) (uid, gid uint32, err error) {
	u, err := user.Lookup(name)
	if n, parseErr := strconv.ParseUint(name, 10, 32); parseErr == nil {
		if u, err = user.LookupId(name); err != nil {
			return uint32(n), uint32(n), nil
		}
	}
	if err != nil {
		return 0, 0, &refusal.Error{
			Kind: refusal.Unknown, Code: ErrNoUser.Code, What: fmt.Sprintf("user %q", name),
			Why: "there is no such account on this machine", Do: "give another --user, or none for a dynamic one", Err: err,
		}
	}
	id, err1 := strconv.ParseUint(u.Uid, 10, 32)
	group, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, fmt.Errorf("user %q: %w", name, err)
	}
	return uint32(id), uint32(group), nil
}
