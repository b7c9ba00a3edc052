package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// constants reads the string constants of a file, those of the given type only, or with a prefix of their names.
func constants(t *testing.T, file, typ, prefix string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, decl := range f.Decls {
		g, ok := decl.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			if id, ok := v.Type.(*ast.Ident); typ != "" && (!ok || id.Name != typ) || !strings.HasPrefix(v.Names[0].Name, prefix) || len(v.Values) == 0 {
				continue
			}
			if lit, ok := v.Values[0].(*ast.BasicLit); ok {
				s, _ := strconv.Unquote(lit.Value)
				out = append(out, s)
			}
		}
	}
	if len(out) < 9 {
		t.Fatalf("found %d constants in %s: the walk is broken", len(out), file)
	}
	return out
}

// Every kind of refusal has its form, and comes back from the client as it was.
func TestEveryKindOfRefusalGoesThereAndBack(t *testing.T) {
	kinds := constants(t, "../refusal/refusal.go", "Kind", "")
	if len(kinds) != len(forms) {
		t.Errorf("there are %d kinds, and %d in the table", len(kinds), len(forms))
	}
	statuses := map[int]string{}
	for _, kind := range kinds {
		sent := &refusal.Error{
			Kind: refusal.Kind(kind), Code: "some-code", What: "join of m1", Why: "the token: was used", Do: "make a new one",
			Decision: "d-1", Err: errors.New("secret cause"),
		}
		p, internal := render(fmt.Errorf("outer: %w", sent), "q-1")
		if internal || p.Status < 400 {
			t.Errorf("%s: status %d, internal %v", kind, p.Status, internal)
			continue
		}
		if other, twice := statuses[p.Status]; twice {
			t.Errorf("%s and %s share status %d", kind, other, p.Status)
		}
		statuses[p.Status] = kind
		w := httptest.NewRecorder()
		p.write(w)
		if strings.Contains(w.Body.String(), "secret") || strings.Contains(w.Body.String(), "outer") {
			t.Errorf("%s: internals in %s", kind, w.Body)
		}
		if got := w.Result().Header.Get("Content-Type"); got != problemType || w.Code != p.Status {
			t.Errorf("%s: %d %s", kind, w.Code, got)
		}
		var read client.Problem
		if err := json.Unmarshal(w.Body.Bytes(), &read); err != nil {
			t.Fatal(err)
		}
		got := read.Refusal()
		if got == nil {
			t.Errorf("%s: no refusal in %s", kind, w.Body)
			continue
		}
		got.Err, sent.Err = nil, nil
		if diff := cmp.Diff(*sent, *got); diff != "" {
			t.Errorf("%s: not as it was (-sent +got):\n%s", kind, diff)
		}
		switch refusal.Kind(kind) { //nolint:exhaustive // only these have headers of their own
		case refusal.Unproven:
			if w.Header().Get("WWW-Authenticate") == "" {
				t.Error("a 401 has no WWW-Authenticate")
			}
		case refusal.Exhausted, refusal.Unavailable:
			if w.Header().Get("Retry-After") == "" {
				t.Errorf("%s has no Retry-After", kind)
			}
		}
	}
	if p, internal := render(&refusal.Error{Kind: "new", Code: "x", What: "a", Why: "b"}, ""); !internal || p.Status != 500 {
		t.Error("a kind without a form must not be rendered as a success, or with its words")
	}
}

func TestWhatIsNoRefusalShowsNothing(t *testing.T) {
	p, internal := render(errors.New("open /var/lib/redoubt/kek: permission denied"), "q-7")
	if raw, _ := json.Marshal(p); !internal || p.Status != 500 || strings.Contains(string(raw), "kek") || p.Request != "q-7" {
		t.Errorf("%v %s", internal, raw)
	}
	if p.Refusal() != nil || !strings.Contains(p.Error(), "q-7") {
		t.Error("an internal failure must not become a refusal, and must name its request")
	}
	if p, internal := render(fmt.Errorf("store: %w", context.DeadlineExceeded), ""); internal || p.Status != 503 || p.Code != codeDeadline {
		t.Errorf("deadline: %d %s", p.Status, p.Code)
	}
}

func TestRefusalsThatCameTogetherAreAllTold(t *testing.T) {
	one := &refusal.Error{Kind: refusal.Invalid, Code: "set-key", What: "a.yaml:3", Why: "unknown key", Do: "remove it"}
	two := &refusal.Error{Kind: refusal.Invalid, Code: "cedar-parse", What: "b.cedar", Why: "unexpected token"}
	p, _ := render(set.Problems{one, two}, "")
	if len(p.Problems) != 2 || p.Code != "set-key" || p.Status != 422 {
		t.Fatalf("%+v", p.Problem)
	}
	if diff := cmp.Diff([]*refusal.Error{one, two}, p.Refusals(), cmp.Comparer(func(a, b error) bool { return true })); diff != "" {
		t.Error(diff)
	}
	if p, _ := render(errors.Join(one), ""); p.Problems != nil {
		t.Error("one refusal is no list")
	}
}

func TestExplanationComesAlong(t *testing.T) {
	p, _ := render(&explained{
		refused:     &refusal.Error{Kind: refusal.Denied, Code: codeDenied, What: "a", Why: "b", Decision: "d-9"},
		explanation: policy.Explanation{Reason: policy.ReasonDefault, Summary: "nothing permits it"},
	}, "")
	if p.Explanation == nil || p.Explanation.Reason != policy.ReasonDefault || p.Decision != "d-9" || p.Status != http.StatusForbidden {
		t.Errorf("%+v", p.Problem)
	}
}

// The page that the type URIs lead to has every kind and every code of this room.
func TestProblemsPageIsComplete(t *testing.T) {
	page, err := os.ReadFile("problems.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range append(constants(t, "../refusal/refusal.go", "Kind", ""), "internal") {
		if !strings.Contains(string(page), "\n## "+kind+"\n") {
			t.Errorf("problems.md has no section %q", kind)
		}
	}
	for _, code := range constants(t, "problem.go", "", "code") {
		if !strings.Contains(string(page), "`"+code+"`") {
			t.Errorf("problems.md does not have the code %q", code)
		}
	}
	for code := range statuses {
		if !strings.Contains(string(page), "`"+code+"`") {
			t.Errorf("problems.md does not have the code %q", code)
		}
	}
}
