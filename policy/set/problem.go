package set

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of what can be wrong with a set; [Problems] of [Parse] carry these and those of policy/eval.
const (
	CodeBounds    = "set-bounds"    // more or larger than a bound allows
	CodeFile      = "set-file"      // a file's name or encoding
	CodeSyntax    = "set-syntax"    // not well-formed YAML, or YAML that this package does not take
	CodeKind      = "set-kind"      // an unknown or missing kind
	CodeKey       = "set-key"       // an unknown or missing key
	CodeType      = "set-type"      // a value of the wrong type
	CodeValue     = "set-value"     // a value out of range or not of the form asked for
	CodeDuplicate = "set-duplicate" // a file, document, key or item that is there twice
	CodeReserved  = "set-reserved"  // a name that is Redoubt's own
)

// MaxProblems is how many problems of one set are told; the last then says how many more there are.
const MaxProblems = 100

// Problems is everything that is wrong with a set, in order of file and line. Each names file, line, kind and name of
// the document (or the policy), the key, the reason and what to do. No value of a field that may hold a secret is
// repeated; values that are repeated come from fields that hold names, numbers and addresses.
type Problems []*refusal.Error

// Error renders one problem a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, e := range p {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap makes each problem visible to errors.Is and errors.As.
func (p Problems) Unwrap() []error {
	errs := make([]error, len(p))
	for i, e := range p {
		errs[i] = e
	}
	return errs
}

// finding is a problem with where it sorts.
type finding struct {
	file string
	line int
	err  *refusal.Error
}

// findings collects problems while a set is read. One goroutine owns it.
type findings struct {
	list []finding
	more int // beyond maxFindings
}

// maxFindings bounds memory on an input that is nothing but problems; it is above MaxProblems, so that sorting shows
// the first ones.
const maxFindings = 10 * MaxProblems

func (f *findings) add(file string, line int, err *refusal.Error) {
	if len(f.list) >= maxFindings {
		f.more++
		return
	}
	f.list = append(f.list, finding{file: file, line: line, err: err})
}

// problems returns what was found, in order, or nil.
func (f *findings) problems() error {
	if len(f.list) == 0 {
		return nil
	}
	slices.SortStableFunc(f.list, func(a, b finding) int {
		return cmp.Or(cmp.Compare(a.file, b.file), cmp.Compare(a.line, b.line))
	})
	var out Problems
	for i, x := range f.list {
		if i == MaxProblems-1 && len(f.list) > MaxProblems {
			out = append(out, &refusal.Error{
				Kind: refusal.Invalid, Code: CodeBounds, What: "policy set",
				Why: fmt.Sprintf("there are %d more problems", len(f.list)-i+f.more), Do: "correct these first",
			})
			break
		}
		out = append(out, x.err)
	}
	return out
}

// place is where in a set something stands.
type place struct {
	file, kind, name string
}

// what renders "modes.yaml:12: Mode/all: spec.mode".
func (p place) what(line int, path string) string {
	var b strings.Builder
	b.WriteString(p.file)
	if line > 0 {
		fmt.Fprintf(&b, ":%d", line)
	}
	if p.kind != "" {
		b.WriteString(": " + p.kind)
		if p.name != "" {
			b.WriteString("/" + p.name)
		}
	}
	if path != "" {
		b.WriteString(": " + path)
	}
	return b.String()
}

// identifier is the form of keys that a message may repeat; anything else might be a value that slipped.
var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,47}$`)

// keyName renders a key of the input for a message.
func keyName(key string) string {
	if identifier.MatchString(key) {
		return key
	}
	return "(a key that is no plain name)"
}
