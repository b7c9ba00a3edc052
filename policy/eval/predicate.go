package eval

import (
	"bytes"
	"fmt"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	cedareval "github.com/cedar-policy/cedar-go/x/exp/eval"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// maxPredicateBytes bounds the text of a predicate.
const maxPredicateBytes = 8 << 10

// The codes of refusals of predicates.
const (
	codePredicate = "malformed-predicate"
	codeUnmatched = "predicate-failed"
)

// Predicate is one boolean Cedar expression over `context`: a condition over facts.
//
// Concurrency: immutable; safe. Zero value: not useful; use [CompilePredicate].
type Predicate struct {
	text string
	body ast.IsNode
	keep filter // the keys of context that it mentions
}

// CompilePredicate compiles an expression like
//
//	context.service == "orders" && context has container
//
// It may speak of context, literals and Cedar's operators and functions, and of no principal, action, resource or entity.
// An access to a fact that may be absent is not refused (facts have no fixed names), but fails when it is; guard it with
// `has`.
//
// Errors: a refusal with code malformed-predicate. Trust: expr is hostile; it can be nothing but one expression.
func CompilePredicate(expr string) (*Predicate, error) {
	refuse := func(why string) (*Predicate, error) {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: codePredicate, What: "predicate " + quote(expr), Why: why,
			Do: "write one Cedar expression over context that is true or false, like context.service == \"orders\"",
		}
	}
	if len(expr) > maxPredicateBytes {
		return refuse(fmt.Sprintf("it is longer than %d bytes", maxPredicateBytes))
	}
	body, why := oneExpression(expr)
	if why != "" {
		return refuse(why)
	}
	if d := depth(body, maxExprDepth); d > maxExprDepth {
		return refuse(fmt.Sprintf("it is nested deeper than %d", maxExprDepth))
	}
	if why := onlyContext(body); why != "" {
		return refuse(why)
	}
	if !canBeBool(body) {
		return refuse("it is not true or false")
	}
	// What is kept must mean what was read: rendered and read again, it is the same expression.
	again, why := oneExpression(render(body))
	if why != "" || !ast.Equal(ast.NewNode(body), ast.NewNode(again)) {
		return refuse("it does not survive being written out and read again")
	}
	said := newMentions()
	said.read(body)
	p := &Predicate{text: expr, body: body, keep: said.attr}
	if said.wholeContext {
		p.keep = everything
	}
	return p, nil
}

// String returns the text that it was compiled from.
func (p *Predicate) String() string { return p.text }

// Match evaluates the predicate over facts, as [FactsRecord] makes them.
//
// Errors: a refusal with code predicate-failed where it speaks of a fact that is absent or of another type, or
// malformed-request for a record that is no record of a policy. A caller takes an error for "does not match", and shows it.
func (p *Predicate) Match(facts policy.Record) (bool, error) {
	var c converter
	context, f := c.record(facts, nil, 0, p.keep)
	if f != nil {
		return false, f.under("context").refusal()
	}
	nobody := types.EntityUID{}
	v, err := cedareval.Eval(p.body, cedareval.Env{
		Entities: types.EntityMap{}, Principal: nobody, Action: nobody, Resource: nobody, Context: context,
	})
	if err == nil {
		if b, ok := v.(types.Boolean); ok {
			return bool(b), nil
		}
		err = fmt.Errorf("it is %s, not true or false", cedareval.TypeName(v))
	}
	return false, &refusal.Error{
		Kind: refusal.Invalid, Code: codeUnmatched, What: "predicate " + quote(p.text), Why: quote(err.Error()),
		Do: "guard what may be absent: `context has container && context.container has image && …`",
	}
}

// oneExpression parses an expression in the only place a policy has for it, and makes sure that nothing but it is there.
func oneExpression(expr string) (ast.IsNode, string) {
	text := []byte("permit(principal, action, resource) when {\n" + expr + "\n};")
	var spans []span
	split(text, func(s span) bool {
		spans = append(spans, s)
		return len(spans) < 2
	})
	if len(spans) != 1 || !bytes.Equal(spans[0].text, text) {
		return nil, "it is more than one expression"
	}
	if spans[0].code != "" {
		return nil, spans[0].why
	}
	p, err := parse(spans[0])
	if err != nil {
		return nil, located("expression", span{line: 0, column: 1}, err)
	}
	a := (*ast.Policy)(p.AST())
	if a.Effect != ast.EffectPermit || len(a.Annotations) > 0 || len(scopeNames(a)) > 0 || !allScope(a) ||
		len(a.Conditions) != 1 || a.Conditions[0].Condition != ast.ConditionWhen {
		return nil, "it is more than one expression"
	}
	return a.Conditions[0].Body, ""
}

func allScope(p *ast.Policy) bool {
	_, principal := p.Principal.(ast.ScopeTypeAll)
	_, action := p.Action.(ast.ScopeTypeAll)
	_, resource := p.Resource.(ast.ScopeTypeAll)
	return principal && action && resource
}

// onlyContext says what a predicate speaks of that it must not.
func onlyContext(n ast.IsNode) (why string) {
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		switch n := n.(type) {
		case ast.NodeTypeVariable:
			if n.Name != "context" {
				why = "it speaks of " + string(n.Name)
			}
		case ast.NodeValue:
			if _, ok := n.Value.(types.EntityUID); ok {
				why = "it speaks of the entity " + quote(n.Value.String()) + "; facts are plain values"
			}
		case ast.NodeTypeIn, ast.NodeTypeIs, ast.NodeTypeIsIn, ast.NodeTypeHasTag, ast.NodeTypeGetTag:
			why = "it uses in, is, hasTag or getTag, which are for entities; facts are plain values"
		}
		return why == ""
	})
	return why
}

// boolCalls are the extension functions that return a bool.
var boolCalls = map[types.Path]bool{
	"isIpv4": true, "isIpv6": true, "isLoopback": true, "isMulticast": true, "isInRange": true,
	"lessThan": true, "lessThanOrEqual": true, "greaterThan": true, "greaterThanOrEqual": true,
}

// canBeBool reports whether an expression can be a bool; an access to a fact can.
func canBeBool(n ast.IsNode) bool {
	switch n := n.(type) {
	case ast.NodeTypeAnd:
		return canBeBool(n.Left) && canBeBool(n.Right)
	case ast.NodeTypeOr:
		return canBeBool(n.Left) && canBeBool(n.Right)
	case ast.NodeTypeNot:
		return canBeBool(n.Arg)
	case ast.NodeTypeIfThenElse:
		return canBeBool(n.If) && canBeBool(n.Then) && canBeBool(n.Else)
	case ast.NodeValue:
		_, ok := n.Value.(types.Boolean)
		return ok
	case ast.NodeTypeExtensionCall:
		return boolCalls[n.Name]
	case ast.NodeTypeEquals, ast.NodeTypeNotEquals, ast.NodeTypeLessThan, ast.NodeTypeLessThanOrEqual,
		ast.NodeTypeGreaterThan, ast.NodeTypeGreaterThanOrEqual, ast.NodeTypeHas, ast.NodeTypeLike,
		ast.NodeTypeContains, ast.NodeTypeContainsAll, ast.NodeTypeContainsAny, ast.NodeTypeIsEmpty, ast.NodeTypeAccess:
		return true
	default:
		return false
	}
}
