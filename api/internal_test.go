package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestSourcesOfWrongCredentialsAreBounded(t *testing.T) {
	now := time.Unix(0, 0)
	g := newGuesses(func() time.Time { return now })
	wrong := errors.New("wrong")
	for i := range maxSources + 100 {
		_ = g.wrong(fmt.Sprint("s", i), wrong)
	}
	if len(g.sources) != maxSources+1 {
		t.Errorf("%d sources kept", len(g.sources))
	}
	if err := g.wrong("one more", wrong); errors.Is(err, wrong) {
		t.Error("sources beyond the bound share one allowance, which is used up")
	}
	if err := g.wrong("s0", wrong); !errors.Is(err, wrong) {
		t.Error("a source that is known keeps its own")
	}
	now = now.Add(sourceIdle)
	if err := g.wrong("one more", wrong); !errors.Is(err, wrong) {
		t.Error("allowances fill again")
	}
	if len(g.sources) != 2 && len(g.sources) != 1 {
		t.Errorf("%d sources kept after all were idle", len(g.sources))
	}
	for range guessBurst {
		_ = g.wrong("a", wrong)
	}
	if errors.Is(g.wrong("a", wrong), wrong) {
		t.Error("the allowance is not used up")
	}
	now = now.Add(guessRefill)
	if !errors.Is(g.wrong("a", wrong), wrong) || errors.Is(g.wrong("a", wrong), wrong) {
		t.Error("one more after the refill, and no second one")
	}
}

func TestSources(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.7:4711": "192.0.2.7", "[::ffff:192.0.2.7]:1": "192.0.2.7", "[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1": "fe80::/64", "@": "unix", "": "unix", "/run/x.sock": "unix",
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = remote
		r.Header.Set("X-Forwarded-For", "203.0.113.9")
		if got := sourceOf(r); got != want {
			t.Errorf("%s: %s, want %s", remote, got, want)
		}
	}
}

func TestAnswersKeptAreBounded(t *testing.T) {
	now := time.Unix(0, 0)
	a := newAnswers(func() time.Time { return now })
	for i := range maxKeys {
		if _, err := a.begin(fmt.Sprint("k", i), nil); err != nil {
			t.Fatal(err)
		}
		a.keep(fmt.Sprint("k", i), &answer{status: 201})
	}
	if _, err := a.begin("one more", nil); refusal.As(err) == nil || refusal.As(err).Code != codeKeysFull {
		t.Errorf("beyond the bound: %v", err)
	}
	if before, err := a.begin("k0", nil); err != nil || before == nil {
		t.Errorf("a full store must not forget: %v %v", before, err)
	}
	now = now.Add(keyLife)
	if before, err := a.begin("k0", nil); err != nil || before != nil {
		t.Errorf("after its life: %v %v", before, err)
	}
	if _, err := a.begin("k0", nil); refusal.As(err) == nil || refusal.As(err).Code != codeKeyBusy {
		t.Errorf("while the first is in work: %v", err)
	}
	if _, err := a.begin("one more", nil); err != nil || len(a.kept) != 2 {
		t.Errorf("after all have ended: %v, %d kept", err, len(a.kept))
	}
	a.keep("k0", &answer{body: make([]byte, maxKeptAnswer+1)})
	if _, err := a.begin("k0", nil); refusal.As(err) == nil || refusal.As(err).Code != codeKeyBusy {
		t.Errorf("an answer too large to keep: %v", err)
	}
	a.release("one more")
	if before, err := a.begin("one more", []byte("other body")); err != nil || before != nil {
		t.Errorf("after a refusal: %v %v", before, err)
	}
}

func FuzzParseMatch(f *testing.F) {
	for _, s := range []string{`*`, `"a"`, `W/"a", "b"`, `"a","b"`, ``, `,`, `"`, `"a" "b"`, `W/"`, `"a",*`, " \t\"x\"\t", `"` + "\x7f" + `"`} {
		f.Add(s, "a")
	}
	f.Fuzz(func(t *testing.T, header, current string) {
		m, err := parseMatch("If-Match", []string{header})
		if err != nil {
			if r := refusal.As(err); r == nil || r.Code != codeBadTag {
				t.Fatalf("error %v", err)
			}
			return
		}
		if m.absent() || len(m.tags) > maxMatchTags {
			t.Fatalf("%q parsed as %+v", header, m)
		}
		if m.strong(current) && !m.loose(current) {
			t.Fatalf("%q matches %q strongly but not weakly", header, current)
		}
		if !m.any && m.strong(current) && !strings.Contains(header, quote(current)) {
			t.Fatalf("%q matches %q", header, current)
		}
		var again []string // what was understood, said again, is understood alike
		for _, x := range m.tags {
			text := quote(x.opaque)
			if x.weak {
				text = "W/" + text
			}
			again = append(again, text)
		}
		if m.any {
			again = []string{"*"}
		}
		if n, err := parseMatch("If-Match", again); err != nil || fmt.Sprint(n) != fmt.Sprint(m) {
			t.Fatalf("%q: %+v then %+v, %v", header, m, n, err)
		}
	})
}

func FuzzDecodeCursor(f *testing.F) {
	for _, s := range []string{"", "AAAA", encodeCursor("list", "p"), encodeCursor("other", "p"), encodeCursor("list", ""), "====", strings.Repeat("A", 2000)} {
		f.Add(s, "list")
	}
	f.Fuzz(func(t *testing.T, cursor, list string) {
		position, err := decodeCursor(list, cursor)
		if err != nil {
			if r := refusal.As(err); r == nil || r.Code != codeBadCursor || position != "" {
				t.Fatalf("%q, %v", position, err)
			}
		} else if cursor != "" && encodeCursor(list, position) != cursor {
			t.Fatalf("%q is taken, and is not what this server makes", cursor)
		}
		if _, err := numberCursor(list, cursor, 7); err != nil && refusal.As(err) == nil {
			t.Fatal(err)
		}
		if p := position; err == nil && p != "" && len(p) < 500 {
			if got, err := decodeCursor(list, encodeCursor(list, p)); err != nil || got != p {
				t.Fatalf("%q comes back as %q, %v", p, got, err)
			}
		}
	})
}

func FuzzCheckJSON(f *testing.F) {
	for _, s := range []string{`{}`, `[1,{"a":null}]`, `{"a":1,"A":2}`, `{"a":1}x`, `{"\u0061":1,"a":2}`, `{"ſ":1,"s":2}`, `[`, `"x`, `{"a"}`, `1e999`, strings.Repeat("[", 80)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		err := checkJSON(body)
		if err == nil && len(body) > 0 && !json.Valid(body) {
			t.Fatalf("%q passes and is not JSON", body)
		}
		if err != nil && (refusal.As(err) == nil || len(body) > 40 && strings.Contains(err.Error(), string(body))) {
			t.Fatalf("%q: %v", body, err)
		}
	})
}

func FuzzAskedRequest(f *testing.F) {
	f.Add([]byte(`{"principal":{"uid":{"type":"Workload","id":"w"},"attrs":{"a":[1,true,"x",{"b":{"__entity":{"type":"T","id":"i"}}}]}},"action":{"type":"Net::Action","id":"connect"},"resource":{"uid":{"type":"Service","id":"s"},"tags":{"a":"b"}},"context":{"ip":{"__extn":{"fn":"ip","arg":"10.0.0.0/8"}},"at":{"__extn":{"fn":"datetime","arg":"2026-11-22"}}}}`))
	f.Add([]byte(`{"action":{"type":"Net::Action","id":"x"},"context":{"a":null,"b":1.5,"c":{"__extn":{}}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var in client.AskRequest
		if json.Unmarshal(body, &in) != nil {
			return
		}
		if _, err := askedRequest(in); err != nil && refusal.As(err) == nil {
			t.Fatal(err)
		}
	})
}

func TestAskedValues(t *testing.T) {
	in := client.AskRequest{
		Principal: client.AskEntity{UID: policy.UID{Type: "Workload", ID: "w"}}, Action: policy.Action(policy.Net, "connect"),
		Resource: client.AskEntity{UID: policy.UID{Type: "Service", ID: "s"}},
	}
	if _, err := askedRequest(in); err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"null": `null`, "fraction": `1.5`, "too large": `99999999999999999999`, "unknown extension": `{"__extn":{"fn":"decimal","arg":"1.0"}}`,
		"no address": `{"__extn":{"fn":"ip","arg":"x"}}`, "zone": `{"__extn":{"fn":"ip","arg":"fe80::1%eth0"}}`, "entity without type": `{"__entity":{"id":"x"}}`,
		"too deep": strings.Repeat("[", 20) + strings.Repeat("]", 20),
	} {
		in.Context = map[string]json.RawMessage{"x": json.RawMessage(raw)}
		if _, err := askedRequest(in); refusal.As(err) == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	in.Context = map[string]json.RawMessage{"x": json.RawMessage(`{"a":[1,true,"s",{"__entity":{"type":"T","id":"i"}},{"__extn":{"fn":"ip","arg":"10.1.2.3"}}]}`)}
	got, err := askedRequest(in)
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(got.Context); text != `map[x:map[a:[1 true s T::"i" 10.1.2.3]]]` {
		t.Error(text)
	}
	for _, action := range []policy.UID{{}, {Type: "Net", ID: "connect"}, {Type: "Foo::Action", ID: "x"}, {Type: "Net::Action"}, {Type: "Net::X", ID: "y"}} {
		in.Action = action
		if _, err := askedRequest(in); err == nil {
			t.Errorf("action %v is taken", action)
		}
	}
}

// huma ends the messages of some formats with the parser's own words, which repeat the value.
func TestMessagesArePlain(t *testing.T) {
	for message, want := range map[string]string{
		`expected string to be RFC 3986 uri: parse "se:cret": bad`: "expected string to be RFC 3986 uri",
		`expected duration: time: invalid duration "secret"`:       "expected duration",
		"invalid value: secret":                                    "invalid value",
		"expected string to be regex: secret":                      "expected string to be regex",
		"expected string to match pattern ^a:b$":                   "expected string to match pattern ^a:b$",
	} {
		if got := plain(message); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestRecordablePaths(t *testing.T) {
	for path, want := range map[string]string{
		"/v1/machines/m1": "/v1/machines/m1", "/v1/machines/rj1.t-x.SECRET": "/v1/machines/*", "/v1/machines/a/b": "/v1/machines/{id}",
		"/v1/machines/" + strings.Repeat("a", 64): "/v1/machines/*", "/v1/machines/-": "/v1/machines/*",
	} {
		if got := recordable("/v1/machines/{id}", path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

func BenchmarkCheckJSON(b *testing.B) {
	body := bytes.Repeat([]byte(`{"name":"a.cedar","content":"permit(principal, action, resource);"},`), 1000)
	body = append(append([]byte(`{"files":[`), body[:len(body)-1]...), "]}"...)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if err := checkJSON(body); err != nil {
			b.Fatal(err)
		}
	}
}
