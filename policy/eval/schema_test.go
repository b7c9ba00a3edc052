package eval_test

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"

	"github.com/redoubtsec/redoubt/policy/eval"
)

func TestTheSchemaHasEveryWordOfThePlan(t *testing.T) {
	t.Parallel()
	var s schema.Schema
	if err := s.UnmarshalCedar(eval.Schema()); err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve()
	if err != nil {
		t.Fatal(err)
	}
	actions := 0
	for namespace, names := range map[string]string{
		"Run":    "exec read write setuid mount trace load mapexec",
		"Net":    "connect listen resolve",
		"Api":    "call",
		"Access": "login use open assume issue administer",
	} {
		for name := range strings.FieldsSeq(names) {
			actions++
			a, ok := r.Actions[types.NewEntityUID(types.EntityType(namespace+"::Action"), types.String(name))]
			if !ok || a.AppliesTo == nil || len(a.AppliesTo.Principals) == 0 || len(a.AppliesTo.Resources) == 0 {
				t.Errorf("no %s::%s, or it applies to nothing", namespace, name)
			}
		}
	}
	if len(r.Actions) != actions {
		t.Errorf("%d actions, want %d", len(r.Actions), actions)
	}
	entities := strings.Fields("User Robot Machine Workload Image Layer Service Api Operation Address File Secret Role Group Session")
	for _, name := range entities {
		if _, ok := r.Entities[types.EntityType(name)]; !ok {
			t.Errorf("no entity %s", name)
		}
	}
	if len(r.Entities) != len(entities) {
		t.Errorf("%d entity types, want %d", len(r.Entities), len(entities))
	}
	for name, e := range r.Entities {
		if tagged := e.Tags != nil; tagged != slices.Contains([]types.EntityType{"Workload", "Machine"}, name) {
			t.Errorf("%s: tags %v", name, tagged)
		}
		for attr, a := range e.Shape { // what may be absent must be guarded, so that a forbid cannot fail for want of a fact
			if !a.Optional {
				t.Errorf("%s.%s is required", name, attr)
			}
		}
	}
}

func TestEveryDeclarationOfTheSchemaHasAComment(t *testing.T) {
	t.Parallel()
	lines := strings.Split(string(eval.Schema()), "\n")
	declares := regexp.MustCompile(`^\s*(entity|action|type) `)
	for i, l := range lines {
		if declares.MatchString(l) && !strings.Contains(lines[i-1], "//") && !strings.HasPrefix(strings.TrimSpace(l), "type") {
			t.Errorf("line %d has no comment before it: %s", i+1, l)
		}
	}
}

func TestSchemaReturnsACopy(t *testing.T) {
	t.Parallel()
	eval.Schema()[0] = 'X'
	if bytes.HasPrefix(eval.Schema(), []byte("X")) {
		t.Error("a caller changed the published schema")
	}
}

// The policies that a user would write first, one a layer.
func TestFirstPoliciesOfEachLayerAreValid(t *testing.T) {
	t.Parallel()
	for i, text := range []string{
		`permit(principal in Service::"orders", action == Run::Action::"exec", resource in File::"/usr/lib/orders");`,
		`forbid(principal is Workload, action in [Run::Action::"load", Run::Action::"mount", Run::Action::"trace"], resource);`,
		`forbid(principal in Layer::"sha256:1", action == Run::Action::"mapexec", resource);`,
		`permit(principal in Service::"shop", action == Net::Action::"connect", resource == Service::"orders");`,
		`permit(principal is Workload, action == Net::Action::"connect", resource is Service)
when { principal.hasTag("env") && principal.getTag("env") == "prod" };`,
		`permit(principal is Workload, action == Net::Action::"resolve", resource) when { context has name && context.name like "*.example.org" };`,
		`permit(principal is Workload, action == Api::Action::"call", resource in Api::"orders")
when { context has user && context.user has scopes && context.user.scopes.contains("orders:read") };`,
		`permit(principal == User::"operator", action == Access::Action::"administer", resource);`,
		`permit(principal in Group::"auditors", action == Access::Action::"administer", resource)
when { resource has method && resource.method == "GET" && resource has section && resource.section != "secret" };`,
		`permit(principal in Group::"ops", action == Access::Action::"administer", resource in Operation::"policy-set");`,
		`permit(principal in Role::"dba", action == Access::Action::"open", resource == Service::"payments-db")
when { principal is Session && principal has expires && context has now && context.now < principal.expires };`,
		`permit(principal is Machine, action == Access::Action::"issue", resource is Workload) when { resource in principal };`,
		`forbid(principal, action, resource) when { principal is Workload && principal has quarantined && principal.quarantined };`,
		`forbid(principal is Workload, action, resource) unless { principal has privileged && !principal.privileged };`,
	} {
		if _, err := eval.Compile([]eval.File{file(fmt.Sprintf("%d.cedar", i), text)}); err != nil {
			t.Errorf("%s\n%v", text, err)
		}
	}
}
