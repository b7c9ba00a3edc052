package sandbox

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// ownMounts moves the thread into a mount namespace of its own. Private, so that what is mounted on the host later (a
// cgroupfs, writable) does not appear in it.
func ownMounts(wire) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	return nil
}

// protectCgroupfs makes every cgroup mount read-only, of version 1 and 2. Hiding them would break runtimes that size
// themselves by their limits. In a user namespace that the workload makes, the kernel locks the flag (mount_namespaces(7));
// a cgroup2 that it mounts afresh there is writable, but its directories are root's.
//
// It refuses to work in the namespace of the agent, where it would take cgroupfs from the whole machine.
func protectCgroupfs(w wire) error {
	own, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return err
	}
	if w.HostMounts == "" || own == w.HostMounts {
		return errors.New("it is still in the agent's mount namespace")
	}
	mounts, err := cgroupMounts("/proc/thread-self")
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if !m.reachable("") {
			continue // another mount lies over it, which the workload cannot take away
		}
		err := unix.MountSetattr(unix.AT_FDCWD, m.point, unix.AT_SYMLINK_NOFOLLOW, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
		if err != nil {
			return fmt.Errorf("make %s read-only: %w", m.point, err)
		}
	}
	return nil
}

// dropBounding empties the bounding set, so that no program that it executes can bring a capability with it.
func dropBounding(wire) error {
	for c := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > 0 {
			return nil // past the last capability that this kernel knows
		}
		if err != nil {
			return fmt.Errorf("capability %d: %w", c, err)
		}
	}
	return nil
}

// The securebits of linux/securebits.h, and their locks.
const (
	noRoot         = 1 << 0 // uid 0 is nobody special at exec
	noSetUIDFixup  = 1 << 2
	keepCaps       = 1 << 4
	noAmbientRaise = 1 << 6
	lockOf         = 1 // a lock is the bit above
)

// lockSecurebits sets the bits by which uid 0 means nothing, and locks all of them.
func lockSecurebits(wire) error {
	bits := noRoot | noSetUIDFixup | noAmbientRaise
	bits |= (noRoot | noSetUIDFixup | keepCaps | noAmbientRaise) << lockOf
	return unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits), 0, 0, 0)
}

// dropGroups clears the supplementary groups. The raw call: it is this thread's only.
func dropGroups(wire) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
	return asError(errno)
}

// dropUser sets all three group and user ids; the file system ids follow.
func dropUser(w wire) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(w.GID), uintptr(w.GID), uintptr(w.GID)); errno != 0 {
		return fmt.Errorf("group %d: %w", w.GID, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(w.UID), uintptr(w.UID), uintptr(w.UID)); errno != 0 {
		return fmt.Errorf("user %d: %w", w.UID, errno)
	}
	return nil
}

// dropCapabilities empties the ambient, inheritable, permitted and effective sets.
func dropCapabilities(wire) error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient: %w", err)
	}
	var none [2]unix.CapUserData
	return unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0])
}

// forbidNewPrivileges makes set-user-id bits and file capabilities mean nothing, for good.
func forbidNewPrivileges(wire) error {
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// newKeyring joins a new, empty session keyring: possession of the caller's would open its keys whatever the user.
func newKeyring(wire) error {
	_, _, errno := unix.Syscall(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0)
	if errno == unix.ENOSYS {
		return nil // a kernel without keys has none to leak
	}
	return asError(errno)
}

// enterDirectory enters the working directory as the workload's user, so that root's right to go anywhere does not
// carry over.
func enterDirectory(w wire) error {
	dir := string(w.Dir)
	if dir == "" {
		dir = "/"
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

// closeDescriptors closes everything above standard error at exec: a descriptor of a cgroup directory, of the agent's
// sockets or database would pass every check made by path.
func closeDescriptors(wire) error {
	return unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
}

// checkConfined reads back from the kernel what the steps have set.
func checkConfined(w wire) error {
	c, err := confinementOf("/proc/thread-self", "")
	if err != nil {
		return err
	}
	if want := [4]uint32{w.UID, w.UID, w.UID, w.UID}; c.UIDs != want {
		return fmt.Errorf("its user ids are %v", c.UIDs)
	}
	if want := [4]uint32{w.GID, w.GID, w.GID, w.GID}; c.GIDs != want {
		return fmt.Errorf("its group ids are %v", c.GIDs)
	}
	if lacks := c.Lacks(); len(lacks) > 0 {
		return errors.New(lacks[0])
	}
	return nil
}

func asError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
