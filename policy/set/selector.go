package set

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Selector picks workloads: all of them, or those that have every property it names.
//
// Shape: All excludes the other fields. Zero value: selects nothing, and is refused wherever one is read.
type Selector struct {
	All     bool              `json:"all,omitempty"`
	Service string            `json:"service,omitempty"`
	Machine string            `json:"machine,omitempty"` // a machine id
	Labels  map[string]string `json:"labels,omitempty"`  // every one must be there with this value
}

// The bounds of a selector.
const (
	maxSelectorLabels = 16
	maxLabelKey       = 128
	maxLabelValue     = 256
)

// ErrSelector is the code of every refusal of a [Selector].
var ErrSelector = &refusal.Error{Code: "malformed-selector"}

// plainName is the form of names of services, documents, machines and label keys.
var plainName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$`)

// ParseSelector reads the form of `redoubt observe --for`: service=NAME, machine=ID and label.KEY=VALUE, joined by
// commas. Errors: matches [ErrSelector]. Trust: s is attacker-controlled.
func ParseSelector(s string) (Selector, error) {
	var out Selector
	for part := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || value == "" {
			return Selector{}, badSelector("a part of it is not of the form key=value")
		}
		label, isLabel := strings.CutPrefix(key, "label.")
		switch {
		case key == "service" && out.Service == "":
			out.Service = value
		case key == "machine" && out.Machine == "":
			out.Machine = value
		case isLabel:
			if _, twice := out.Labels[label]; twice {
				return Selector{}, badSelector("it names one label twice")
			}
			if out.Labels == nil {
				out.Labels = map[string]string{}
			}
			out.Labels[label] = value
		case key == "service" || key == "machine":
			return Selector{}, badSelector("it names " + key + " twice")
		default:
			return Selector{}, badSelector("a key of it is not service, machine or label.KEY")
		}
	}
	return out, out.Check()
}

// Check says whether the selector is well-formed. Errors: matches [ErrSelector].
func (s Selector) Check() error {
	switch {
	case s.All && s.terms() > 0:
		return badSelector("it selects all and names properties as well")
	case !s.All && s.terms() == 0:
		return badSelector("it selects nothing")
	case len(s.Labels) > maxSelectorLabels:
		return badSelector(fmt.Sprintf("it names more than %d labels", maxSelectorLabels))
	case s.Service != "" && !isName(s.Service):
		return badSelector("its service is no plain name")
	case s.Machine != "" && !isName(s.Machine):
		return badSelector("its machine is no plain name")
	}
	for key, value := range s.Labels {
		if len(key) > maxLabelKey || !plainName.MatchString(key) {
			return badSelector("a label's key is no plain name")
		}
		if value == "" || len(value) > maxLabelValue {
			return badSelector(fmt.Sprintf("a label's value does not have 1 to %d bytes", maxLabelValue))
		}
	}
	return nil
}

func badSelector(why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrSelector.Code, What: "selector", Why: why,
		Do: "give all, or one or more of service, machine and labels",
	}
}

// maxName bounds names of documents, services and machines.
const maxName = 128

func isName(s string) bool { return len(s) <= maxName && plainName.MatchString(s) }

// terms is the number of properties that the selector names, which is how specific it is; all is 0.
func (s Selector) terms() int {
	n := len(s.Labels)
	if s.Service != "" {
		n++
	}
	if s.Machine != "" {
		n++
	}
	return n
}

// String renders what [ParseSelector] reads, or "all".
func (s Selector) String() string {
	if s.All {
		return "all"
	}
	var parts []string
	if s.Service != "" {
		parts = append(parts, "service="+s.Service)
	}
	if s.Machine != "" {
		parts = append(parts, "machine="+s.Machine)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		parts = append(parts, "label."+key+"="+s.Labels[key])
	}
	return strings.Join(parts, ",")
}

// Matches reports whether the selector picks the workload that e stands for. A service or machine matches as the entity
// itself or as one of its ancestors, which are its parents and, through others, theirs; a label matches as a tag.
func (s Selector) Matches(e policy.Entity, others []policy.Entity) bool {
	if s.All {
		return true
	}
	if s.terms() == 0 {
		return false
	}
	return s.matches(e, ancestry(e, others))
}

func (s Selector) matches(e policy.Entity, line []policy.UID) bool {
	if s.All {
		return true
	}
	if s.terms() == 0 ||
		s.Service != "" && !slices.Contains(line, policy.UID{Type: "Service", ID: s.Service}) ||
		s.Machine != "" && !slices.Contains(line, policy.UID{Type: "Machine", ID: s.Machine}) {
		return false
	}
	for key, want := range s.Labels {
		if got, ok := e.Tags[key]; !ok || got != want {
			return false
		}
	}
	return true
}

// maxAncestry bounds the walk up from one entity; what lies beyond is not seen.
const maxAncestry = 256

// ancestry returns e's own UID and those of its ancestors, each once.
func ancestry(e policy.Entity, others []policy.Entity) []policy.UID {
	line := append(make([]policy.UID, 0, 1+len(e.Parents)), e.UID)
	add := func(uids []policy.UID) {
		for _, u := range uids {
			if len(line) < maxAncestry && !slices.Contains(line, u) {
				line = append(line, u)
			}
		}
	}
	add(e.Parents)
	if len(others) == 0 {
		return line
	}
	for i := 0; i < len(line); i++ {
		for _, o := range others {
			if o.UID == line[i] {
				add(o.Parents)
			}
		}
	}
	return line
}
