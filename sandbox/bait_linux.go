package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Exit statuses of the set-user-id program.
const (
	statusIsRoot  = 10
	statusNotRoot = 20
)

// noBait is why the set-user-id program was not executed.
const noBait = "no directory that may be used honours set-user-id bits"

// baitParents are the directories in which the set-user-id program is tried. /tmp and /var/tmp are mounted nosuid on
// hardened machines, hence the third.
func baitParents() []string { return slices.Compact([]string{os.TempDir(), "/var/tmp", "/var/lib"}) }

// setUIDProgram writes a set-user-id root program that says by its exit status whether it is root, in a directory where
// the bit counts: an ordinary process of uid does become root by it (the control of the experiment). The path is empty
// if there is no such directory. The program does nothing else, so that one left behind by a crash is harmless; the next
// proof removes it (see [sweepBaits]). It cannot go without a name: a file of another mount namespace, as one reached by
// a descriptor is, never honours the bit.
func setUIDProgram(ctx context.Context, uid uint32) (path string, remove func(), err error) {
	remove = func() {}
	code := rootTester()
	if code == nil {
		return "", remove, nil
	}
	for _, parent := range baitParents() {
		sweepBaits(parent, time.Now())
		dir, err := os.MkdirTemp(parent, baitPrefix)
		if err != nil {
			continue
		}
		remove = func() { _ = os.RemoveAll(dir) }
		path := filepath.Join(dir, baitName)
		err = errors.Join(os.Chmod(dir, 0o711), os.WriteFile(path, code, 0o600), os.Chmod(path, 0o755|os.ModeSetuid))
		if err == nil {
			control := exec.CommandContext(ctx, path)
			control.Env = []string{}
			control.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			_ = control.Run() // its status is all that counts
			if control.ProcessState != nil && control.ProcessState.ExitCode() == statusIsRoot {
				return path, remove, nil
			}
		}
		remove()
	}
	return "", func() {}, ctx.Err()
}

// Names of the set-user-id program and of its directory, which a random number ends.
const (
	baitPrefix = "redoubt-probe-"
	baitName   = "am-i-root"
)

// staleBait is the age from which a directory of ours is known to be left behind: no proof takes as long.
const staleBait = 10 * time.Minute

// Bounds of one sweep: names that are read, as anyone can make them in /tmp, and directories that are removed.
const (
	maxSweepNames = 1 << 16
	maxSweepBaits = 256
)

// sweepBaits removes from parent what proofs left behind whose process was killed: directories of exactly our kind of
// name, root's, older than staleBait, that hold nothing but the program. What cannot be removed is left.
//
// Trust: others can write to parent. No symbolic link is followed, nothing outside of parent is reached, and a directory
// that is not root's is not touched.
func sweepBaits(parent string, now time.Time) {
	root, err := os.OpenRoot(parent)
	if err != nil {
		return
	}
	defer func() { _ = root.Close() }()
	names, err := root.Open(".")
	if err != nil {
		return
	}
	defer func() { _ = names.Close() }()
	var baits []string // removed when all is read: a directory that changes is not read in order
	for read := 0; read < maxSweepNames && err == nil; {
		var some []string
		some, err = names.Readdirnames(1024)
		read += len(some)
		baits = append(baits, slices.DeleteFunc(some, func(name string) bool { return !isBait(name) })...)
	}
	removed := 0
	for _, name := range baits {
		if removed < maxSweepBaits && removeBait(root, name, now) {
			removed++
		}
	}
}

// isBait reports whether name is one that os.MkdirTemp makes of baitPrefix.
func isBait(name string) bool {
	number, ok := strings.CutPrefix(name, baitPrefix)
	return ok && number != "" && strings.Trim(number, "0123456789") == ""
}

func removeBait(root *os.Root, name string, now time.Time) bool {
	info, err := root.Lstat(name)
	if err != nil || !info.IsDir() || now.Sub(info.ModTime()) < staleBait {
		return false
	}
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || s.Uid != 0 {
		return false
	}
	dir, err := root.OpenRoot(name)
	if err != nil {
		return false
	}
	defer func() { _ = dir.Close() }()
	if opened, err := dir.Stat("."); err != nil || !os.SameFile(info, opened) {
		return false // it was exchanged meanwhile
	}
	_ = dir.Remove(baitName) // there is none if the process was killed before it was made
	return root.Remove(name) == nil
}

// rootTester returns an ELF program of about 150 bytes: exit(geteuid() == 0 ? statusIsRoot : statusNotRoot). nil for an
// architecture that it is not written for.
func rootTester() []byte {
	var machine uint16
	var code []byte
	switch runtime.GOARCH {
	case "amd64":
		machine = 62 // EM_X86_64
		code = []byte{
			0xb8, 107, 0, 0, 0, // mov eax, geteuid
			0x0f, 0x05, // syscall
			0xbf, statusNotRoot, 0, 0, 0, // mov edi, statusNotRoot
			0xb9, statusIsRoot, 0, 0, 0, // mov ecx, statusIsRoot
			0x85, 0xc0, // test eax, eax
			0x0f, 0x44, 0xf9, // cmove edi, ecx
			0xb8, 60, 0, 0, 0, // mov eax, exit
			0x0f, 0x05, // syscall
		}
	case "arm64":
		machine = 183 // EM_AARCH64
		for _, word := range []uint32{
			0xd28015e8,                    // mov x8, geteuid
			0xd4000001,                    // svc 0
			0x7100001f,                    // cmp w0, 0
			0x52800001 | statusIsRoot<<5,  // mov w1, statusIsRoot
			0x52800002 | statusNotRoot<<5, // mov w2, statusNotRoot
			0x1a820020,                    // csel w0, w1, w2, eq
			0xd2800ba8,                    // mov x8, exit
			0xd4000001,                    // svc 0
		} {
			code = binary.LittleEndian.AppendUint32(code, word)
		}
	default:
		return nil
	}
	const headers, base = 64 + 56, 0x400000
	size := uint64(headers + len(code))
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(b, 2) // ET_EXEC
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+headers) // entry
	b = le.AppendUint64(b, 64)           // program headers
	b = le.AppendUint64(b, 0)            // no sections
	b = le.AppendUint32(b, 0)            // flags
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // readable, executable
	for _, v := range []uint64{0, base, base, size, size, 0x1000} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...)
}
