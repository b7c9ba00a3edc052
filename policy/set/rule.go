package set

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

// IssuanceRule gives an identity to workloads whose facts fulfil a predicate.
//
//	kind: IssuanceRule
//	name: by-service
//	spec:
//	  when: context has service && context.machine.id == "m1"   # Cedar, over context only
//	  id: /service/{workload.service}                           # path of the SPIFFE ID
//	  priority: 10                                              # default 0; the highest that matches wins
//
// A placeholder {NAME} stands for the fact of that name; there is at most one in a segment of the path, so that two
// different facts can never make one identity. A rule that matches and cannot fill its template (the fact is absent,
// empty, or no path segment) refuses; a rule of lower priority does not step in, since a workload could otherwise change
// its identity by leaving a fact out.
type IssuanceRule struct {
	Document
	When     string
	ID       string
	Priority int64

	builtin   bool
	predicate *eval.Predicate
	template  []segment
}

// segment is one segment of a template: prefix, the value of fact (if fact is not ""), suffix.
type segment struct {
	prefix, fact, suffix string
}

// The bounds of issuance rules.
const (
	maxPredicate = 8 << 10
	maxTemplate  = 1024
	maxPriority  = 1_000_000
)

// reservedPaths are the first segments of SPIFFE IDs that name Redoubt's own: agents (/machine/…) and servers
// (/redoubt/…). No issuance rule can make one.
var reservedPaths = []string{"machine", "redoubt"}

func isReserved(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return slices.Contains(reservedPaths, first)
}

// placeholders are the facts that a template may name, and why not the others.
var placeholders = map[string]string{
	identity.FactService:     "",
	identity.FactInstance:    "",
	identity.FactHow:         "",
	identity.FactMachine:     "",
	identity.FactUID:         "",
	identity.FactGID:         "",
	identity.FactExeSHA256:   "",
	identity.FactUnit:        "",
	identity.FactContainerID: "",
	identity.FactEngine:      "",
	identity.FactExePath:     "a path has slashes",
	identity.FactCgroup:      "a path has slashes",
	identity.FactImage:       "an image reference has slashes and colons",
	identity.FactImageDigest: "a digest has a colon",
	identity.FactProcess:     "its value has a colon",
	identity.FactPrivileged:  "it is a truth value",
	identity.FactQuarantined: "it is a truth value",
	identity.FactParents:     "it is a list",
	identity.FactListen:      "it is a list",
	identity.FactName:        "it is free text",
}

func (d *documents) readRule(r *reader, doc Document, spec *yaml.Node) {
	o := r.object(spec, "spec", "when", "id", "priority")
	if o == nil {
		return
	}
	rule := &IssuanceRule{Document: doc, Priority: o.integer("priority", -maxPriority, maxPriority, 0)}
	if o.need("when", `give a Cedar expression over context, or "true"`) {
		if rule.When = o.text("when", maxPredicate); rule.When != "" {
			p, err := eval.CompilePredicate(rule.When)
			if err != nil {
				why, do := "it is no predicate over facts", "write a Cedar expression over context"
				if e := refusal.As(err); e != nil {
					why, do = e.Why, e.Do
				}
				o.bad("when", why, do)
			}
			rule.predicate = p
		}
	}
	if o.need("id", "give the path of the SPIFFE ID, like /service/{workload.service}") {
		if rule.ID = o.text("id", maxTemplate); rule.ID != "" {
			template, code, why, do := parseTemplate(rule.ID)
			if code != "" {
				r.fail(o.fields["id"], code, o.at("id"), why, do)
			}
			rule.template = template
		}
	}
	d.rules = append(d.rules, rule)
}

// parseTemplate reads a path template; code is "" if it is well-formed.
func parseTemplate(s string) (template []segment, code, why, do string) {
	const form = "write it like /service/{workload.service}"
	if !strings.HasPrefix(s, "/") {
		return nil, CodeValue, "it does not begin with a slash", form
	}
	for part := range strings.SplitSeq(s[1:], "/") {
		prefix, rest, found := strings.Cut(part, "{")
		fact, suffix, closed := strings.Cut(rest, "}")
		switch {
		case strings.ContainsAny(prefix, "}") || found && !closed || strings.ContainsAny(fact, "{"):
			return nil, CodeValue, "a brace is not closed or not opened", form
		case strings.ContainsAny(suffix, "{}"):
			return nil, CodeValue, "a segment has two placeholders, so that two workloads could get one identity", "put a slash between them"
		case part == "" || !found && (part == "." || part == "..") || !isSegmentText(prefix+suffix):
			return nil, CodeValue, "a segment is empty, relative or has a character that SPIFFE does not allow", "use letters, digits, dots, hyphens and underscores"
		}
		if found {
			if why := badPlaceholder(fact); why != "" {
				return nil, CodeValue, "{" + keyName(fact) + "}: " + why, "name a fact that can be a segment: " + strings.Join(goodPlaceholders(), ", ") + ", label.KEY"
			}
		}
		template = append(template, segment{prefix: prefix, fact: fact, suffix: suffix})
	}
	if first := template[0]; first.fact == "" && slices.Contains(reservedPaths, first.prefix) {
		return nil, CodeReserved, "/" + first.prefix + "/… names Redoubt's own agents and servers", "begin with another segment, like /service/…"
	}
	return template, "", "", ""
}

func badPlaceholder(fact string) string {
	why, known := placeholders[fact]
	for _, prefix := range []string{identity.FactLabelPrefix, identity.FactImgLabPrefix} {
		if key, ok := strings.CutPrefix(fact, prefix); ok && len(key) <= maxLabelKey && plainName.MatchString(key) {
			known = true
		}
	}
	switch {
	case !known:
		return "there is no such fact"
	case why != "":
		return "it cannot be a segment of a path: " + why
	}
	return ""
}

func goodPlaceholders() []string {
	var out []string
	for fact, why := range placeholders {
		if why == "" {
			out = append(out, fact)
		}
	}
	slices.Sort(out)
	return out
}

// isSegmentText reports whether s has only characters of a SPIFFE path segment. Source: SPIFFE-ID, section 2.2.
func isSegmentText(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// fill returns the path for these facts, or why there is none.
func (r *IssuanceRule) fill(facts identity.FactSet) (path, why string) {
	var b strings.Builder
	for _, s := range r.template {
		b.WriteString("/" + s.prefix)
		if s.fact != "" {
			value, why := segmentValue(facts, s.fact)
			if why != "" {
				return "", why
			}
			b.WriteString(value)
		}
		b.WriteString(s.suffix)
	}
	return b.String(), ""
}

func segmentValue(facts identity.FactSet, name string) (value, why string) {
	f, ok := facts.Get(name)
	if !ok {
		return "", "the fact " + name + " is absent"
	}
	switch v := f.Value.(type) {
	case string:
		value = v
	case int64:
		value = fmt.Sprint(v)
	default:
		return "", "the fact " + name + " is no text and no number"
	}
	switch {
	case value == "":
		return "", "the fact " + name + " is empty"
	case value == "." || value == "..":
		return "", "the fact " + name + " is a relative segment"
	case !isSegmentText(value):
		return "", "the fact " + name + " has a character that SPIFFE does not allow in a segment"
	}
	return value, ""
}
