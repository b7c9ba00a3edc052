package set

import (
	"time"

	"github.com/redoubtsec/redoubt/policy"
)

// observable reports whether a namespace may ever be observed. Access may not: observing it would open every login and
// the management API itself. Nor may what this package does not know.
func observable(namespace string) bool {
	return namespace == policy.Run || namespace == policy.Net || namespace == policy.API
}

// side is one workload that a request concerns, with its ancestry.
type side struct {
	entity policy.Entity
	line   []policy.UID
}

func sides(r *policy.Request, workloads []policy.Entity) []side {
	out := make([]side, 0, 2+len(workloads))
	out = append(out,
		side{r.Principal, ancestry(r.Principal, r.Others)},
		side{r.Resource, ancestry(r.Resource, r.Others)})
	for _, w := range workloads {
		out = append(out, side{w, ancestry(w, r.Others)})
	}
	return out
}

func concerns(s Selector, sides []side) bool {
	if s.All {
		return true
	}
	for _, x := range sides {
		if s.matches(x.entity, x.line) {
			return true
		}
	}
	return false
}

// ModeOf returns the mode that a request is decided in, and what says so: "default", "Mode/<name>" or "Override/<id>".
//
// In Run, Net and Api: an override in force that selects a workload concerned means observe; else of the Modes that
// select one the one that names most properties, and of equals enforce; else observe. Everywhere else: enforce.
func (s *Set) ModeOf(r *policy.Request, opts DecideOptions) (policy.Mode, string) {
	if !observable(r.Action.Namespace()) {
		return policy.Enforce, "default"
	}
	return s.modeOf(r, &opts, sides(r, opts.Workloads), time.Now())
}

func (s *Set) modeOf(r *policy.Request, opts *DecideOptions, sides []side, now time.Time) (policy.Mode, string) {
	namespace := r.Action.Namespace()
	if !observable(namespace) {
		return policy.Enforce, "default"
	}
	for i := range opts.Overrides {
		// The clock is asked here as well as by the registry: an agent that is cut off must return by itself.
		if o := &opts.Overrides[i]; now.Before(o.Expires) && concerns(o.Selector, sides) {
			return policy.Observe, "Override/" + o.ID
		}
	}
	for _, m := range s.modes[namespace] {
		if concerns(m.For, sides) {
			return m.Mode, "Mode/" + m.Name
		}
	}
	return policy.Observe, "default"
}
