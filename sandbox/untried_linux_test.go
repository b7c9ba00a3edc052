package sandbox_test

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/sandbox"
)

func TestAnAttackThatWasNotMadeProvesNothing(t *testing.T) {
	meter := counts{}
	got, _ := sandbox.JudgedUntried(sandbox.ProveConfig{Now: nowFixed, Meter: meter}, sandbox.ProtectVsock, "no memory").([]policy.Protection)
	if len(got) != 3 || got[1].State != policy.Enforced {
		t.Fatalf("got %+v", got)
	}
	for _, p := range []policy.Protection{got[0], got[2]} {
		if p.State != policy.NotEnforceable || !p.Proved.IsZero() || !strings.Contains(p.Reason, "not proved: no memory") || p.Change == "" {
			t.Errorf("got %+v", p)
		}
	}
	if meter["sandbox_probes probe run.vsock result not-attempted"] != 1 {
		t.Errorf("counted %v", meter)
	}
}

func TestASilentProberProvesNothing(t *testing.T) {
	got := sandbox.Complete()
	for _, name := range []string{sandbox.ProtectCgroup, sandbox.ProtectSetUID, sandbox.ProtectVsock, sandbox.ProtectCaps} {
		if !slices.Contains(got, name) {
			t.Errorf("%s is not missed: %v", name, got)
		}
	}
}

func TestAttacksThatCannotBeMade(t *testing.T) {
	for _, attack := range []string{"no-bait", "bad-bait", "odd-bait", "no-child", "no-family"} {
		if refused, how := sandbox.Attacks[attack](); refused || !strings.HasPrefix(how, "untried: ") {
			t.Errorf("%s: refused=%v %s", attack, refused, how)
		}
	}
}

// A machine where no directory for the bait honours the bit: the proof says so, of the protection and of the whole.
func TestProveWithoutABaitClaimsNothing(t *testing.T) {
	needRoot(t)
	out := helper(t, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, "prove-nosuid", unified(t))
	for _, want := range []string{
		"run.confinement=not enforceable run.setuid: not proved: no directory", "run.setuid=not enforceable not proved: no directory",
		"run.vsock=enforced", "err=<nil>",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
}

// nosuidBaits mounts over every directory of the bait, in the mount namespace of the helper's own.
func nosuidBaits() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, dir := range sandbox.BaitParents() {
		if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOSUID, "mode=1777"); err != nil {
			return err
		}
	}
	return nil
}
