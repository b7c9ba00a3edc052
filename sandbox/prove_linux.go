package sandbox

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

// proveTime bounds one proof, whatever the caller's context.
const proveTime = 20 * time.Second

// outcome is what one attack came to, as the attacker saw it.
//
// Zero value: it succeeded.
type outcome struct {
	Name    string
	Refused bool
	Untried bool   // it could not be made, which proves nothing
	How     string // "EPERM"; what was gained; or why it was not made
}

func (o outcome) succeeded() bool { return !o.Refused && !o.Untried }

// Prove attacks the confinement of a throw-away workload from within and reports, protection by protection, what was
// refused; the first is [Whole]. A protection is enforced only if its attack was refused just now: one whose attack could
// not be made is not enforceable, "not proved", and neither is the whole. The one attack that needs something of the
// machine is a set-user-id program's, which needs a file system that honours the bit in one of [baitParents]: where none
// does, others (that of /usr) still do, so the attack is not beside the point, and nothing is claimed.
//
// Errors: the workload could not be started ([Start]) or did not answer; nothing was proved then. Its cgroup and files
// are gone when Prove returns.
func Prove(ctx context.Context, c ProveConfig) (_ []policy.Protection, err error) {
	ctx, cancel := context.WithTimeout(ctx, proveTime)
	defer cancel()
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	uid := c.UID
	if uid == 0 {
		if uid, err = DynamicUser("redoubt-probe", c.Taken); err != nil {
			return nil, err
		}
	}
	cgroup, err := MakeCgroup(c.CgroupRoot, identity.Unique("redoubt-probe"))
	if err != nil {
		return nil, err
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), proveTime)
		defer cancel()
		err = errors.Join(err, cgroup.Kill(), cgroup.Remove(end))
	}()
	outcomes, err := attack(ctx, cgroup, uid)
	if err != nil {
		return nil, fmt.Errorf("prove the confinement: %w", err)
	}
	return protections(c, outcomes), nil
}

func protections(c ProveConfig, outcomes []outcome) []policy.Protection {
	now := c.Now().UTC()
	whole := policy.Protection{Machine: c.Machine, Name: Whole, State: policy.Enforced, Proved: now}
	var parts []policy.Protection
	for _, o := range outcomes {
		p := policy.Protection{Machine: c.Machine, Name: o.Name, State: policy.Enforced, Proved: now}
		result := "refused"
		switch {
		case o.Untried:
			result, p.Reason, p.Change = "not-attempted", "not proved: "+o.How, changeUntried
			if o.How == noBait {
				p.Change = "mount one of " + strings.Join(baitParents(), ", ") + " without nosuid and noexec"
			}
		case !o.Refused:
			result, p.Reason, p.Change = "succeeded", "the attack succeeded: "+o.How, changeProbeFailure
		}
		c.Meter.Count("sandbox_probes", 1, "probe", o.Name, "result", result)
		if p.Reason != "" {
			p.State, p.Proved = policy.NotEnforceable, time.Time{}
			whole.State, whole.Proved = policy.NotEnforceable, time.Time{}
			whole.Reason = strings.TrimPrefix(whole.Reason+"; "+o.Name+": "+p.Reason, "; ")
			if whole.Change == "" || o.succeeded() {
				whole.Change = p.Change
			}
		}
		parts = append(parts, p)
	}
	return slices.Concat([]policy.Protection{whole}, parts)
}

// attack starts the prober as a workload and returns what it says.
func attack(ctx context.Context, cgroup *Cgroup, uid uint32) ([]outcome, error) {
	self, err := ownExecutable()
	if err != nil {
		return nil, err
	}
	defer func() { _ = self.Close() }()
	bait, remove, err := setUIDProgram(ctx, uid)
	if err != nil {
		return nil, err
	}
	defer remove()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	p, err := start(ctx, Spec{Argv: []string{probeName, probeAll, bait}, CgroupFD: cgroup.FD(), UID: uid, GID: uid, Stdout: w}, self)
	_ = w.Close()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cgroup.Kill() })
	defer stop()
	data, readErr := io.ReadAll(io.LimitReader(r, maxReportBytes))
	exit, waitErr := p.Wait()
	var outcomes []outcome
	if err := errors.Join(readErr, waitErr, ctx.Err()); err != nil {
		return nil, err
	}
	if exit.Status() != 0 {
		return nil, fmt.Errorf("the prober ended with status %d", exit.Status())
	}
	if err := json.Unmarshal(data, &outcomes); err != nil {
		return nil, fmt.Errorf("the prober's answer: %w", err)
	}
	return complete(outcomes), nil
}

// complete adds an attack that was not made for every protection of which the prober says nothing.
func complete(outcomes []outcome) []outcome {
	names := []string{
		ProtectCgroup, ProtectCgroupfs, ProtectIOUring, ProtectPacket, ProtectVsock, ProtectCaps, ProtectNoNewPrivs, ProtectSetUID,
	}
	if haveForeignCalls {
		names = append(names, ProtectForeign)
	}
	for _, name := range names {
		if !slices.ContainsFunc(outcomes, func(o outcome) bool { return o.Name == name }) {
			outcomes = append(outcomes, outcome{Name: name, Untried: true, How: "the prober said nothing of it"})
		}
	}
	return outcomes
}

// ownExecutable opens this program so that an unprivileged user can execute it, wherever its file lies: as it is if its
// mode allows, else a copy in memory.
func ownExecutable() (*os.File, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if info.Mode().Perm()&0o005 == 0o005 {
		return f, nil
	}
	defer func() { _ = f.Close() }()
	fd, err := unix.MemfdCreate("redoubt-probe", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	m := os.NewFile(uintptr(fd), "redoubt-probe")
	_, err = io.Copy(m, f)
	if err == nil {
		err = m.Chmod(0o555)
	}
	if err != nil {
		_ = m.Close()
		return nil, err
	}
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) // a file that is open for writing cannot be executed
	_ = m.Close()
	return ro, err
}

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
// if there is no such directory. The program does nothing else, so that one left behind by a crash is harmless.
func setUIDProgram(ctx context.Context, uid uint32) (path string, remove func(), err error) {
	remove = func() {}
	code := rootTester()
	if code == nil {
		return "", remove, nil
	}
	for _, parent := range baitParents() {
		dir, err := os.MkdirTemp(parent, "redoubt-probe-")
		if err != nil {
			continue
		}
		remove = func() { _ = os.RemoveAll(dir) }
		path := filepath.Join(dir, "am-i-root")
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
