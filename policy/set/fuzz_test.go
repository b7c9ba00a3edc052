package set_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy/set"
)

// FuzzParse holds what a set may say to what its reader promises: Problems or a Set, never a panic; no control character
// in a message; no line of a message for a file that is not there; what parses has one digest and no difference to itself.
func FuzzParse(f *testing.F) {
	f.Add(everything, "permit(principal, action, resource);")
	f.Add(rule("a", `context.service == "x"`, "/s/{workload.service}", 1)+enforceAll, `@id("x") forbid(principal, action, resource == Service::"sshd");`)
	for _, seed := range []string{
		"--- |\n  text\n", "a: &a [*a]\n", "%YAML 1.2\n---\na: b\n", "kind: Mode\r---\rkind: Mode\r", "? [a]\n: b\n", "\ufeffkind: Service\nname: x\nspec: {}\n",
		"kind: Service\nname: x\nspec: {openapi: {openapi: 3.1.0, paths: {/a: {get: {}}}}}\n", strings.Repeat("[", 200), "a:\n" + strings.Repeat(" - ", 100),
		"kind: Address\nname: x\nspec: {cidrs: [::/0], names: ['*.a']}\n", "... \n...\n", "a: 'b\n---\nc'\n", "kind: !!str Mode\n", "<<: {a: b}\n", "1e999: .inf\n",
	} {
		f.Add(seed, "")
	}
	facts, err := identity.NewFactSet(identity.Fact{Name: identity.FactService, Value: "x", Source: identity.FromOperator})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, yaml, cedar string) {
		files := []set.File{{Name: "f.yaml", Content: yaml}, {Name: "f.cedar", Content: cedar}}
		s, err := set.Parse(files)
		_ = set.Difference(nil, files) // takes what does not parse, too
		if err != nil {
			var problems set.Problems
			if !errors.As(err, &problems) || len(problems) == 0 || len(problems) > set.MaxProblems {
				t.Fatalf("%T with %d problems", err, len(problems))
			}
			for _, p := range problems {
				if strings.ContainsFunc(p.Error(), func(r rune) bool { return r < ' ' }) {
					t.Errorf("a control character in %q", p.Error())
				}
			}
			return
		}
		if again, err := set.Parse(s.Files()); err != nil || again.Digest() != s.Digest() {
			t.Errorf("read again: %v", err)
		}
		if d := cmp.Diff(set.Diff{}, set.Difference(files, s.Files())); d != "" {
			t.Error(d)
		}
		set.Unenforced(s)
		if id, _, err := s.Issue("example.org", facts); err == nil {
			if path := id.Path(); strings.HasPrefix(path+"/", "/machine/") || strings.HasPrefix(path+"/", "/redoubt/") {
				t.Errorf("issued %s", id)
			}
		}
	})
}

// FuzzTests holds the reader of policy tests to the same.
func FuzzTests(f *testing.F) {
	f.Add(tests)
	f.Add("tests: [{name: x, expect: deny, request: {principal: 'User::\"\\u0000\"', action: Net::connect, resource: 'A::B::\"x\"', context: {a: [1, {b: 2}]}}}]\n")
	s, err := set.Parse(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, err := set.RunTests(t.Context(), s, []set.File{{Name: "f_test.yaml", Content: text}})
		var problems set.Problems
		if err != nil && !errors.As(err, &problems) {
			t.Fatal(err)
		}
	})
}

// FuzzSelector holds that what parses is well-formed and renders as itself.
func FuzzSelector(f *testing.F) {
	f.Add("service=orders,machine=m1,label.app=orders")
	f.Add("label.a=b=c, label.d= e")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := set.ParseSelector(text)
		if err != nil {
			return
		}
		if err := s.Check(); err != nil {
			t.Errorf("%q parses, and is refused: %v", text, err)
		}
	})
}
