package api_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

type claims []policy.Protection

func (c claims) Protections(context.Context) ([]policy.Protection, error) { return c, nil }

func TestProtectionsAreFilteredInPages(t *testing.T) {
	var all claims
	for range 5 {
		all = append(all, policy.Protection{Machine: "m1", Name: "run.confinement", State: policy.Enforced},
			policy.Protection{Machine: "m2", Name: "net.connect", State: policy.NotEnforceable, Reason: "no eBPF"})
	}
	s := serve(t, func(c *api.Config) { c.Protections = all })
	n, path := 0, "/v1/protections?machine=m2&limit=2&state=not+enforceable"
	for range 5 {
		page := into[client.Page[policy.Protection]](t, s.call("GET", path, ""))
		for _, p := range page.Items {
			if n++; p.Machine != "m2" {
				t.Errorf("got %+v", p)
			}
		}
		if page.Next == "" {
			break
		}
		path = "/v1/protections?machine=m2&limit=2&state=not+enforceable&cursor=" + page.Next
	}
	if n != 5 {
		t.Errorf("%d of 5", n)
	}
}

func TestIdentityIsExplainedByInstanceAndName(t *testing.T) {
	s := serve(t)
	join(t, s.House, "m1")
	facts, err := identity.NewFactSet(identity.Fact{Name: identity.FactService, Value: "orders", Source: identity.FromOperator})
	if err != nil {
		t.Fatal(err)
	}
	instance := identity.Unique("w")
	if _, err := s.Fleet.Report(t.Context(), "m1", fleet.Report{Present: []fleet.Observed{{Instance: instance, Facts: facts}}, Full: true}); err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{
		`{"instance":"` + instance + `"}`, `{"name":"` + instance + `"}`, `{"name":"orders"}`, `{"name":"spiffe://test.redoubt/service/orders"}`,
	} {
		got := into[client.Explained](t, s.call("POST", "/v1/identities/explain", body))
		if got.ID.String() != "spiffe://test.redoubt/service/orders" || got.Instance != instance || got.Machine != "m1" || got.Refusal != nil {
			t.Errorf("%s: %+v", body, got)
		}
	}
	for body, want := range map[string]int{
		`{"name":"nobody"}`: 404, `{"instance":"w-1"}`: 404, `{}`: 422, `{"name":"a","instance":"b"}`: 422,
	} {
		if r := s.call("POST", "/v1/identities/explain", body); r.status != want {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
	none := into[client.Explained](t, s.call("POST", "/v1/identities/explain", `{"facts":[{"name":"unix.uid","value":1000,"source":"kernel","epoch":1}]}`))
	if !none.ID.IsZero() || none.Refusal == nil || none.Refusal.Code != set.ErrNoIssuanceRule.Code || len(none.Issuance.Rules) == 0 || none.Issuance.Rules[0].Why == "" {
		t.Errorf("no rule: %+v", none)
	}
	page := into[client.Page[fleet.Workload]](t, s.call("GET", "/v1/workloads?service=orders&machine=m1&state=present&identity=spiffe://test.redoubt/service/orders", ""))
	if len(page.Items) != 1 || page.Items[0].Instance != instance {
		t.Errorf("listed: %+v", page)
	}
	asked := into[policy.Decision](t, s.call("POST", "/v1/decisions", `{"instance":"`+instance+`","principal":{"uid":{"type":"","id":""}},`+
		`"action":{"type":"Net::Action","id":"connect"},"resource":{"uid":{"type":"Service","id":"db"}}}`))
	if asked.Verdict != policy.Deny || asked.Explanation.Reason != policy.ReasonDefault || asked.Request.Point != "ask" || asked.Request.Facts.Len() == 0 {
		t.Errorf("asked about an instance: %+v", asked)
	}
	for _, bad := range []string{
		`{"principal":{"uid":{"type":"User","id":"x"}},"action":{"type":"Foo::Action","id":"x"},"resource":{"uid":{"type":"S","id":"s"}}}`,
		`{"instance":"w-none","principal":{"uid":{"type":"","id":""}},"action":{"type":"Net::Action","id":"connect"},"resource":{"uid":{"type":"S","id":"s"}}}`,
	} {
		if r := s.call("POST", "/v1/decisions", bad); r.status != 422 && r.status != 404 {
			t.Errorf("%s: %d", bad, r.status)
		}
	}
}

func TestStatusSaysWhatToLookAt(t *testing.T) {
	s := serve(t)
	tag := s.call("GET", "/v1/policy-set", "").header.Get("ETag")
	s.call("PUT", "/v1/policy-set", strings.Replace(permitAll, "%s", `,"confirm_within":"PT5M"`, 1), "If-Match", tag)
	s.call("POST", "/v1/observations", `{"all":true}`)
	got := into[client.Status](t, s.call("GET", "/v1/status", ""))
	if len(got.Problems) != 2 || got.Overrides != 1 || got.PolicySet.State != set.EditionPending || got.PolicySet.Version != 1 {
		t.Errorf("%+v", got)
	}
	list := into[client.Page[set.Override]](t, s.call("GET", "/v1/observations", ""))
	if len(list.Items) != 1 || time.Until(list.Items[0].Expires) > time.Hour {
		t.Errorf("%+v", list)
	}
	if r := s.call("POST", "/v1/observations", `{"all":true,"expires_in":"P8D"}`); r.status != 422 {
		t.Errorf("eight days: %d", r.status)
	}
}

func TestEventsInBothOrders(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Sink = nil })
	for _, message := range []string{"a", "b", "c"} {
		record(t, s.House, "k", message)
	}
	for order, want := range map[string]string{"newest": "cba", "oldest": "abc", "": "cba"} {
		got, path := "", "/v1/events?limit=2&order="+order
		for range 3 {
			page := into[client.Page[fleet.StoredEvent]](t, s.call("GET", path, ""))
			for _, e := range page.Items {
				got += e.Event.Message
			}
			if page.Next == "" {
				break
			}
			path = "/v1/events?limit=2&order=" + order + "&cursor=" + page.Next
		}
		if got != want {
			t.Errorf("order %q: %s", order, got)
		}
	}
	if page := into[client.Page[fleet.StoredEvent]](t, s.call("GET", "/v1/events?follow=false&since=2200-01-01T00:00:00Z", "")); len(page.Items) != 0 {
		t.Errorf("since the future: %+v", page)
	}
}

// deadlines remembers what it was told.
type deadlines struct {
	*httptest.ResponseRecorder
	write time.Time
}

func (d *deadlines) SetWriteDeadline(t time.Time) error { d.write = t; return nil }

// Fails if an answer could inherit the deadline of the one before it on the same connection.
func TestEveryAnswerHasItsOwnDeadline(t *testing.T) {
	h := apitest.New(t)
	handler := h.Handler(t)
	for _, path := range []string{"/nope", "/v1/status", "/v1/bundle", "/v1/openapi.json"} {
		w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		handler.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if left := time.Until(w.write); left < time.Second || left > 5*time.Second {
			t.Errorf("%s: %s left for whoever is nobody", path, left)
		}
	}
	w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
	r := httptest.NewRequest("GET", "/v1/status", nil)
	r.Header.Set("Authorization", "Bearer "+h.Secret)
	handler.ServeHTTP(w, r)
	if left := time.Until(w.write); left < 10*time.Second || left > 5*time.Minute {
		t.Errorf("%s left for the operator", left)
	}
}

func TestBoundLimitsHeaders(t *testing.T) {
	srv := &http.Server{}
	api.Bound(srv)
	if srv.ReadHeaderTimeout == 0 || srv.IdleTimeout == 0 || srv.MaxHeaderBytes == 0 || srv.WriteTimeout != 0 {
		t.Errorf("%+v", srv)
	}
}

func BenchmarkGetStatus(b *testing.B) {
	h := apitest.New(b)
	h.Config.Sink = nil
	handler := h.Handler(b)
	r := httptest.NewRequest("GET", "/v1/status", nil)
	r.Header.Set("Authorization", "Bearer "+h.Secret)
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != 200 {
			b.Fatal(w.Code)
		}
	}
}

func BenchmarkRefuseWithoutCredential(b *testing.B) {
	h := apitest.New(b)
	handler := h.Handler(b)
	r := httptest.NewRequest("GET", "/v1/status", nil)
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != 401 {
			b.Fatal(w.Code)
		}
	}
}

func BenchmarkCreateJoinToken(b *testing.B) {
	h := apitest.New(b)
	h.Config.Sink = nil
	h.Config.Tokens = freeTokens{}
	h.Config.Audit = instantAudit{h.Config.Audit}
	handler := h.Handler(b)
	b.ReportAllocs()
	for b.Loop() {
		r := httptest.NewRequest("POST", "/v1/join-tokens", strings.NewReader(`{"machine":"m1","expires_in":"PT5M"}`))
		r.Header.Set("Authorization", "Bearer "+h.Secret)
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != 201 {
			b.Fatal(w.Code, w.Body)
		}
	}
}
