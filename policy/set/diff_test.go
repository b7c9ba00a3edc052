package set_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy/set"
)

func TestDifferenceIsByPolicyAndDocument(t *testing.T) {
	a := []set.File{
		{Name: "net.cedar", Content: `// keeps
@id("kept")
permit(principal, action, resource);

// says; something "odd
@description("a; b") @id("changed") /* ; */
permit(principal, action, resource) when { "a;\"b" == "c" };
forbid(principal, action, resource);
@id("moved") permit(principal, action, resource);
`},
		{Name: "docs.yaml", Content: "# first\nkind: Mode\nname: a\nspec: {}\n---\nkind: Mode\nname: gone\nspec: {}\n"},
		{Name: "same.yaml", Content: "# nothing\n"},
	}
	b := []set.File{
		{Name: "net.cedar", Content: `// keeps
@id("kept")
permit(principal, action, resource);
// says; something "odd
@description("a; b") @id("changed") /* ; */
permit(principal, action, resource) when { "a;\"b" == "d" };
forbid(principal, action, resource);
@id("new") permit(principal, action, resource)
`},
		{Name: "other.cedar", Content: `@id("moved") permit(principal, action, resource);`},
		{Name: "docs.yaml", Content: "# first\nkind: Mode\nname: a\nspec: {}\n---\n\n---\nkind: Mode\nname: b\nspec: {}\n---\n{broken\n"},
		{Name: "same.yaml", Content: "# nothing\n"},
	}
	d := set.Difference(a, b)
	wantFiles := []set.FileChange{{Name: "docs.yaml", Op: set.Changed}, {Name: "net.cedar", Op: set.Changed}, {Name: "other.cedar", Op: set.Added}}
	if diff := cmp.Diff(wantFiles, d.Files); diff != "" {
		t.Error(diff)
	}
	comment := "// says; something \"odd\n@description(\"a; b\") @id(\"changed\") /* ; */\npermit(principal, action, resource) when { \"a;\\\"b\" == "
	want := []set.Change{
		{Op: set.Added, Kind: "Mode", Name: "b", File: "docs.yaml", After: "kind: Mode\nname: b\nspec: {}"},
		{Op: set.Added, Kind: "document", Name: "docs.yaml#3", File: "docs.yaml", After: "{broken"},
		{Op: set.Removed, Kind: "Mode", Name: "gone", File: "docs.yaml", Before: "kind: Mode\nname: gone\nspec: {}"},
		{Op: set.Changed, Kind: set.KindPolicy, Name: "changed", File: "net.cedar", Before: comment + "\"c\" };", After: comment + "\"d\" };"},
		{Op: set.Added, Kind: set.KindPolicy, Name: "new", File: "net.cedar", After: "@id(\"new\") permit(principal, action, resource)"},
	}
	if diff := cmp.Diff(want, d.Changes); diff != "" {
		t.Error(diff)
	}
	if !set.Difference(a, a).Empty() || set.Difference(a, b).Empty() {
		t.Error("Empty must say whether any file differs")
	}
}

func TestDifferenceNamesPoliciesAsTheSetDoes(t *testing.T) {
	text := `permit(principal, action, resource); // one
@id("x") forbid(principal, action, resource); @note("@id(\"no\")") permit(principal, action, resource);`
	refs := mustParse(t, cedarFile(text)).Policies()
	d := set.Difference(nil, []set.File{cedarFile(text)})
	if len(d.Changes) != 3 {
		t.Fatalf("%+v", d)
	}
	for i, c := range d.Changes {
		if ref := refs[len(refs)-3+i]; ref.ID != c.Name {
			t.Errorf("policy %d is %s in the set and %s in the difference", i, ref.ID, c.Name)
		}
	}
}
