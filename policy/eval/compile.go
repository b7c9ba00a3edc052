package eval

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"

	"github.com/redoubtsec/redoubt/policy"
)

// The bounds of what [Compile] takes.
const (
	maxFiles      = 1_000
	maxFileBytes  = 4 << 20
	maxTotalBytes = 32 << 20
	maxPolicies   = 20_000
	maxIDBytes    = 128
	maxExprDepth  = 512 // of the tree of one condition: a chain of && or || counts one a link
)

// File is one file of policies. Name is what refusals and [policy.Ref] call it by; it is never opened.
type File struct {
	Name string
	Text []byte
}

// compiled is one policy, ready to be asked.
type compiled struct {
	ref    policy.Ref
	id     cedar.PolicyID
	policy *cedar.Policy
	ast    *ast.Policy
}

// Engine decides by one set of policies.
//
// Concurrency: immutable; safe for any number of goroutines. Zero value: not useful; use [Compile].
type Engine struct {
	policies []compiled // in order of file and place
	byID     map[cedar.PolicyID]int
	index    index
	named    map[types.EntityUID][]policy.Ref
	mentions mentions
	model    *model // nil: requests are not checked against a schema
}

// Compile parses and validates files against the published schema. A policy is named by its @id annotation, else by its
// file and place in it, counted from one ("shop.cedar#2"); names are unique across files.
//
// Errors: a [Problems] with every defect of every file. Trust: the text is hostile; see the bounds.
func Compile(files []File) (*Engine, error) {
	m, err := published()
	if err != nil {
		return nil, err
	}
	return compile(files, m, true, fileName)
}

// naming names the nth policy (from zero) of the file, and of the set.
type naming func(file string, inFile, inSet int) string

func fileName(file string, inFile, _ int) string { return file + "#" + strconv.Itoa(inFile+1) }

func compile(files []File, m *model, validate bool, name naming) (*Engine, error) {
	var ps problems
	e := &Engine{byID: map[cedar.PolicyID]int{}, named: map[types.EntityUID][]policy.Ref{}, mentions: newMentions(), model: m}
	total, policies, names := 0, 0, map[string]bool{}
	if len(files) > maxFiles {
		ps.refuse(codeTooMany, "policies", fmt.Sprintf("there are more than %d files", maxFiles), "join some of them")
		return nil, ps.err()
	}
	for _, f := range files {
		total += len(f.Text)
		switch what := "policy file " + quote(f.Name); {
		case f.Name == "" || len(f.Name) > maxQuoted || strings.ContainsFunc(f.Name, unicode.IsControl):
			ps.refuse(codeBadFile, what, fmt.Sprintf("its name is empty, longer than %d bytes or has control characters", maxQuoted), "rename it")
		case names[f.Name]:
			ps.refuse(codeBadFile, what, "another file has the same name", "rename one of them")
		case len(f.Text) > maxFileBytes:
			ps.refuse(codeTooLarge, what, fmt.Sprintf("it is larger than %d bytes", maxFileBytes), "split it")
		case total > maxTotalBytes:
			ps.refuse(codeTooLarge, what, fmt.Sprintf("the files are larger than %d bytes together", maxTotalBytes), "leave some out")
		default:
			split(f.Text, func(span) bool { policies++; return policies <= maxPolicies }) // before any is parsed
			if policies > maxPolicies {
				ps.refuse(codeTooMany, what, fmt.Sprintf("there are more than %d policies", maxPolicies), "leave some out")
				return nil, ps.err()
			}
			e.addFile(f, validate, name, &ps)
		}
		names[f.Name] = true
	}
	if err := ps.err(); err != nil {
		return nil, err
	}
	e.index = newIndex(e.policies)
	return e, nil
}

func (e *Engine) addFile(f File, validate bool, name naming, ps *problems) {
	n := 0
	split(f.Text, func(s span) bool {
		inFile := n
		n++
		fallback := name(f.Name, inFile, len(e.policies))
		what := "policy " + fallback + " in " + f.Name
		if s.code != "" {
			ps.refuse(s.code, what+place(s), s.why, "split it into several policies, or compare with a set by contains")
			return true
		}
		p, err := parse(s)
		if err != nil {
			ps.refuse(codeSyntax, what, located(f.Name, s, err), "correct the Cedar text there")
			return true
		}
		id, fault := identify(p, fallback)
		what = "policy " + id + " in " + f.Name + place(s)
		if fault != "" {
			ps.refuse(codeBadID, what, fault, "give it an @id of its own, or none")
			return true
		}
		if prior, dup := e.byID[cedar.PolicyID(id)]; dup {
			ps.refuse(codeDuplicate, what, "a policy in "+e.policies[prior].ref.File+" has the same name", "give each policy an @id of its own")
			return true
		}
		c := compiled{ref: policy.Ref{ID: id, File: f.Name, Effect: policy.EffectPermit}, id: cedar.PolicyID(id), policy: p, ast: (*ast.Policy)(p.AST())}
		if c.ast.Effect == ast.EffectForbid {
			c.ref.Effect = policy.EffectForbid
		}
		for _, cond := range c.ast.Conditions {
			if depth(cond.Body, maxExprDepth) > maxExprDepth {
				ps.refuse(codeTooDeep, what, fmt.Sprintf("a condition is nested deeper than %d", maxExprDepth), "compare with a set by contains, or split the policy")
				return true
			}
		}
		if validate {
			e.model.check(c.ast, what, ps)
		}
		for _, cond := range c.ast.Conditions {
			e.mentions.read(cond.Body)
		}
		e.byID[c.id] = len(e.policies)
		e.policies = append(e.policies, c)
		for _, uid := range scopeNames(c.ast) {
			e.named[uid] = append(e.named[uid], c.ref)
		}
		return true
	})
}

// errNotOne is when a span holds no policy or several: the parser reads the text otherwise than split does.
var errNotOne = errors.New("parse error: this is not one policy")

// parse parses one span, and puts the position of the file into the policy. It never panics: cedar-go's parser, folder
// and compiler are called under recover, since the text is hostile.
func parse(s span) (p *cedar.Policy, err error) {
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, errors.New("parse error: the parser failed on this text")
		}
	}()
	var list cedar.PolicyList
	if err := list.UnmarshalCedar(s.text); err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, errNotOne
	}
	pos := &list[0].AST().Position
	pos.Offset += s.offset
	if pos.Line == 1 {
		pos.Column += s.column - 1
	}
	pos.Line += s.line - 1
	return list[0], nil
}

var inputPosition = regexp.MustCompile(`<input>:(\d+):(\d+)`)

// located returns the parser's message with its position counted from the beginning of the file.
func located(file string, s span, err error) string {
	msg := strings.TrimPrefix(err.Error(), "parser error: ")
	at := inputPosition.FindStringSubmatchIndex(msg)
	if at == nil {
		return quote(fmt.Sprintf("%s:%d:%d: %s", file, s.line, s.column, msg))
	}
	line, _ := strconv.Atoi(msg[at[2]:at[3]])
	column, _ := strconv.Atoi(msg[at[4]:at[5]])
	if line == 1 {
		column += s.column - 1
	}
	return quote(fmt.Sprintf("%s%s:%d:%d%s", msg[:at[0]], file, line+s.line-1, column, msg[at[1]:]))
}

func place(s span) string { return fmt.Sprintf(" (line %d)", s.line) }

// identify returns the policy's name: its @id, else fallback. fault says what is wrong with the @id.
func identify(p *cedar.Policy, fallback string) (id, fault string) {
	v, ok := p.Annotations()["id"]
	switch id := string(v); {
	case !ok:
		return fallback, ""
	case id == "" || len(id) > maxIDBytes:
		return fallback, fmt.Sprintf("its @id is empty or longer than %d bytes", maxIDBytes)
	case strings.ContainsFunc(id, func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fallback, "its @id has blanks or characters that do not print"
	default:
		return id, ""
	}
}

// Policies returns every policy, in order of file and place. The caller owns the slice.
func (e *Engine) Policies() []policy.Ref {
	refs := make([]policy.Ref, len(e.policies))
	for i := range e.policies {
		refs[i] = e.policies[i].ref
	}
	return refs
}

// Names returns the policies whose scope names this very entity, by == or in: not those that reach it through a parent,
// a type or no constraint at all. The never-touch list asks it.
func (e *Engine) Names(uid policy.UID) []policy.Ref {
	return append([]policy.Ref(nil), e.named[cedarUID(uid)]...)
}

// scopeNames lists the entities that a policy's scope names, once each.
func scopeNames(p *ast.Policy) []types.EntityUID {
	var uids []types.EntityUID
	add := func(scope ast.IsScopeNode) {
		switch s := scope.(type) {
		case ast.ScopeTypeEq:
			uids = append(uids, s.Entity)
		case ast.ScopeTypeIn:
			uids = append(uids, s.Entity)
		case ast.ScopeTypeIsIn:
			uids = append(uids, s.Entity)
		case ast.ScopeTypeInSet:
			uids = append(uids, s.Entities...)
		}
	}
	add(p.Principal)
	add(p.Action)
	add(p.Resource)
	return distinct(uids)
}

func distinct(uids []types.EntityUID) []types.EntityUID {
	seen := make(map[types.EntityUID]bool, len(uids))
	out := uids[:0]
	for _, u := range uids {
		if !seen[u] {
			seen[u] = true
			out = append(out, u)
		}
	}
	return out
}
