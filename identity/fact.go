package identity

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Source says who vouches for a fact. Policies and issuance rules may weigh it; nothing a workload says of itself is a
// source.
type Source string

// The sources of facts on the ground floor.
const (
	FromKernel    Source = "kernel"    // read by the agent from the kernel (credentials, cgroup, executable)
	FromContainer Source = "container" // read by the agent from the container engine's own records
	FromOperator  Source = "operator"  // declared by root of the machine (redoubt run, redoubt enroll)
	FromServer    Source = "server"    // set by the server (machine name, quarantine)
)

// Fact is one typed statement about one subject.
//
// Shape: Name is dotted and lower-case ("executable.sha256"); Value is a string, bool, int64 or []string and nothing
// else. Epoch rises whenever the statement about this subject and name changes. Expires is zero where it does not.
type Fact struct {
	Name     string    `json:"name"`
	Value    any       `json:"value"`
	Source   Source    `json:"source"`
	Evidence string    `json:"evidence,omitempty"` // where it was read: "/proc/412/exe"
	Epoch    uint64    `json:"epoch"`
	Expires  time.Time `json:"expires,omitzero"`
}

// Names of facts on the ground floor. Labels are `label.<key>`.
const (
	FactService      = "workload.service"     // string
	FactInstance     = "workload.instance"    // string, w-…
	FactPrivileged   = "workload.privileged"  // bool
	FactHow          = "workload.how"         // string: run, enroll, container
	FactMachine      = "machine.id"           // string
	FactUID          = "unix.uid"             // int64
	FactGID          = "unix.gid"             // int64
	FactExePath      = "executable.path"      // string, as the kernel shows it now
	FactExeSHA256    = "executable.sha256"    // string, 64 hex digits
	FactCgroup       = "cgroup.path"          // string, within the unified hierarchy
	FactUnit         = "systemd.unit"         // string
	FactParents      = "process.parents"      // []string: executables from the parent up
	FactContainerID  = "container.id"         // string, 64 hex digits
	FactEngine       = "container.engine"     // string: podman, runc
	FactImage        = "container.image"      // string, the reference
	FactImageDigest  = "container.digest"     // string, sha256:…
	FactQuarantined  = "risk.quarantined"     // bool
	FactLabelPrefix  = "label."               // string values
	FactImgLabPrefix = "container.label."     // string values
	FactListen       = "workload.listen"      // []string: "8080/http"
	FactProcess      = "process.start"        // string: pid:starttime of the first process
	FactName         = "workload.description" // string, free text of an operator
)

// FactSet is the facts of one subject, by name.
//
// Zero value: an empty set, ready for Get; use [NewFactSet] or With to build one.
// Concurrency: immutable; With returns a copy.
type FactSet struct {
	facts map[string]Fact
}

// NewFactSet returns the set of these facts; of two with one name the later wins. Errors: a name or value of a wrong
// shape. Trust: facts may come from an agent and are checked here.
func NewFactSet(facts ...Fact) (FactSet, error) {
	s := FactSet{facts: make(map[string]Fact, len(facts))}
	for _, f := range facts {
		v, err := normal(f)
		if err != nil {
			return FactSet{}, err
		}
		f.Value = v
		s.facts[f.Name] = f
	}
	return s, nil
}

// The bounds of one fact.
const (
	maxFactName  = 200
	maxFactValue = 4096
	maxFactItems = 256
)

func normal(f Fact) (any, error) {
	if f.Name == "" || len(f.Name) > maxFactName || strings.ContainsFunc(f.Name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("fact: a name has 1 to %d bytes and no blanks", maxFactName)
	}
	switch v := f.Value.(type) {
	case string:
		if len(v) > maxFactValue {
			return nil, fmt.Errorf("fact %s: longer than %d bytes", f.Name, maxFactValue)
		}
		return v, nil
	case bool, int64:
		return v, nil
	case int:
		return int64(v), nil
	case float64:
		if v != float64(int64(v)) {
			return nil, fmt.Errorf("fact %s: not a whole number", f.Name)
		}
		return int64(v), nil
	case []string:
		if len(v) > maxFactItems {
			return nil, fmt.Errorf("fact %s: more than %d items", f.Name, maxFactItems)
		}
		return slices.Clone(v), nil
	case []any:
		if len(v) > maxFactItems {
			return nil, fmt.Errorf("fact %s: more than %d items", f.Name, maxFactItems)
		}
		out := make([]string, len(v))
		for i, x := range v {
			s, ok := x.(string)
			if !ok || len(s) > maxFactValue {
				return nil, fmt.Errorf("fact %s: a list holds strings of at most %d bytes only", f.Name, maxFactValue)
			}
			out[i] = s
		}
		return out, nil
	default:
		return nil, fmt.Errorf("fact %s: its value is not a string, bool, whole number or list of strings", f.Name)
	}
}

// Get returns the fact of this name, if there is one.
func (s FactSet) Get(name string) (Fact, bool) {
	f, ok := s.facts[name]
	return f, ok
}

// Text returns the string value of a fact, or "" if it is absent or no string.
func (s FactSet) Text(name string) string {
	v, _ := s.facts[name].Value.(string)
	return v
}

// All returns the facts in order of name.
func (s FactSet) All() []Fact {
	return slices.SortedFunc(maps.Values(s.facts), func(a, b Fact) int { return cmp.Compare(a.Name, b.Name) })
}

// Len returns how many facts there are.
func (s FactSet) Len() int { return len(s.facts) }

// With returns a copy that also has these facts. A fact whose value differs from the one it replaces gets an epoch
// above it; one whose value is the same keeps its epoch.
func (s FactSet) With(facts ...Fact) (FactSet, error) {
	add, err := NewFactSet(facts...)
	if err != nil {
		return FactSet{}, err
	}
	out := FactSet{facts: maps.Clone(s.facts)}
	if out.facts == nil {
		out.facts = map[string]Fact{}
	}
	for name, f := range add.facts {
		if old, ok := out.facts[name]; ok {
			f.Epoch = max(f.Epoch, old.Epoch)
			if !sameValue(old.Value, f.Value) && f.Epoch == old.Epoch {
				f.Epoch++
			}
		}
		out.facts[name] = f
	}
	return out, nil
}

// Without returns a copy that lacks these names.
func (s FactSet) Without(names ...string) FactSet {
	out := FactSet{facts: maps.Clone(s.facts)}
	for _, n := range names {
		delete(out.facts, n)
	}
	return out
}

// Digest returns the SHA-256, in hex, of names, values and sources: two sets with one digest describe the same thing,
// whatever their epochs and evidence.
func (s FactSet) Digest() string {
	h := sha256.New()
	enc := json.NewEncoder(h)
	for _, f := range s.All() {
		_ = enc.Encode([]any{f.Name, f.Value, f.Source}) // a hash never fails to write, and values are plain
	}
	return hex.EncodeToString(h.Sum(nil))
}

// MarshalJSON renders a list in order of name.
func (s FactSet) MarshalJSON() ([]byte, error) { return json.Marshal(s.All()) }

// UnmarshalJSON reads that list. Trust: b is attacker-controlled.
func (s *FactSet) UnmarshalJSON(b []byte) error {
	var facts []Fact
	if err := json.Unmarshal(b, &facts); err != nil {
		return err
	}
	set, err := NewFactSet(facts...)
	if err != nil {
		return err
	}
	*s = set
	return nil
}

func sameValue(a, b any) bool {
	x, okA := a.([]string)
	y, okB := b.([]string)
	if okA || okB {
		return okA && okB && slices.Equal(x, y)
	}
	return a == b
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
