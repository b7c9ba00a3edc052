package machine

import (
	"slices"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/policy"
)

// Confinement is the name of the protection that redoubt run gives: own cgroup, no privileges, seccomp filter.
const Confinement = "run.confinement"

// Protections tells the truth about every workload here. proofs are what probes proved on this machine (sandbox.Prove): a
// workload started by redoubt run is enforced as of the last proof, and never without one.
//
// doubts say of instances why what was proved in general does not hold of them.
func (m *Machine) Protections(proofs []policy.Protection, doubts map[string]string) []policy.Protection {
	proved, refuted := combined(proofs)
	released := m.Released()
	var out []policy.Protection
	for _, w := range m.Workloads() {
		p := policy.Protection{Machine: m.cfg.ID, Workload: w.Instance, Name: Confinement}
		switch {
		case w.Privileged:
			p.State, p.Reason = policy.NotEnforceable, "privileged workload"
			p.Change = "run it as another user than root: uid 0 leaves its cgroup by writing one file"
		case w.How != ByRun:
			p.State, p.Reason = policy.NotEnforceable, "it was running before Redoubt, which cannot confine a running process"
			p.Change = "start it with redoubt run"
		case w.PID == 0:
			p.State, p.Reason, p.Change = policy.NotEnforceable, "it has not started yet", "nothing: it is about to"
		case doubts[w.Instance] != "":
			p.State, p.Reason = policy.NotEnforceable, doubts[w.Instance]
			p.Change = "run it without --user, as a dynamic user that nobody else is"
		case refuted != "":
			p.State, p.Reason = policy.NotEnforceable, refuted
			p.Change = "see redoubt doctor for what this machine lacks"
		case proved.IsZero():
			p.State, p.Reason = policy.NotEnforceable, "not proved yet"
			p.Change = "the agent proves it at start and every few minutes"
		default:
			p.State, p.Proved = policy.Enforced, proved
		}
		out = append(out, p)
		decisions := policy.Protection{
			Machine: m.cfg.ID, Workload: w.Instance, Name: "net.connect", State: policy.NotEnforceable,
			Reason: "no network point is built into this version", Change: "the mesh point comes with a later version",
		}
		if released != nil {
			decisions.Reason = "released by " + released.Actor + "; " + decisions.Reason
		}
		out = append(out, decisions)
	}
	return out
}

// combined returns when all proofs held, the oldest of them, or why one did not.
func combined(proofs []policy.Protection) (time.Time, string) {
	var oldest time.Time
	var failed []string
	for _, p := range proofs {
		if p.State != policy.Enforced {
			failed = append(failed, p.Name+": "+p.Reason)
			continue
		}
		if oldest.IsZero() || p.Proved.Before(oldest) {
			oldest = p.Proved
		}
	}
	slices.Sort(failed)
	return oldest, strings.Join(failed, "; ")
}
