package eval_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

const (
	photoSchema = `entity User in [Team]; entity Team; entity Photo { owner: User };
action view appliesTo { principal: [User], resource: [Photo], context: { from?: ipaddr, via?: User } };
action any; action edit in [any] appliesTo { principal: [User], resource: [Photo] };`
	photoEntities = `[
{"uid":{"type":"User","id":"ann"},"attrs":{},"parents":[{"type":"Team","id":"a"}]},
{"uid":{"type":"Photo","id":"p"},"attrs":{"owner":{"type":"User","id":"ann"}},"parents":[]}]`
	photoPolicies = `@id("team") permit(principal in Team::"a", action == Action::"view", resource)
when { context has from && context.from.isInRange(ip("10.0.0.0/8")) };
permit(principal, action in Action::"any", resource) when { resource.owner == principal };
forbid(principal, action, resource) when { context has via && context.via == User::"eve" };
permit(principal == User::"err", action, resource) when { principal.nothing };`
)

func evaluate(t *testing.T, schema, policies, entities, requests string) (string, error) {
	t.Helper()
	var out, linear bytes.Buffer
	files := []eval.File{{Name: "photo.cedar", Text: []byte(policies)}}
	var s []byte
	if schema != "" {
		s = []byte(schema)
	}
	err := eval.Evaluate(&out, s, files, strings.NewReader(entities), strings.NewReader(requests))
	if e := eval.EvaluateLinear(&linear, s, files, strings.NewReader(entities), strings.NewReader(requests)); (e == nil) != (err == nil) || linear.String() != out.String() {
		t.Errorf("with the index and without it the answers differ: %v, %v\n%s\n%s", err, e, out.String(), linear.String())
	}
	return out.String(), err
}

func TestEvaluateReadsBothFormsOfEntitiesAndTheSchemasShortForms(t *testing.T) {
	t.Parallel()
	requests := `{"principal":"User::\"ann\"","action":"Action::\"view\"","resource":"Photo::\"p\"","context":{"from":{"__extn":{"fn":"ip","arg":"10.1.1.1"}}}}
{"principal":{"type":"User","id":"ann"},"action":{"type":"Action","id":"view"},"resource":{"__entity":{"type":"Photo","id":"p"}},"context":{"from":"10.1.1.1"}}

{"principal":"User::\"ann\"","action":"Action::\"edit\"","resource":"Photo::\"p\""}
{"principal":"User::\"ann\"","action":"Action::\"edit\"","resource":"Photo::\"p\"","context":{"via":{"__entity":{"type":"User","id":"eve"}}}}
{"principal":"User::\"ann\"","action":"Action::\"view\"","resource":"Photo::\"p\"","context":{"via":{"type":"User","id":"eve"}}}
{"principal":"User::\"err\"","action":"Action::\"view\"","resource":"Photo::\"p\"","context":null}
`
	got, err := evaluate(t, photoSchema, photoPolicies, photoEntities, requests)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"decision":"allow","reason":["team"],"errors":[]}
{"decision":"allow","reason":["team"],"errors":[]}
{"decision":"allow","reason":["policy1"],"errors":[]}
{"decision":"deny","reason":["policy2"],"errors":[]}
{"decision":"deny","reason":["policy2"],"errors":[]}
{"decision":"deny","reason":[],"errors":["policy3"]}
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	// Without the schema an address in a string is a string, and the action has no parents.
	got, err = evaluate(t, "", photoPolicies, photoEntities, strings.Split(requests, "\n")[1]+"\n"+strings.Split(requests, "\n")[3])
	want = `{"decision":"deny","reason":[],"errors":["team"]}` + "\n" + `{"decision":"deny","reason":[],"errors":[]}` + "\n"
	if err != nil || got != want {
		t.Errorf("without a schema: %v\n%s", err, got)
	}
}

func TestEvaluateRefusesBadInputByLine(t *testing.T) {
	t.Parallel()
	good := `{"principal":"User::\"ann\"","action":"Action::\"view\"","resource":"Photo::\"p\""}`
	for _, c := range []struct{ name, schema, policies, entities, requests, code, says string }{
		{"request", "", "", "[]", good + "\n{", "malformed-evaluation", "request on line 2"},
		{"no principal", "", "", "[]", `{"action":"Action::\"view\"","resource":"Photo::\"p\""}`, "malformed-evaluation", "lacks"},
		{"bad uid", "", "", "[]", `{"principal":"ann","action":"Action::\"view\"","resource":"Photo::\"p\""}`, "malformed-evaluation", "line 1"},
		{"bad context", "", "", "[]", `{"principal":"User::\"a\"","action":"Action::\"v\"","resource":"Photo::\"p\"","context":[1]}`, "malformed-evaluation", "context"},
		{"long line", "", "", "[]", strings.Repeat("x", 4<<20+1), "malformed-evaluation", "longer than"},
		{"entities", "", "", "{}", good, "malformed-evaluation", "entities"},
		{"entities by schema", photoSchema, "", `[{"uid":{"type":"Photo","id":"p"},"attrs":{"owner":3},"parents":[]}]`, good, "malformed-evaluation", "entities"},
		{"schema", "entity;", "", "[]", good, "malformed-evaluation", "schema"},
		{"policies", "", "permit(", "[]", good, "policy-syntax", "photo.cedar"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := evaluate(t, c.schema, c.policies, c.entities, c.requests)
			e := refusal.As(err)
			if e == nil || e.Code != c.code || !strings.Contains(e.Error(), c.says) {
				t.Errorf("got %v, want code %s and %q", err, c.code, c.says)
			}
		})
	}
}

// one answers after each line; a peer that waits for the answer before it sends the next must not hang.
func TestEvaluateAnswersEachLineBeforeItWaitsForTheNext(t *testing.T) {
	t.Parallel()
	in, requests := io.Pipe()
	answers, out := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- eval.Evaluate(out, nil, nil, strings.NewReader("[]"), in)
		_ = out.Close()
	}()
	buf := make([]byte, 200)
	for range 3 {
		if _, err := io.WriteString(requests, `{"principal":"U::\"a\"","action":"Action::\"v\"","resource":"P::\"p\""}`+"\n"); err != nil {
			t.Fatal(err)
		}
		if n, err := answers.Read(buf); err != nil || !strings.Contains(string(buf[:n]), `"deny"`) {
			t.Fatal(string(buf[:n]), err)
		}
	}
	_ = requests.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestEvaluateReportsAFailedWriter(t *testing.T) {
	t.Parallel()
	err := eval.Evaluate(brokenWriter{}, nil, nil, strings.NewReader("[]"),
		strings.NewReader(`{"principal":"U::\"a\"","action":"Action::\"v\"","resource":"P::\"p\""}`))
	if !errors.Is(err, errBroken) {
		t.Errorf("got %v", err)
	}
}

var errBroken = errors.New("broken pipe")

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func FuzzEvaluate(f *testing.F) {
	f.Add(photoSchema, photoPolicies, photoEntities, `{"principal":"User::\"ann\"","action":{"type":"Action","id":"view"},"resource":"Photo::\"p\"","context":{"from":"10.1.1.1"}}`)
	f.Add("", "permit(principal,action,resource);", "[]", `{"principal":"U::\"\u0000\"","action":"A::\"\"","resource":"P::\"p\""}`)
	f.Fuzz(func(t *testing.T, schema, policies, entities, requests string) {
		_, err := evaluate(t, schema, policies, entities, requests)
		if err != nil && refusal.As(err) == nil {
			t.Errorf("not a refusal: %v", err)
		}
	})
}
