package eval

import (
	"strings"

	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// check validates a policy against the schema, strictly (as Cedar's validator does: every access to an optional
// attribute is guarded, every operand has its type, the scope can match some action).
func (m *model) check(p *ast.Policy, what string, ps *problems) {
	seen := map[string]bool{}
	for _, why := range m.faults(p) {
		if !seen[why] {
			seen[why] = true
			ps.refuse(codeInvalid, what, quote(why), advice(why))
		}
	}
}

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
	if joined, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // takes a joined error apart
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
