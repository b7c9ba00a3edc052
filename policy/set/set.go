package set

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

// File is one file of a set.
//
// Shape: Name is a relative, slash-separated path that ends in .cedar, .yaml or .yml; Content is UTF-8.
type File struct {
	Name    string `json:"name"`
	Content string `json:"content"`
}

// The bounds of a set.
const (
	MaxFiles     = 1000
	MaxFileBytes = 1 << 20
	MaxBytes     = 8 << 20 // of all files together
	MaxDocuments = 5000    // YAML documents
	MaxPolicies  = 10_000  // with the built-in ones
	maxFileName  = 255
)

// Set is a parsed policy set: policies, issuance rules and the other documents, ready to decide and to issue.
//
// Concurrency: immutable; safe for any number of goroutines. Zero value: not useful; use [Parse].
type Set struct {
	files  []File // sorted by name
	digest string
	engine *eval.Engine
	docs   documents
	rules  []*IssuanceRule // highest priority first; the built-in one if there are no others
	modes  map[string][]*Mode
	// declared is the entities that Service and Address documents stand for.
	declared map[policy.UID]policy.Entity
	named    map[policy.UID]map[string]bool // never-touch service → ids of policies that name it
}

// Parse reads a set, whole or not at all: every file must be *.cedar, *.yaml or *.yml and everything in it known and
// right. No files at all are the built-in set.
//
// Errors: [Problems], all of them at once. Trust: files are parsed as hostile bytes; see the bounds.
func Parse(files []File) (*Set, error) {
	found := &findings{}
	s := &Set{files: slices.Clone(files), docs: documents{seen: map[string]Document{}}}
	slices.SortStableFunc(s.files, func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	if !admitFiles(s.files, found) {
		return nil, found.problems()
	}
	cedar := []eval.File{{Name: builtinName, Text: []byte(builtinText)}}
	documents := 0
	for _, f := range s.files {
		if path.Ext(f.Name) == ".cedar" {
			cedar = append(cedar, eval.File{Name: f.Name, Text: []byte(f.Content)})
			continue
		}
		for _, c := range chunks(f.Content) {
			if documents++; documents > MaxDocuments {
				over := &findings{} // alone: among what else is wrong it would not be seen
				fileProblem(over, f.Name, CodeBounds, fmt.Sprintf("there are more than %d documents", MaxDocuments), "leave some out")
				return nil, over.problems()
			}
			s.docs.read(f.Name, c, found)
		}
	}
	s.compile(cedar, found)
	if err := found.problems(); err != nil {
		return nil, err
	}
	s.digest = digest(s.files)
	s.index()
	return s, nil
}

// compile makes the engine, and adds what policy/eval finds wrong.
func (s *Set) compile(files []eval.File, found *findings) {
	engine, err := eval.Compile(files)
	var problems eval.Problems
	switch {
	case errors.As(err, &problems):
		for _, p := range problems {
			found.add("\xff", 0, p) // policies after documents; they are in order of file already
		}
		return
	case err != nil:
		found.add("\xff", 0, &refusal.Error{
			Kind: refusal.Invalid, Code: CodeSyntax, What: "policies", Why: "the engine does not take them", Do: "see the server's log", Err: err,
		})
		return
	}
	refs := engine.Policies()
	if len(refs) > MaxPolicies {
		fileProblem(found, "", CodeBounds, fmt.Sprintf("there are more than %d policies", MaxPolicies), "leave some out")
	}
	for _, ref := range refs {
		if ref.File != builtinName && isBuiltin(ref.ID) {
			fileProblem(found, ref.File, CodeReserved, "the policy "+ref.ID+" has an id that begins with "+builtinPrefix, "give it another @id")
		}
	}
	s.engine = engine
}

// admitFiles checks names, sizes and encodings before anything is parsed, and reports whether parsing may begin.
func admitFiles(files []File, found *findings) bool {
	if len(files) > MaxFiles {
		fileProblem(found, "", CodeBounds, fmt.Sprintf("there are more than %d files", MaxFiles), "join some of them")
		return false
	}
	total := 0
	for i, f := range files {
		total += len(f.Content)
		if why, do := badFileName(f.Name); why != "" {
			found.add("", i, &refusal.Error{Kind: refusal.Invalid, Code: CodeFile, What: fmt.Sprintf("file %d of the set", i+1), Why: why, Do: do})
			continue
		}
		switch {
		case isBuiltin(f.Name):
			fileProblem(found, f.Name, CodeReserved, "names that begin with "+builtinPrefix+" are Redoubt's own", "put it in another directory")
		case i > 0 && files[i-1].Name == f.Name:
			fileProblem(found, f.Name, CodeDuplicate, "there are two files of this name", "leave one of them out")
		case IsTestFile(f.Name):
			fileProblem(found, f.Name, CodeFile, "it holds tests, which are no part of a set", "leave it out, and run it with redoubt policy test")
		case !slices.Contains([]string{".cedar", ".yaml", ".yml"}, path.Ext(f.Name)):
			fileProblem(found, f.Name, CodeFile, "its name ends in none of .cedar, .yaml and .yml", "rename it or leave it out")
		case len(f.Content) > MaxFileBytes:
			fileProblem(found, f.Name, CodeBounds, fmt.Sprintf("it is larger than %d bytes", MaxFileBytes), "split it")
		case !utf8.ValidString(f.Content):
			fileProblem(found, f.Name, CodeFile, "it is not UTF-8", "save it as UTF-8")
		}
	}
	if total > MaxBytes {
		fileProblem(found, "", CodeBounds, fmt.Sprintf("its files are larger than %d bytes together", MaxBytes), "leave some out")
	}
	return len(found.list) == 0
}

// badFileName says what is wrong with a name, which is then not repeated.
func badFileName(name string) (why, do string) {
	const form = "use a relative path of letters, digits, dots, hyphens, underscores and slashes"
	switch {
	case name == "" || len(name) > maxFileName:
		return fmt.Sprintf("its name does not have 1 to %d bytes", maxFileName), form
	case !fs.ValidPath(name) || name == ".":
		return "its name is no relative path without dot segments", form
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' || strings.ContainsRune(`\:*?"<>|`, r) }):
		return "its name has a character that is not taken", form
	}
	return "", ""
}

func fileProblem(found *findings, file, code, why, do string) {
	what := file
	if file == "" {
		what = "policy set"
	}
	found.add(file, 0, &refusal.Error{Kind: refusal.Invalid, Code: code, What: what, Why: why, Do: do})
}

// index prepares what Decide and Issue ask.
func (s *Set) index() {
	s.rules = s.docs.rules
	if len(s.rules) == 0 {
		s.rules = []*IssuanceRule{builtinRule}
	}
	slices.SortStableFunc(s.rules, func(a, b *IssuanceRule) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.Name, b.Name))
	})
	s.declared = s.docs.entities()
	s.modes = map[string][]*Mode{}
	for i := range s.docs.modes {
		m := &s.docs.modes[i]
		for _, ns := range m.Namespaces {
			s.modes[ns] = append(s.modes[ns], m)
		}
	}
	for _, modes := range s.modes {
		// The first that selects a request decides: most properties first; of equals, enforce.
		slices.SortStableFunc(modes, func(a, b *Mode) int {
			return cmp.Or(cmp.Compare(b.For.terms(), a.For.terms()), cmp.Compare(a.Mode, b.Mode))
		})
	}
	s.named = map[policy.UID]map[string]bool{}
	for _, uid := range neverTouch {
		ids := map[string]bool{}
		for _, ref := range s.engine.Names(uid) {
			ids[ref.ID] = true
		}
		s.named[uid] = ids
	}
}

// Digest returns the SHA-256, in hex, of the names and contents of the files: two sets with one digest are the same.
func (s *Set) Digest() string { return s.digest }

func digest(sorted []File) string {
	h := sha256.New()
	var size [8]byte
	for _, f := range sorted {
		for _, part := range []string{f.Name, f.Content} {
			binary.BigEndian.PutUint64(size[:], uint64(len(part)))
			_, _ = h.Write(size[:]) // a hash never fails to write
			_, _ = h.Write([]byte(part))
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Files returns the operator's files in order of name, without the built-in ones.
func (s *Set) Files() []File { return slices.Clone(s.files) }

// Policies returns every policy, the built-in ones first.
func (s *Set) Policies() []policy.Ref { return s.engine.Policies() }

// Services returns the Service documents. The caller must not change what they refer to; so for the methods below.
func (s *Set) Services() []Service { return slices.Clone(s.docs.services) }

// Addresses returns the Address documents.
func (s *Set) Addresses() []Address { return slices.Clone(s.docs.addresses) }

// Modes returns the Mode documents.
func (s *Set) Modes() []Mode { return slices.Clone(s.docs.modes) }

// Routes returns the Route documents.
func (s *Set) Routes() []Route { return slices.Clone(s.docs.routes) }

// Issuers returns the Issuer documents.
func (s *Set) Issuers() []Issuer { return slices.Clone(s.docs.issuers) }

// Responses returns the Response documents.
func (s *Set) Responses() []Response { return slices.Clone(s.docs.responses) }

// Rules returns the issuance rules in force, highest priority first: the built-in one where the set has none.
func (s *Set) Rules() []IssuanceRule {
	out := make([]IssuanceRule, len(s.rules))
	for i, r := range s.rules {
		out[i] = *r
	}
	return out
}
