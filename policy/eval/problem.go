package eval

import (
	"fmt"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// Problems is every defect that was found, in order of file and place: never empty when it is returned as an error.
//
// Each has a code of this list: policy-syntax, policy-invalid, policy-duplicate-id, policy-bad-id, policy-bad-file,
// policy-too-large, policy-too-deep, policy-too-many.
type Problems []*refusal.Error

// Error joins the problems, one a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, e := range p {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the problems, for errors.Is and errors.As.
func (p Problems) Unwrap() []error {
	errs := make([]error, len(p))
	for i, e := range p {
		errs[i] = e
	}
	return errs
}

// The codes of problems.
const (
	codeSyntax    = "policy-syntax"
	codeInvalid   = "policy-invalid"
	codeDuplicate = "policy-duplicate-id"
	codeBadID     = "policy-bad-id"
	codeBadFile   = "policy-bad-file"
	codeTooLarge  = "policy-too-large"
	codeTooDeep   = "policy-too-deep"
	codeTooMany   = "policy-too-many"
)

// maxProblems bounds how many defects are listed; the last entry then says how many more there are.
const maxProblems = 100

// maxQuoted bounds, in bytes, what is quoted from policy text in a message.
const maxQuoted = 240

// problems collects defects up to the bound.
type problems struct {
	list Problems
	more int
}

func (p *problems) add(e *refusal.Error) {
	if len(p.list) >= maxProblems {
		p.more++
		return
	}
	p.list = append(p.list, e)
}

func (p *problems) refuse(code, what, why, do string) {
	p.add(&refusal.Error{Kind: refusal.Invalid, Code: code, What: what, Why: why, Do: do})
}

func (p *problems) err() error {
	if len(p.list) == 0 {
		return nil
	}
	if p.more > 0 {
		return append(p.list, &refusal.Error{
			Kind: refusal.Invalid, Code: codeTooMany, What: "policies",
			Why: fmt.Sprintf("there are %d more problems", p.more), Do: "correct those above first",
		})
	}
	return p.list
}

// quote shortens text from outside to maxQuoted bytes and takes its control characters out, so that a message stays one
// line whatever a policy holds.
func quote(s string) string {
	cut := false
	if len(s) > maxQuoted {
		s, cut = s[:maxQuoted], true
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "�"))
	if cut {
		s += "…"
	}
	return s
}
