package eval_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

func file(name, text string) eval.File { return eval.File{Name: name, Text: []byte(text)} }

func TestCompileNamesPolicies(t *testing.T) {
	t.Parallel()
	e, err := eval.Compile([]eval.File{
		file("shop.cedar", `// nothing but a comment
permit(principal, action == Net::Action::"connect", resource == Service::"a;b // c");
@id("named") @note("x")
forbid(principal in Service::"orders", action in [Run::Action::"exec", Run::Action::"read"], resource is File in File::"/etc");
permit(principal is Workload, action, resource); /* the end; really */`),
		file("empty.cedar", " \n"),
		file("other.cedar", `permit(principal == Workload::"w\u{e9}", action, resource);`),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []policy.Ref{
		{ID: "shop.cedar#1", File: "shop.cedar", Effect: policy.EffectPermit},
		{ID: "named", File: "shop.cedar", Effect: policy.EffectForbid},
		{ID: "shop.cedar#3", File: "shop.cedar", Effect: policy.EffectPermit},
		{ID: "other.cedar#1", File: "other.cedar", Effect: policy.EffectPermit},
	}
	if diff := cmp.Diff(want, e.Policies()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	e.Policies()[0].ID = "mine"
	if e.Policies()[0].ID != "shop.cedar#1" {
		t.Error("a caller changed the engine's list")
	}
	for uid, want := range map[policy.UID][]policy.Ref{
		{Type: "Service", ID: "a;b // c"}: want[:1],
		{Type: "Service", ID: "orders"}:   want[1:2],
		{Type: "File", ID: "/etc"}:        want[1:2],
		{Type: "Workload", ID: "wé"}:      want[3:],
		policy.Action(policy.Run, "read"): want[1:2],
		{Type: "Service", ID: "shop"}:     nil,
		{Type: "Workload"}:                nil,
	} {
		if diff := cmp.Diff(want, e.Names(uid)); diff != "" {
			t.Errorf("%s: -want +got\n%s", uid, diff)
		}
	}
}

func TestCompileRefusesEveryDefectOfEveryFileAtOnce(t *testing.T) {
	t.Parallel()
	_, err := eval.Compile([]eval.File{
		file("a.cedar", `permit(principal, action, resource) when { context.nothing == 1 };
permit(principal, action == Net::Action::"conect", resource);
@id("one") permit(principal, action, resource);

  permit(principal, action, resourc);`),
		file("b.cedar", `@id("one") permit(principal, action, resource);
@id("has blank") permit(principal, action, resource);
permit(principal is Workload, action == Net::Action::"connect", resource) when { principal.uid == 0 };
permit(principal is Workload, action == Net::Action::"connect", resource) when { principal.service == 0 };
permit(principal is Secret, action == Net::Action::"connect", resource);
permit(principal is Workload, action == Net::Action::"connect", resource) when { principal.getTag("env") == "x" };
permit(principal, action, resource`),
		file("b.cedar", `permit(principal, action, resource);`),
		file("", `permit(principal, action, resource);`),
	})
	var ps eval.Problems
	if !errors.As(err, &ps) {
		t.Fatalf("not Problems: %v", err)
	}
	want := []struct{ code, what, why string }{
		{"policy-invalid", "policy a.cedar#1 in a.cedar (line 1)", "nothing"},
		{"policy-invalid", "policy a.cedar#2 in a.cedar (line 2)", "conect"},
		{"policy-syntax", "policy a.cedar#4 in a.cedar", "a.cedar:5:36"},
		{"policy-duplicate-id", "policy one in b.cedar (line 1)", "a.cedar"},
		{"policy-bad-id", "policy b.cedar#2 in b.cedar (line 2)", "blanks"},
		{"policy-invalid", "policy b.cedar#3 in b.cedar (line 3)", "optional attribute `uid`"},
		{"policy-invalid", "policy b.cedar#4 in b.cedar (line 4)", "service"},
		{"policy-invalid", "policy b.cedar#5 in b.cedar (line 5)", "applicable action"},
		{"policy-invalid", "policy b.cedar#6 in b.cedar (line 6)", "tag"},
		{"policy-syntax", "policy b.cedar#7 in b.cedar", "b.cedar:7:"},
		{"policy-bad-file", "policy file b.cedar", "same name"},
		{"policy-bad-file", "policy file ", "empty"},
	}
	i := 0
	for _, w := range want {
		found := false
		for ; i < len(ps) && !found; i++ {
			e := ps[i]
			found = e.Code == w.code && e.What == w.what && strings.Contains(e.Why, w.why)
			if e.Kind != refusal.Invalid || e.Do == "" || strings.ContainsAny(e.Error(), "\n\t") {
				t.Errorf("not a whole refusal on one line: %q", e.Error())
			}
		}
		if !found {
			t.Errorf("missing in order: %+v of\n%v", w, err)
			break
		}
	}
	if refusal.As(err) == nil || !errors.Is(err, &refusal.Error{Code: "policy-duplicate-id"}) {
		t.Error("problems must be found in the error")
	}
}

func TestCompileStaysWithinItsBounds(t *testing.T) {
	t.Parallel()
	const head, tail = "permit(principal, action, resource) when { ", " };"
	deepHas := "context"
	for range 40 {
		deepHas = "(" + deepHas + " has a.b)"
	}
	many := make([]eval.File, 1_001)
	for i := range many {
		many[i] = file(fmt.Sprint(i), "")
	}
	big := strings.Repeat(" ", 4<<20)
	var total []eval.File
	for i := range 9 {
		total = append(total, file(fmt.Sprint(i), big))
	}
	for _, c := range []struct {
		name  string
		files []eval.File
		code  string
	}{
		{"files", many, "policy-too-many"},
		{"bytes of a file", []eval.File{file("a", big+" ")}, "policy-too-large"},
		{"bytes of all", total, "policy-too-large"},
		{"policies", []eval.File{file("a", strings.Repeat("permit(principal,action,resource);", 20_001))}, "policy-too-many"},
		{"brackets", []eval.File{file("a", head+strings.Repeat("(", 64)+"true"+strings.Repeat(")", 64)+tail)}, "policy-too-deep"},
		{"open brackets", []eval.File{file("a", strings.Repeat("(", 3<<20))}, "policy-too-deep"},
		{"brackets after a comment", []eval.File{file("a", head+"// \"\n"+strings.Repeat("[", 100)+"/* \" */"+strings.Repeat("]", 100)+tail)}, "policy-too-deep"},
		{"unary", []eval.File{file("a", head+strings.Repeat("!", 5)+"true"+tail)}, "policy-too-deep"},
		{"chain", []eval.File{file("a", head+"context"+strings.Repeat(".a", 65)+tail)}, "policy-too-deep"},
		{"tokens", []eval.File{file("a", head+strings.Repeat("true || ", 4_000)+"true"+tail)}, "policy-too-large"},
		{"if after if", []eval.File{file("a", head+strings.Repeat("if true then true else ", 5_000)+"true"+tail)}, "policy-too-large"},
		{"links", []eval.File{file("a", head+strings.Repeat("true || ", 600)+"true"+tail)}, "policy-too-deep"},
		{"has within has", []eval.File{file("a", head+deepHas+tail)}, "policy-too-large"},
		{"id", []eval.File{file("a", `@id("`+strings.Repeat("x", 129)+`") permit(principal,action,resource);`)}, "policy-bad-id"},
		{"file name", []eval.File{file("a\nb", "")}, "policy-bad-file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := eval.Compile(c.files)
			if e := refusal.As(err); e == nil || e.Code != c.code || e.Do == "" {
				t.Errorf("got %v, want code %s", err, c.code)
			}
			if err != nil && len(err.Error()) > 100_000 {
				t.Errorf("the refusal has %d bytes", len(err.Error()))
			}
		})
	}
	for name, text := range map[string]string{
		"brackets": strings.Repeat("(", 62) + "true" + strings.Repeat(")", 62),
		"unary":    "!!!!true",
		"set":      "[" + strings.Repeat("1,", 4_900) + "1].contains(2)",
	} {
		if _, err := eval.Compile([]eval.File{file("a", head+text+tail)}); err != nil {
			t.Errorf("%s within the bound: %.300s", name, err.Error())
		}
	}
}

func TestCompileListsAHundredProblemsAndCountsTheRest(t *testing.T) {
	t.Parallel()
	_, err := eval.Compile([]eval.File{file("a", strings.Repeat("permit(;", 250))})
	var ps eval.Problems
	if !errors.As(err, &ps) || len(ps) != 101 || !strings.Contains(ps[100].Why, "150 more") {
		t.Errorf("got %d problems: %.200v", len(ps), err)
	}
}

// A token is quoted back in a refusal: bounded, and on one line.
func TestCompileQuotesHostileTextSafely(t *testing.T) {
	t.Parallel()
	_, err := eval.Compile([]eval.File{file("a", "permit(principal, action, \"\x1b[31m"+strings.Repeat("x", 1<<20)+"\");")})
	if e := refusal.As(err); e == nil || len(e.Error()) > 1000 || strings.ContainsAny(e.Error(), "\x1b\n") {
		t.Errorf("got %.300q", err.Error())
	}
}

func FuzzCompile(f *testing.F) {
	f.Add(`@id("x") permit(principal in Service::"a", action == Net::Action::"connect", resource) when { context has port && context.port == 1 };`)
	f.Add("permit(principal,action,resource) unless { [1,{a:2}].contains(if true then \"\\u{1F600}\" else ip(\"::1\")) }; // x\n/* ; */ forbid(principal,action,resource);")
	f.Add("permit(principal is Workload in Image::\"x\",action in [],resource)when{principal.hasTag(\"a\")&&principal.getTag(\"a\") like \"*\\*\"};")
	f.Add("(((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((")
	f.Fuzz(func(t *testing.T, text string) {
		e, err := eval.Compile([]eval.File{file("fuzz.cedar", text)})
		if err != nil {
			var ps eval.Problems
			if !errors.As(err, &ps) || len(ps) == 0 {
				t.Fatalf("not Problems: %v", err)
			}
			for _, p := range ps {
				if p.What == "" || p.Why == "" || p.Do == "" || p.Code == "" || strings.ContainsAny(p.Error(), "\n\x00") {
					t.Fatalf("not a whole refusal: %q", p.Error())
				}
			}
			return
		}
		if _, _, err := e.Decide(t.Context(), shopRequest()); err != nil {
			t.Fatal(err)
		}
	})
}
