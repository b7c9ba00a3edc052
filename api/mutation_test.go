package api_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

const permitAll = `{"files":[{"name":"a.cedar","content":"@id(\"all\")\npermit(principal, action == Net::Action::\"connect\", resource);"}]%s}`

// changes makes one request of every operation that changes something. Each returns its operation's id and the answer.
func changes(t *testing.T, s *site) map[string]reply {
	t.Helper()
	out := map[string]reply{}
	do := func(id, method, path, body string, headers ...string) reply {
		out[id] = s.call(method, path, body, headers...)
		return out[id]
	}
	join(t, s.House, "m1")
	tokenID := into[client.Token](t, do("create-join-token", "POST", "/v1/join-tokens", `{"machine":"m2","expires_in":"PT5M"}`)).ID
	do("delete-join-token", "DELETE", "/v1/join-tokens/"+tokenID, "")
	do("revoke-machine", "POST", "/v1/machines/m1/revoke", `{"reason":"stolen"}`)
	revocation := into[fleet.Revocation](t, do("create-revocation", "POST", "/v1/revocations", `{"identity":"spiffe://test.redoubt/service/x","reason":"leaked"}`))
	do("delete-revocation", "DELETE", "/v1/revocations/"+revocation.ID, "")
	quarantine := into[fleet.Quarantine](t, do("create-quarantine", "POST", "/v1/quarantines", `{"identity":"spiffe://test.redoubt/service/x","reason":"odd","expires_in":"PT1H"}`))
	do("delete-quarantine", "DELETE", "/v1/quarantines/"+quarantine.ID, "")
	observation := into[set.Override](t, do("create-observation", "POST", "/v1/observations", `{"service":"orders","expires_in":"PT10M","note":"incident 7"}`))
	do("delete-observation", "DELETE", "/v1/observations/"+observation.ID, "")
	tag := s.call("GET", "/v1/policy-set", "").header.Get("ETag")
	do("apply-policy-set", "PUT", "/v1/policy-set", fmt.Sprintf(permitAll, `,"confirm_within":"PT5M"`), "If-Match", tag)
	do("confirm-policy-set", "POST", "/v1/policy-set/confirm", `{"version":1}`)
	do("rollback-policy-set", "POST", "/v1/policy-set/rollback", `{"to":0}`, "If-Match", "*")
	do("prepare-authority", "POST", "/v1/authority/prepare", "")
	do("publish-authority", "POST", "/v1/authority/publish", "")
	return out
}

// The operations that change nothing although they do not read with GET, and those whose change needs time to pass.
var (
	harmless = []string{"ask-decision", "explain-identity", "diff-policy-set"}
	later    = []string{"activate-authority", "retire-authority"}
)

// Fails if tell no longer waits, or if an operation does not hand its record on.
func TestEveryChangeIsAnsweredAfterItsRecord(t *testing.T) {
	s := serve(t)
	done := changes(t, s)
	for _, op := range s.operations() {
		if op.Method == "GET" || slices.Contains(harmless, op.ID) || slices.Contains(later, op.ID) {
			continue
		}
		if r, ok := done[op.ID]; !ok || r.status > 299 {
			t.Errorf("%s: tried %v, %d %s", op.ID, ok, r.status, r.body)
		}
	}
	waited := s.Audit.Waited()
	if len(waited) != len(done) {
		t.Errorf("%d changes, %d records waited for", len(done), len(waited))
	}
	for _, rec := range s.Audit.Records() {
		if !slices.Contains(waited, rec.ID) {
			continue // the test's own, or the authority's first keys
		}
		if rec.Actor != `User::"operator"` || rec.Action == "" || rec.Object == "" || rec.Decision == "" || rec.Detail["request"] == "" {
			t.Errorf("record %+v", rec)
		}
	}
}

func TestChangeThatIsNotInTheLogYet(t *testing.T) {
	s := serve(t)
	s.Audit.FailWait(errors.New("disk on fire at /dev/sda"))
	r := s.call("POST", "/v1/join-tokens", `{"machine":"m2"}`, "Idempotency-Key", "k1")
	if p := r.problem(t); r.status != 503 || p.Code != "not-yet-in-audit-log" || strings.Contains(r.body, "sda") || strings.Contains(r.body, "rj1.") {
		t.Errorf("%d %s", r.status, r.body)
	}
	s.Audit.FailWait(nil)
	if again := s.call("POST", "/v1/join-tokens", `{"machine":"m2"}`, "Idempotency-Key", "k1"); again.status != 503 {
		t.Errorf("the key of a change that was made must not make it again: %d", again.status)
	}
	if page := into[client.Page[fleet.JoinToken]](t, s.call("GET", "/v1/join-tokens", "")); len(page.Items) != 1 {
		t.Errorf("%d tokens", len(page.Items))
	}
}

// Fails if act no longer asks the log first.
func TestNoChangeIsBegunWhenTheLogIsFull(t *testing.T) {
	s := serve(t)
	s.Audit.RefuseChanges(&refusal.Error{Kind: refusal.Unavailable, Code: "disk-full", What: "change", Why: "the disk is full"})
	for _, op := range s.operations() {
		if op.Method == "GET" || op.ID == "get-bundle" {
			continue
		}
		if r := s.call(op.Method, op.address(), "{}", "If-Match", "*"); r.status != 503 || r.problem(t).Code != "disk-full" {
			t.Errorf("%s: %d %s", op.ID, r.status, r.body)
		}
	}
	if r := s.call("GET", "/v1/machines", ""); r.status != 200 {
		t.Errorf("reading: %d", r.status)
	}
}

func TestPolicySetIsReplacedOnlyBySomebodyWhoSawIt(t *testing.T) {
	s := serve(t)
	first := s.call("GET", "/v1/policy-set", "")
	tag := first.header.Get("ETag")
	if r := s.call("GET", "/v1/policy-set", "", "If-None-Match", tag); r.status != 304 || r.body != "" || r.header.Get("ETag") != tag {
		t.Errorf("If-None-Match: %d %q", r.status, r.body)
	}
	if r := s.call("GET", "/v1/policy-set", "", "If-None-Match", `W/`+tag); r.status != 304 {
		t.Errorf("If-None-Match compares weakly: %d", r.status)
	}
	body := fmt.Sprintf(permitAll, "")
	if r := s.call("PUT", "/v1/policy-set", body); r.status != 428 || r.problem(t).Code != "if-match-required" {
		t.Errorf("without If-Match: %d", r.status)
	}
	for _, wrong := range []string{`"v9"`, `W/` + tag} {
		if r := s.call("PUT", "/v1/policy-set", body, "If-Match", wrong); r.status != 412 || r.problem(t).Code != "if-match-failed" {
			t.Errorf("If-Match %s: %d", wrong, r.status)
		}
	}
	if r := s.call("PUT", "/v1/policy-set", body, "If-Match", "v0"); r.status != 400 {
		t.Errorf("malformed: %d", r.status)
	}
	dry := s.call("PUT", "/v1/policy-set", fmt.Sprintf(permitAll, `,"dry_run":true`), "If-Match", tag)
	if a := into[client.Applied](t, dry); a.Changed || a.Edition.Version != 1 || len(a.Diff.Changes) != 1 || dry.header.Get("ETag") != tag {
		t.Errorf("dry run: %s", dry.body)
	}
	r := s.call("PUT", "/v1/policy-set", body, "If-Match", `"other", `+tag)
	if a := into[client.Applied](t, r); !a.Changed || a.Edition.Version != 1 || a.Edition.Author != `User::"operator"` || r.header.Get("ETag") == tag {
		t.Errorf("apply: %s", r.body)
	}
	if r := s.call("PUT", "/v1/policy-set", body, "If-Match", tag); r.status != 412 {
		t.Errorf("a second time with the old tag: %d", r.status)
	}
	s.Audit.Waited()
	same := s.call("PUT", "/v1/policy-set", body, "If-Match", "*")
	if a := into[client.Applied](t, same); a.Changed || a.Edition.Version != 1 || len(s.Audit.Waited()) != 0 {
		t.Errorf("the same files again: %s", same.body)
	}
	if r := s.call("POST", "/v1/policy-set/rollback", `{"to":0}`, "If-Match", tag); r.status != 412 {
		t.Errorf("rollback with the old tag: %d", r.status)
	}
	if r := s.call("POST", "/v1/policy-set/rollback", `{"to":0}`); r.status != 428 || r.problem(t).Code != "if-match-required" {
		t.Errorf("rollback of whatever is there: %d", r.status)
	}
	if now := into[set.Edition](t, s.call("GET", "/v1/policy-set", "")); now.Version != 1 {
		t.Errorf("a refused rollback made edition %d", now.Version)
	}
	bad := s.call("PUT", "/v1/policy-set", `{"files":[{"name":"a.cedar","content":"permit(principal"},{"name":"b.yaml","content":"kind: Mode\nfoo: 1"}]}`, "If-Match", "*")
	if p := bad.problem(t); bad.status != 422 || len(p.Problems) < 2 || p.Problems[0].Why == "" {
		t.Errorf("defects: %d %s", bad.status, bad.body)
	}
	back := into[client.Applied](t, s.call("POST", "/v1/policy-set/rollback", `{"to":0,"note":"back"}`, "If-Match", s.call("GET", "/v1/policy-set", "").header.Get("ETag")))
	if back.Edition.Version != 2 || back.Edition.Restores != 0 || !back.Changed {
		t.Errorf("rollback: %+v", back.Edition)
	}
	diff := into[set.Diff](t, s.call("GET", "/v1/policy-sets/1/diff?from=2", ""))
	if len(diff.Changes) != 1 || diff.Changes[0].Op != set.Added {
		t.Errorf("diff: %+v", diff)
	}
	if got := into[set.Edition](t, s.call("GET", "/v1/policy-sets/1", "")); len(got.Files) != 1 {
		t.Errorf("edition 1: %+v", got)
	}
	if r := s.call("GET", "/v1/policy-sets/77", ""); r.status != 404 {
		t.Errorf("edition 77: %d", r.status)
	}
}

func TestRepeatedCreationCreatesOnce(t *testing.T) {
	s := serve(t)
	first := s.call("POST", "/v1/join-tokens", `{"machine":"m2"}`, "Idempotency-Key", `"k1"`)
	again := s.call("POST", "/v1/join-tokens", `{"machine":"m2"}`, "Idempotency-Key", "k1")
	if first.status != 201 || again.status != 201 || first.body != again.body {
		t.Errorf("%d %s\n%d %s", first.status, first.body, again.status, again.body)
	}
	if p := s.call("POST", "/v1/join-tokens", `{"machine":"m3"}`, "Idempotency-Key", "k1"); p.status != 422 || p.problem(t).Code != "idempotency-key-reused" {
		t.Errorf("another body: %d", p.status)
	}
	if r := s.call("POST", "/v1/revocations", `{"spki":"`+strings.Repeat("ab", 32)+`","reason":"x"}`, "Idempotency-Key", "k1"); r.status != 201 {
		t.Errorf("another operation has its own keys: %d", r.status)
	}
	// A refusal creates nothing, so its key is free again.
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"NO"}`, "Idempotency-Key", "k2"); r.status != 422 {
		t.Errorf("refused: %d", r.status)
	}
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"m4"}`, "Idempotency-Key", "k2"); r.status != 201 {
		t.Errorf("after a refusal: %d %s", r.status, r.body)
	}
	for _, bad := range []string{strings.Repeat("x", 256), `"open`, `a"b`, "ä", "a, b"} {
		if r := s.call("POST", "/v1/join-tokens", `{"machine":"m5"}`, "Idempotency-Key", bad); r.status != 400 || r.problem(t).Code != "malformed-idempotency-key" {
			t.Errorf("key %q: %d", bad, r.status)
		}
	}
	page := into[client.Page[fleet.JoinToken]](t, s.call("GET", "/v1/join-tokens", ""))
	if len(page.Items) != 2 {
		t.Errorf("%d tokens", len(page.Items))
	}
	if strings.Contains(s.call("GET", "/v1/join-tokens", "").body, "rj1.") {
		t.Error("the list shows secrets")
	}
}

func TestPagesAreCompleteAndCursorsOfThisListOnly(t *testing.T) {
	s := serve(t)
	for i := range 7 {
		_, _, err := s.Fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: fmt.Sprintf("m%d", i)}, event.NewRecord("test", "token", "x"))
		if err != nil {
			t.Fatal(err)
		}
	}
	seen, path, cursor := map[string]bool{}, "/v1/join-tokens?limit=3", ""
	for range 3 {
		r := s.call("GET", path, "")
		page := into[client.Page[fleet.JoinToken]](t, r)
		for _, tok := range page.Items {
			if seen[tok.ID] {
				t.Errorf("%s comes twice", tok.ID)
			}
			seen[tok.ID] = true
		}
		if page.Next == "" {
			if r.header.Get("Link") != "" {
				t.Error("the last page links on")
			}
			break
		}
		link, ok := strings.CutSuffix(r.header.Get("Link"), `>; rel="next"`)
		if !ok {
			t.Fatalf("Link %q", r.header.Get("Link"))
		}
		path, cursor = strings.TrimPrefix(link, "<"), page.Next
	}
	if len(seen) != 7 {
		t.Errorf("%d of 7 tokens", len(seen))
	}
	for _, path := range []string{
		"/v1/machines?cursor=" + cursor, "/v1/join-tokens?cursor=AAAA", "/v1/join-tokens?cursor=" + cursor[:11],
		"/v1/join-tokens?cursor=" + strings.Repeat("A", 1000), "/v1/events?cursor=" + cursor,
	} {
		if r := s.call("GET", path, ""); r.status != 400 || r.problem(t).Code != "malformed-cursor" {
			t.Errorf("%.60s: %d %s", path, r.status, r.body)
		}
	}
	for _, limit := range []string{"0", "501", "-1", "x"} {
		if r := s.call("GET", "/v1/machines?limit="+limit, ""); r.status != 422 {
			t.Errorf("limit %s: %d", limit, r.status)
		}
	}
}
