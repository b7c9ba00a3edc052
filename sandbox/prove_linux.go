package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
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
