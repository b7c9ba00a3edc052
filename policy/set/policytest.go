package set

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
)

// MaxTests bounds the tests of one run.
const MaxTests = 10_000

// IsTestFile reports whether a file holds tests of a set and is no part of one: its name ends in _test.yaml or _test.yml.
func IsTestFile(name string) bool {
	return strings.HasSuffix(name, "_test.yaml") || strings.HasSuffix(name, "_test.yml")
}

// TestResult is the outcome of one policy test.
type TestResult struct {
	File   string         `json:"file"`
	Line   int            `json:"line"`
	Name   string         `json:"name"`
	Passed bool           `json:"passed"`
	Expect policy.Verdict `json:"expect"`
	Got    policy.Verdict `json:"got"`
	// Why is one sentence: what differed, or the explanation's summary.
	Why      string           `json:"why"`
	Decision *policy.Decision `json:"decision,omitempty"`
}

// RunTests runs the tests in files against the set, in order of file and place.
//
//	tests:
//	  - name: orders reaches stock
//	    facts: {workload.service: orders, machine.id: m1, label.stage: live}  # the principal, by issuance; or request.principal
//	    identity: /service/orders          # optional: the path that the facts must earn
//	    request:
//	      action: Net::connect             # or Net::Action::"connect"
//	      resource: Service::"stock"
//	      context: {port: 8080, source: {__extn: {fn: ip, arg: 10.0.0.1}}}
//	      entities: [{uid: 'Service::"stock"', parents: ['Group::"backend"'], attrs: {}, tags: {}}]
//	      machine: m1                      # where it is decided; default "test"
//	    expect: permit                     # or deny; modes do not count
//	    policy: orders-to-stock            # optional: must be among the deciding policies
//
// Values beyond YAML's are written as in Cedar's JSON: {__entity: {type: User, id: ann}} and {__extn: {fn: ip, arg: …}},
// with ip and datetime.
//
// Errors: [Problems] of the test files, all at once; then nothing was run. A test that fails is no error.
func RunTests(ctx context.Context, s *Set, files []File) ([]TestResult, error) {
	found := &findings{}
	var tests []policyTest
	total := 0
	for i, f := range files {
		total += len(f.Content)
		why, _ := badFileName(f.Name)
		switch {
		case why != "":
			fileProblem(found, "", CodeFile, fmt.Sprintf("test file %d: %s", i+1, why), "rename it")
		case len(f.Content) > MaxFileBytes || total > MaxBytes:
			fileProblem(found, f.Name, CodeBounds, fmt.Sprintf("it is larger than %d bytes, or all are than %d", MaxFileBytes, MaxBytes), "split it")
		case !utf8.ValidString(f.Content):
			fileProblem(found, f.Name, CodeFile, "it is not UTF-8", "save it as UTF-8")
		default:
			for _, c := range chunks(f.Content) {
				tests = append(tests, readTests(f.Name, c, found)...)
			}
		}
		if len(tests) > MaxTests {
			fileProblem(found, f.Name, CodeBounds, fmt.Sprintf("there are more than %d tests", MaxTests), "leave some out")
			break
		}
	}
	if err := found.problems(); err != nil {
		return nil, err
	}
	results := make([]TestResult, 0, len(tests))
	for i := range tests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		results = append(results, tests[i].run(ctx, s))
	}
	return results, nil
}

type policyTest struct {
	file, name string
	line       int
	trust      identity.TrustDomain
	facts      identity.FactSet
	byFacts    bool
	identity   string
	request    policy.Request
	machine    string
	expect     policy.Verdict
	policy     string
}

func (t *policyTest) run(ctx context.Context, s *Set) TestResult {
	out := TestResult{File: t.file, Line: t.line, Name: t.name, Expect: t.expect}
	r := t.request
	if t.byFacts {
		id, _, err := s.Issue(t.trust, t.facts)
		switch {
		case t.identity != "" && err != nil:
			out.Why = "expected the identity " + t.identity + ": " + err.Error()
			return out
		case t.identity != "" && id.Path() != t.identity:
			out.Why = "expected the identity " + t.identity + ", got " + id.Path()
			return out
		}
		r.Principal = eval.WorkloadEntity(id, t.facts)
		r.Facts = t.facts
	}
	d := s.Decide(ctx, &r, DecideOptions{Machine: t.machine})
	out.Decision, out.Got, out.Why = d, d.Verdict, d.Explanation.Summary
	out.Passed = d.Verdict == t.expect
	if !out.Passed {
		out.Why = "expected " + string(t.expect) + ", got " + string(d.Verdict) + ": " + d.Explanation.Summary
		return out
	}
	if t.policy == "" {
		return out
	}
	for _, ref := range d.Explanation.Deciding {
		if ref.ID == t.policy {
			return out
		}
	}
	out.Passed, out.Why = false, "the verdict is as expected, but "+t.policy+" did not decide it: "+d.Explanation.Summary
	return out
}

func readTests(file string, c chunk, found *findings) []policyTest {
	r := &reader{place: place{file: file}, found: found, offset: c.line - 1}
	root := r.parse(c.text)
	if root == nil {
		return nil
	}
	o := r.object(root, "", "tests", "trust_domain")
	if o == nil || !o.need("tests", "list the tests") {
		return nil
	}
	trust := identity.TrustDomain("example.org")
	if name := o.text("trust_domain", maxHostName); name != "" {
		td, err := identity.ParseTrustDomain(name)
		if err != nil {
			o.bad("trust_domain", "it is no trust domain", "use lower-case letters, digits, dots, hyphens and underscores")
		}
		trust = td
	}
	var out []policyTest
	for i, n := range o.list("tests", MaxTests) {
		if t, ok := r.test(n, o.at("tests")+"["+strconv.Itoa(i)+"]"); ok {
			t.trust = trust
			out = append(out, t)
		}
	}
	return out
}

func (r *reader) test(n *yaml.Node, path string) (policyTest, bool) {
	o := r.object(n, path, "name", "facts", "identity", "request", "expect", "policy")
	if o == nil {
		return policyTest{}, false
	}
	o.need("name", "say what it tests")
	o.need("expect", "give permit or deny")
	t := policyTest{
		file: r.file, line: r.offset + n.Line, name: o.text("name", maxFreeText), identity: o.text("identity", maxTemplate),
		expect: policy.Verdict(o.choice("expect", string(policy.Permit), string(policy.Deny))), policy: o.text("policy", maxFreeText), machine: "test",
	}
	if f := o.fields["facts"]; f != nil {
		t.byFacts, t.facts = true, r.facts(f, o.at("facts"))
	} else if t.identity != "" {
		o.bad("identity", "there are no facts to earn it", "give facts")
	}
	if !o.need("request", "say what is asked") {
		return t, false
	}
	q := r.object(o.fields["request"], o.at("request"), "principal", "action", "resource", "context", "entities", "machine")
	if q == nil {
		return t, false
	}
	if m := q.text("machine", maxName); m != "" {
		t.machine = m
	}
	q.need("action", `give the action, like Net::connect`)
	q.need("resource", `give the resource, like Service::"stock"`)
	if t.byFacts == q.has("principal") {
		q.bad("principal", "the principal comes either from facts or from request.principal", "give exactly one of them")
	}
	t.request.Action = q.uid("action")
	entities := map[policy.UID]policy.Entity{}
	for i, e := range q.list("entities", maxAncestry) {
		entity, ok := r.entity(e, q.at("entities")+"["+strconv.Itoa(i)+"]")
		if _, twice := entities[entity.UID]; ok && twice {
			r.fail(e, CodeDuplicate, q.at("entities"), "the entity is there twice", "leave one of them out")
		}
		if ok {
			entities[entity.UID] = entity
			t.request.Others = append(t.request.Others, entity)
		}
	}
	named := func(key string) policy.Entity {
		uid := q.uid(key)
		if e, ok := entities[uid]; ok {
			return e
		}
		return policy.Entity{UID: uid}
	}
	t.request.Principal, t.request.Resource = named("principal"), named("resource")
	if c := q.fields["context"]; c != nil {
		t.request.Context = r.record(c, q.at("context"))
	}
	return t, true
}

func (r *reader) facts(n *yaml.Node, path string) identity.FactSet {
	o := r.mapping(n, path)
	if o == nil {
		return identity.FactSet{}
	}
	var facts []identity.Fact
	for _, key := range o.keys() {
		facts = append(facts, identity.Fact{Name: key, Value: r.plain(o.fields[key], o.at(keyName(key))), Source: identity.FromOperator})
	}
	set, err := identity.NewFactSet(facts...)
	if err != nil {
		r.fail(n, CodeValue, path, "a fact's name or value is of a wrong shape", "give text, a whole number, true, false or a list of texts")
	}
	return set
}

func (r *reader) entity(n *yaml.Node, path string) (policy.Entity, bool) {
	o := r.object(n, path, "uid", "parents", "attrs", "tags")
	if o == nil || !o.need("uid", `give the entity, like Service::"stock"`) {
		return policy.Entity{}, false
	}
	e := policy.Entity{UID: o.uid("uid")}
	o.texts("parents", maxAncestry, maxFreeText, `write it like Service::"stock"`, func(s string) string {
		uid, ok := parseUID(s)
		if !ok {
			return "it is no entity"
		}
		e.Parents = append(e.Parents, uid)
		return ""
	})
	if a := o.fields["attrs"]; a != nil {
		e.Attrs = r.record(a, o.at("attrs"))
	}
	if tags := o.fields["tags"]; tags != nil {
		if t := r.mapping(tags, o.at("tags")); t != nil {
			e.Tags = map[string]string{}
			for _, key := range t.keys() {
				e.Tags[key] = t.text(key, maxFreeText)
			}
		}
	}
	return e, !e.UID.IsZero()
}

var (
	uidForm    = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_]*(?:::[A-Za-z_][A-Za-z0-9_]*)*)::("(?:[^"\\]|\\.)*")$`)
	actionForm = regexp.MustCompile(`^([A-Z][A-Za-z0-9_]*)::([a-z][A-Za-z0-9_]*)$`)
)

// parseUID reads Cedar's form of an entity, or Net::connect for Net::Action::"connect".
func parseUID(s string) (policy.UID, bool) {
	if m := actionForm.FindStringSubmatch(s); m != nil {
		return policy.Action(m[1], m[2]), true
	}
	m := uidForm.FindStringSubmatch(s)
	if m == nil {
		return policy.UID{}, false
	}
	id, err := strconv.Unquote(m[2])
	return policy.UID{Type: m[1], ID: id}, err == nil
}

func (o *object) uid(key string) policy.UID {
	s := o.text(key, maxFreeText)
	if s == "" {
		return policy.UID{}
	}
	uid, ok := parseUID(s)
	if !ok {
		o.bad(key, "it is no entity", `write it like Service::"stock", in quotes of its own: 'Service::"stock"'`)
	}
	return uid
}

func (r *reader) record(n *yaml.Node, path string) policy.Record {
	o := r.mapping(n, path)
	if o == nil {
		return nil
	}
	out := policy.Record{}
	for _, key := range o.keys() {
		out[key] = r.value(o.fields[key], o.at(keyName(key)))
	}
	return out
}

// value reads one value of a context or an attribute.
func (r *reader) value(n *yaml.Node, path string) any {
	switch n.Kind {
	case yaml.SequenceNode:
		out := make([]any, len(n.Content))
		for i, c := range n.Content {
			out[i] = r.value(c, path+"["+strconv.Itoa(i)+"]")
		}
		return out
	case yaml.MappingNode:
		if len(n.Content) == 2 {
			switch inner := n.Content[1]; n.Content[0].Value {
			case "__entity":
				return r.entityValue(inner, path)
			case "__extn":
				return r.extension(inner, path)
			}
		}
		return r.record(n, path)
	default:
		v := r.scalar(n, path)
		switch f, ok := v.(float64); {
		case v == nil:
			r.fail(n, CodeType, path, "it is empty", "leave the key out")
		case ok && (f != math.Trunc(f)):
			r.fail(n, CodeType, path, "it is no whole number", "give a whole number")
		}
		return v
	}
}

func (r *reader) entityValue(n *yaml.Node, path string) any {
	o := r.object(n, path+".__entity", "type", "id")
	if o == nil {
		return nil
	}
	o.need("type", "give the entity's type")
	o.need("id", "give the entity's id")
	return policy.UID{Type: o.text("type", maxName), ID: o.text("id", maxFreeText)}
}

func (r *reader) extension(n *yaml.Node, path string) any {
	o := r.object(n, path+".__extn", "fn", "arg")
	if o == nil || !o.need("fn", "give ip or datetime") || !o.need("arg", "give the value") {
		return nil
	}
	arg := o.text("arg", maxName)
	switch o.choice("fn", "ip", "datetime") {
	case "ip":
		if a, err := netip.ParseAddr(arg); err == nil {
			return a
		}
		if p, err := netip.ParsePrefix(arg); err == nil {
			return p
		}
		o.bad("arg", "it is no address and no range", "write it like 10.0.0.1 or 10.0.0.0/8")
	case "datetime":
		if t, err := time.Parse(time.RFC3339, arg); err == nil {
			return t
		}
		o.bad("arg", "it is no time", "write it like 2026-01-02T15:04:05Z")
	}
	return nil
}
