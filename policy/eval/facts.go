package eval

import (
	"strings"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

// Names of risk facts that the schema has beside [identity.FactQuarantined].
const (
	factCompromised = "risk.compromised" // bool
	factRiskScore   = "risk.score"       // int64, 0 to 100
)

// WorkloadEntity returns the workload that facts describe, as policies see it: attributes by the names of the published
// schema, labels as tags, and its service, machine and image as parents. Its id is the SPIFFE ID; without one (no
// issuance rule matches) it is the instance. Facts that the schema has no attribute for are left out, as are those whose
// value is of another type than the schema's.
func WorkloadEntity(id identity.ID, facts identity.FactSet) policy.Entity {
	e := policy.Entity{UID: policy.UID{Type: "Workload", ID: id.String()}, Attrs: policy.Record{}}
	if id.IsZero() {
		e.UID.ID = facts.Text(identity.FactInstance)
	} else {
		e.Attrs["identity"] = id.String()
	}
	for _, a := range workloadAttributes {
		f, ok := facts.Get(a.fact)
		if !ok {
			continue
		}
		v := valueOf(f.Value)
		switch v.(type) {
		case string:
			ok = a.kind == text
		case int64:
			ok = a.kind == whole
		case bool:
			ok = a.kind == flag
		case []any:
			ok = a.kind == list
		}
		if ok {
			put(e.Attrs, a.path, v)
		}
	}
	if s := facts.Text(identity.FactService); s != "" {
		e.Parents = append(e.Parents, policy.UID{Type: "Service", ID: s})
	}
	if m := facts.Text(identity.FactMachine); m != "" {
		machine := policy.UID{Type: "Machine", ID: m}
		e.Attrs["machine"] = machine
		e.Parents = append(e.Parents, machine)
	}
	if d := facts.Text(identity.FactImageDigest); d != "" {
		e.Parents = append(e.Parents, policy.UID{Type: "Image", ID: d})
	}
	e.Tags = labels(facts)
	return e
}

// kind is the type that the schema gives an attribute.
type kind int

const (
	text kind = iota
	whole
	flag
	list
)

// workloadAttributes maps facts to attributes of Workload; machine is apart, since it is an entity.
var workloadAttributes = []struct {
	fact, path string
	kind       kind
}{
	{identity.FactInstance, "instance", text},
	{identity.FactService, "service", text},
	{identity.FactHow, "how", text},
	{identity.FactName, "description", text},
	{identity.FactUID, "uid", whole},
	{identity.FactGID, "gid", whole},
	{identity.FactExePath, "executable.path", text},
	{identity.FactExeSHA256, "executable.sha256", text},
	{identity.FactParents, "ancestry", list},
	{identity.FactProcess, "process", text},
	{identity.FactCgroup, "cgroup", text},
	{identity.FactUnit, "unit", text},
	{identity.FactContainerID, "container.id", text},
	{identity.FactEngine, "container.engine", text},
	{identity.FactImage, "container.image", text},
	{identity.FactImageDigest, "container.digest", text},
	{identity.FactListen, "listens", list},
	{identity.FactPrivileged, "privileged", flag},
	{identity.FactQuarantined, "quarantined", flag},
	{factCompromised, "compromised", flag},
	{factRiskScore, "riskScore", whole},
}

// labels returns the tags of a workload. Labels of its image keep the prefix container.label., so that whoever built the
// image cannot give it a label of the operator's; where an operator's label has that very name, it wins.
func labels(facts identity.FactSet) map[string]string {
	var tags map[string]string
	set := func(k, v string) {
		if tags == nil {
			tags = map[string]string{}
		}
		tags[k] = v
	}
	for _, f := range facts.All() {
		v, ok := f.Value.(string)
		if !ok {
			continue
		}
		if k, ok := strings.CutPrefix(f.Name, identity.FactLabelPrefix); ok {
			set(k, v) // sorts after container.label., and so wins
		} else if strings.HasPrefix(f.Name, identity.FactImgLabPrefix) {
			set(f.Name, v)
		}
	}
	return tags
}

// clashKey is where the value of a fact goes whose name is also the beginning of another's.
const clashKey = "value"

// shortNames are facts that a predicate may also speak of by one word, as the attributes of Workload are named.
var shortNames = map[string]string{
	identity.FactService: "service", identity.FactInstance: "instance", identity.FactHow: "how",
	identity.FactPrivileged: "privileged", identity.FactUID: "uid", identity.FactGID: "gid",
	identity.FactUnit: "unit", identity.FactQuarantined: "quarantined",
}

// FactsRecord returns facts as the record that a [Predicate] matches. Dots nest: executable.sha256 is
// context.executable.sha256. Labels stay whole, whatever dots they have: label.app is context.label.app, and label.a.b
// is context.label["a.b"]; those of the image are under context.container.label. A few facts also have a short name:
// service, instance, how, privileged, uid, gid, unit, quarantined.
//
// Of two facts one of whose names begins the other's ("a" and "a.b"), the shorter's value is at context.a.value, unless a
// fact of that name is there. A short name gives way to a fact, or a beginning of one, of that name.
func FactsRecord(facts identity.FactSet) policy.Record {
	r := policy.Record{}
	// In order of name a fact comes before those that it begins, and records made later replace nothing.
	for _, f := range facts.All() {
		v := valueOf(f.Value)
		if k, ok := strings.CutPrefix(f.Name, identity.FactLabelPrefix); ok {
			record(r, "label")[k] = v
		} else if k, ok := strings.CutPrefix(f.Name, identity.FactImgLabPrefix); ok {
			record(record(r, "container"), "label")[k] = v
		} else {
			put(r, f.Name, v)
		}
	}
	for fact, short := range shortNames {
		if f, ok := facts.Get(fact); ok {
			if _, taken := r[short]; !taken {
				r[short] = valueOf(f.Value)
			}
		}
	}
	return r
}

// put sets the value at a dotted path, making records on the way.
func put(r policy.Record, path string, v any) {
	for {
		head, rest, more := strings.Cut(path, ".")
		if !more {
			break
		}
		r, path = record(r, head), rest
	}
	if inner, ok := r[path].(policy.Record); ok {
		if _, taken := inner[clashKey]; !taken {
			inner[clashKey] = v
		}
		return
	}
	r[path] = v
}

// record returns the record at key; a value that is there moves into it.
func record(r policy.Record, key string) policy.Record {
	switch v := r[key].(type) {
	case policy.Record:
		return v
	case nil:
		inner := policy.Record{}
		r[key] = inner
		return inner
	default:
		inner := policy.Record{clashKey: v}
		r[key] = inner
		return inner
	}
}

// valueOf returns a fact's value as a value of a policy.
func valueOf(v any) any {
	if l, ok := v.([]string); ok {
		items := make([]any, len(l))
		for i, s := range l {
			items[i] = s
		}
		return items
	}
	return v
}
