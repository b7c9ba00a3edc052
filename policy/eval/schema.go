package eval

import (
	"bytes"
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

//go:embed schema/redoubt.cedarschema
var schemaText []byte

// Schema returns the published Cedar schema: every entity type, action and context key that a policy may speak of, with
// comments. The caller owns the copy.
func Schema() []byte { return bytes.Clone(schemaText) }

// model is a resolved schema in the forms the engine asks it in. Immutable.
type model struct {
	schema    *resolved.Schema
	validator *validate.Validator
	shapes    map[types.EntityType]*shape // of the attributes of an entity type
	contexts  map[types.EntityUID]*shape  // of the context of an action
}

// shape is the type of a record; a nil shape is that of any record.
type shape struct {
	attrs    resolved.RecordType
	required []types.String
}

func newShape(attrs resolved.RecordType) *shape {
	s := &shape{attrs: attrs}
	for name, a := range attrs {
		if !a.Optional {
			s.required = append(s.required, name)
		}
	}
	slices.Sort(s.required)
	return s
}

// published is the model of [Schema]. The text is embedded and a test resolves it, so that failing here is a defect of
// the build.
var published = sync.OnceValues(func() (*model, error) { return newModel("redoubt.cedarschema", schemaText) })

func newModel(name string, text []byte) (*model, error) {
	var s schema.Schema
	s.SetFilename(name)
	if err := s.UnmarshalCedar(text); err != nil {
		return nil, fmt.Errorf("parse schema: %w", err)
	}
	r, err := s.Resolve()
	if err != nil {
		return nil, fmt.Errorf("resolve schema: %w", err)
	}
	m := &model{
		schema: r, validator: validate.New(r),
		shapes: map[types.EntityType]*shape{}, contexts: map[types.EntityUID]*shape{},
	}
	for name, e := range r.Entities {
		m.shapes[name] = newShape(e.Shape)
	}
	for uid, a := range r.Actions {
		if a.AppliesTo != nil {
			m.contexts[uid] = newShape(a.AppliesTo.Context)
		}
	}
	return m, nil
}

// action returns the entity of an action of the schema, with its parents.
func (m *model) action(uid types.EntityUID) (types.Entity, bool) {
	if m == nil {
		return types.Entity{}, false
	}
	a, ok := m.schema.Actions[uid]
	return a.Entity, ok
}

// check validates a policy against the schema, strictly (as Cedar's validator does: every access to an optional
// attribute is guarded, every operand has its type, the scope can match some action).
func (m *model) check(p *ast.Policy, what string, ps *problems) {
	faults := m.faults(p)
	slices.Sort(faults) // the validator's order is random
	faults = slices.Compact(faults)
	for i, why := range faults {
		if left := len(faults) - i; i == maxFindings-1 && left > 1 {
			ps.refuse(codeInvalid, what, fmt.Sprintf("%s (and %d more findings)", quote(why), left-1), advice(why))
			return
		}
		ps.refuse(codeInvalid, what, quote(why), advice(why))
	}
}

// maxFindings bounds how many findings about one policy are listed: a wrong attribute gives one for each type that the
// scope allows.
const maxFindings = 4

// faults returns what the validator finds. It never panics: a failure of the validator refuses the policy.
func (m *model) faults(p *ast.Policy) (why []string) {
	defer func() {
		if r := recover(); r != nil {
			why = []string{"the validator failed on this policy"}
		}
	}()
	return messages(m.validator.Policy("", p))
}

// messages flattens joined errors.
func messages(err error) []string {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var out []string
		for _, e := range joined.Unwrap() {
			out = append(out, messages(e)...)
		}
		return out
	}
	return []string{err.Error()}
}

// advice says what to do about a finding of the validator.
func advice(why string) string {
	switch {
	case strings.Contains(why, "unrecognized action"), strings.Contains(why, "unrecognized entity type"):
		return "use a name of the published schema, as in Net::Action::\"connect\" or Service::\"orders\""
	case strings.Contains(why, "unable to guarantee safety of access to optional"):
		return "guard it: `x has attribute && x.attribute …`"
	case strings.Contains(why, "unable to guarantee safety of access to tag"):
		return "guard it: `x.hasTag(\"key\") && x.getTag(\"key\") …`"
	case strings.Contains(why, "applicable action"):
		return "name a principal and a resource that the schema allows for the action"
	case strings.Contains(why, "not found"):
		return "use an attribute of the published schema; labels are tags"
	default:
		return "correct the policy by the published schema"
	}
}

// depth returns how deep the tree of an expression is; it stops counting above limit.
func depth(n ast.IsNode, limit int) int {
	if n == nil || limit < 0 {
		return 1
	}
	deepest, root := 0, true
	ast.Inspect(ast.NewNode(n), func(child ast.IsNode) bool {
		if root {
			root = false
			return true
		}
		deepest = max(deepest, depth(child, limit-1))
		return false
	})
	return deepest + 1
}
