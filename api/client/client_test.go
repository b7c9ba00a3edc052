package client_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// over serves a handler over TLS and returns a client of it.
func over(t testing.TB, handler http.Handler, change func(*client.Config)) *client.Client {
	t.Helper()
	srv := httptest.NewTLSServer(handler)
	t.Cleanup(srv.Close)
	cfg := client.Config{Base: srv.URL, Roots: pemOf(srv), Credential: "ro1.test"}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func pemOf(srv *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
}

// The client has a method for every operation, and none of its URLs carries a secret.
func TestEveryOperationHasItsMethod(t *testing.T) {
	h := apitest.New(t)
	inner := h.Handler(t)
	var mu sync.Mutex
	var urls []string
	c := over(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		urls = append(urls, r.URL.String())
		mu.Unlock()
		inner.ServeHTTP(w, r)
	}), func(cfg *client.Config) { cfg.Credential = client.Credential(h.Secret) })
	ctx := t.Context()
	var token client.Token
	ok := func(name string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	refused := func(name string, err error, code string) {
		t.Helper()
		if r := refusal.As(err); r == nil || r.Code != code {
			t.Errorf("%s: %v, want %s", name, err, code)
		}
	}
	_, err := c.Status(ctx)
	ok("Status", err)
	_, err = c.ListProtections(ctx, client.ProtectionFilter{State: "enforced"}, client.Paging{})
	ok("ListProtections", err)
	token, err = c.CreateToken(ctx, client.TokenRequest{Machine: "m1", ExpiresIn: client.Duration(5 * time.Minute)})
	ok("CreateToken", err)
	if _, err := fleet.ParseJoinSecret(token.Secret); err != nil || strings.Contains(fmt.Sprintf("%v %+v %#v", token, token, token), token.Secret) {
		t.Errorf("the token: %v; formatted %v", err, token)
	}
	_, err = c.ListTokens(ctx, client.Paging{Limit: 5})
	ok("ListTokens", err)
	ok("DeleteToken", c.DeleteToken(ctx, token.ID))
	_, err = c.ListMachines(ctx, client.Paging{})
	ok("ListMachines", err)
	_, err = c.Machine(ctx, "no such/machine?")
	refused("Machine", err, "unknown-id")
	_, err = c.RevokeMachine(ctx, "m9", "gone")
	refused("RevokeMachine", err, "unknown-id")
	_, err = c.ListWorkloads(ctx, client.WorkloadFilter{Service: "orders", State: "present"}, client.Paging{})
	ok("ListWorkloads", err)
	_, err = c.Workload(ctx, "w-1")
	refused("Workload", err, "unknown-id")
	facts, _ := identity.NewFactSet(identity.Fact{Name: identity.FactService, Value: "orders", Source: identity.FromOperator})
	explained, err := c.ExplainIdentity(ctx, client.ExplainRequest{Facts: facts})
	ok("ExplainIdentity", err)
	if explained.ID.String() != "spiffe://test.redoubt/service/orders" || len(explained.Issuance.Rules) == 0 {
		t.Errorf("explained: %+v", explained)
	}
	_, err = c.ExplainIdentity(ctx, client.ExplainRequest{Name: "orders", Instance: "w-1"})
	refused("ExplainIdentity", err, "invalid-request")
	edition, etag, err := c.PolicySet(ctx)
	ok("PolicySet", err)
	if edition.Version != 0 || etag == "" {
		t.Errorf("%+v %s", edition, etag)
	}
	files := []set.File{{Name: "a.cedar", Content: "@id(\"a\")\npermit(principal, action == Net::Action::\"connect\", resource);"}}
	diff, err := c.DiffPolicySet(ctx, files)
	ok("DiffPolicySet", err)
	if len(diff.Changes) != 1 {
		t.Errorf("diff %+v", diff)
	}
	applied, err := c.ApplyPolicySet(ctx, client.ApplyRequest{Files: files, ConfirmWithin: client.Duration(time.Minute), Note: "first"}, etag)
	ok("ApplyPolicySet", err)
	if applied.Edition.State != set.EditionPending {
		t.Errorf("applied %+v", applied.Edition)
	}
	_, err = c.ApplyPolicySet(ctx, client.ApplyRequest{Files: files}, etag)
	refused("ApplyPolicySet", err, "if-match-failed")
	_, err = c.ConfirmPolicySet(ctx, 1)
	ok("ConfirmPolicySet", err)
	_, err = c.RollbackPolicySet(ctx, client.RollbackRequest{To: 0}, etag)
	refused("RollbackPolicySet of another version than was read", err, "if-match-failed")
	_, err = c.RollbackPolicySet(ctx, client.RollbackRequest{To: 0}, "")
	refused("RollbackPolicySet of no version", err, "if-match-required")
	_, etag, err = c.PolicySet(ctx)
	ok("PolicySet", err)
	_, err = c.RollbackPolicySet(ctx, client.RollbackRequest{To: 0}, etag)
	ok("RollbackPolicySet", err)
	_, err = c.ListPolicySets(ctx, client.Paging{})
	ok("ListPolicySets", err)
	_, err = c.PolicySetVersion(ctx, 1)
	ok("PolicySetVersion", err)
	_, err = c.DiffPolicySetVersions(ctx, 0, 1)
	ok("DiffPolicySetVersions", err)
	o, err := c.Observe(ctx, client.ObserveRequest{Selector: set.Selector{All: true}, ExpiresIn: client.Duration(time.Hour)})
	ok("Observe", err)
	_, err = c.ListObservations(ctx, client.Paging{})
	ok("ListObservations", err)
	ok("EndObserve", c.EndObserve(ctx, o.ID))
	decision, err := c.Ask(ctx, client.AskRequest{
		Principal: client.AskEntity{UID: policy.UID{Type: "User", ID: "eve"}}, Action: policy.Action(policy.Access, "administer"),
		Resource: client.AskEntity{UID: policy.UID{Type: "Operation", ID: "get-status"}},
		Context:  map[string]json.RawMessage{"source": json.RawMessage(`{"__extn":{"fn":"ip","arg":"192.0.2.1"}}`)},
	})
	ok("Ask", err)
	if decision.Verdict != policy.Deny || decision.Explanation.Reason == policy.ReasonError {
		t.Errorf("asked: %+v", decision)
	}
	for range 100 {
		if _, err = c.Decision(ctx, decision.ID); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond) // recorded in its own time
	}
	ok("Decision", err)
	_, err = c.ListDecisions(ctx, client.DecisionFilter{Verdict: "deny", Layer: "access"}, client.Paging{})
	ok("ListDecisions", err)
	_, err = c.ListEvents(ctx, client.EventFilter{Layer: "access", Since: time.Now().Add(-time.Hour)}, client.Paging{})
	ok("ListEvents", err)
	_, err = c.Authority(ctx)
	ok("Authority", err)
	_, err = c.PrepareAuthority(ctx)
	ok("PrepareAuthority", err)
	_, err = c.PublishAuthority(ctx)
	ok("PublishAuthority", err)
	_, err = c.ActivateAuthority(ctx)
	if refusal.As(err) == nil {
		t.Errorf("ActivateAuthority too early: %v", err)
	}
	_, err = c.RetireAuthority(ctx)
	if refusal.As(err) == nil {
		t.Errorf("RetireAuthority too early: %v", err)
	}
	bundle, err := c.Bundle(ctx, apitest.TrustDomain)
	ok("Bundle", err)
	if err == nil && (len(bundle.X509Authorities) == 0 || len(bundle.JWTAuthorities) == 0) {
		t.Errorf("bundle %+v", bundle)
	}
	r, err := c.Revoke(ctx, client.RevocationRequest{SPKI: strings.Repeat("ab", 32), Reason: "leaked", ExpiresIn: client.Duration(time.Hour)})
	ok("Revoke", err)
	_, err = c.ListRevocations(ctx, client.Paging{})
	ok("ListRevocations", err)
	ok("LiftRevocation", c.LiftRevocation(ctx, r.ID))
	q, err := c.Quarantine(ctx, client.QuarantineRequest{Identity: "spiffe://test.redoubt/service/x", Reason: "odd"})
	ok("Quarantine", err)
	_, err = c.ListQuarantines(ctx, client.Paging{})
	ok("ListQuarantines", err)
	ok("LiftQuarantine", c.LiftQuarantine(ctx, q.ID))
	log, err := c.Audit(ctx)
	ok("Audit", err)
	if log.Checkpoint == "" || log.Verifier == "" || log.Size == 0 {
		t.Errorf("audit %+v", log)
	}

	raw, err := c.OpenAPI(ctx)
	ok("OpenAPI", err)
	var doc struct {
		Paths map[string]map[string]struct{ OperationID string }
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{"get-bundle": true}
	for _, q := range h.Engine.Asked() {
		used[q.Resource.UID.ID] = true
	}
	n := 0
	for _, methods := range doc.Paths {
		for _, op := range methods {
			if n++; !used[op.OperationID] {
				t.Errorf("the client has not called %s", op.OperationID)
			}
		}
	}
	if n < 30 {
		t.Errorf("%d operations only", n)
	}
	for _, u := range urls {
		if strings.Contains(u, token.Secret) || strings.Contains(u, h.Secret) {
			t.Errorf("a secret in URL %s", u)
		}
	}
	if text := h.Log.String(); strings.Contains(text, token.Secret) || strings.Contains(text, h.Secret) {
		t.Error("a secret in the server's log")
	}
}

func TestIteratorsGoThroughAllPages(t *testing.T) {
	h := apitest.New(t)
	c := over(t, h.Handler(t), func(cfg *client.Config) { cfg.Credential = client.Credential(h.Secret) })
	for i := range 503 {
		if _, _, err := h.Fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: fmt.Sprint("m", i)}, event.NewRecord("t", "t", "t")); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for _, err := range c.Tokens(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 503 {
		t.Errorf("%d of 503", n)
	}
	for range c.Tokens(t.Context()) {
		break // early end
	}
	iterators := map[string]func(context.Context) error{
		"Machines": func(ctx context.Context) error { return first(c.Machines(ctx)) }, "PolicySets": func(ctx context.Context) error { return first(c.PolicySets(ctx)) },
		"Workloads":    func(ctx context.Context) error { return first(c.Workloads(ctx, client.WorkloadFilter{})) },
		"Revocations":  func(ctx context.Context) error { return first(c.Revocations(ctx)) },
		"Quarantines":  func(ctx context.Context) error { return first(c.Quarantines(ctx)) },
		"Observations": func(ctx context.Context) error { return first(c.Observations(ctx)) },
		"Decisions":    func(ctx context.Context) error { return first(c.Decisions(ctx, client.DecisionFilter{})) },
		"Events":       func(ctx context.Context) error { return first(c.Events(ctx, client.EventFilter{})) },
		"Protections":  func(ctx context.Context) error { return first(c.Protections(ctx, client.ProtectionFilter{})) },
	}
	for name, iterate := range iterators {
		if err := iterate(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	h.Engine.Answer(policy.Deny, policy.Enforce)
	for name, iterate := range iterators {
		if r := refusal.As(iterate(t.Context())); r == nil || r.Kind != refusal.Denied || r.Decision == "" {
			t.Errorf("%s of one who may not: %v", name, r)
		}
	}
}

func first[T any](seq func(func(T, error) bool)) (err error) {
	seq(func(_ T, e error) bool { err = e; return false })
	return err
}

func TestRefusalsComeBackWhole(t *testing.T) {
	h := apitest.New(t)
	c := over(t, h.Handler(t), func(cfg *client.Config) { cfg.Credential = client.Credential(h.Secret) })
	_, err := c.ApplyPolicySet(t.Context(), client.ApplyRequest{Files: []set.File{
		{Name: "a.cedar", Content: "permit(principal"}, {Name: "b.yaml", Content: "kind: Nothing\n"},
	}}, "*")
	var p *client.Problem
	if !errors.As(err, &p) || len(p.Refusals()) < 2 || p.Status != 422 {
		t.Fatalf("%v %+v", err, p)
	}
	h.Engine.Answer(policy.Deny, policy.Enforce)
	_, err = c.Status(t.Context())
	if r := refusal.As(err); r == nil || r.Decision == "" || r.Do == "" || !errors.As(err, &p) || p.Explanation == nil {
		t.Errorf("%+v", err)
	}
}

func TestTheServerIsPinned(t *testing.T) {
	ok := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"version":"x"}`) })
	other := httptest.NewUnstartedServer(ok)
	other.StartTLS()
	defer other.Close()
	h := apitest.New(t)
	var foreign []byte
	for _, cert := range h.Authority.Bundle().X509Authorities {
		foreign = append(foreign, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	for name, change := range map[string]func(*client.Config){
		"another authority": func(c *client.Config) { c.Roots = foreign },
		"another name":      func(c *client.Config) { c.ServerName = "elsewhere.example" },
	} {
		_, err := over(t, ok, change).Status(t.Context())
		if !errors.Is(err, client.ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := over(t, ok, nil).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h := apitest.New(t)
	srv := &http.Server{Handler: h.Handler(t), ReadHeaderTimeout: time.Second}
	go srv.Serve(l)
	defer srv.Close()
	c, err := client.New(client.Config{Base: "unix://" + path, Credential: client.Credential(h.Secret)})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Status(t.Context()); err != nil || got.Version != "v0.0.0-test" {
		t.Errorf("%+v %v", got, err)
	}
	n := 0
	for range c.Events(t.Context(), client.EventFilter{}) {
		n++
	}
	none, err := client.New(client.Config{Base: "unix://" + path, Credential: "ro1.wrong"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.Status(t.Context()); refusal.As(err) == nil || refusal.As(err).Kind != refusal.Unproven {
		t.Errorf("the socket alone must not be enough: %v", err)
	}
}

func TestConfigIsStrict(t *testing.T) {
	roots := pemOf(httptest.NewTLSServer(nil))
	for _, cfg := range []client.Config{
		{},
		{Base: "http://localhost:1", Roots: roots},
		{Base: "https://localhost:1"},
		{Base: "https://", Roots: roots},
		{Base: "https://u:p@localhost:1", Roots: roots},
		{Base: "https://localhost:1/?a=b", Roots: roots},
		{Base: "https://h/path", Roots: roots},
		{Base: "unix://"},
		{Base: "unix://host/x"},
		{Base: "https://localhost:1", Roots: []byte("no PEM")},
		{Base: "::"},
	} {
		if _, err := client.New(cfg); !errors.Is(err, client.ErrConfig) {
			t.Errorf("%q: %v", cfg.Base, err)
		}
	}
}

func TestCredentialRedactsItself(t *testing.T) {
	c := client.Credential("ro1.topsecret")
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "credential", c)
	text, _ := json.Marshal(client.Config{Credential: c})
	for _, got := range []string{fmt.Sprintf("%v %+v %#v %s", c, c, c, c), fmt.Sprintf("%+v %#v", client.Config{Credential: c}, client.Config{Credential: c}), string(text), log.String()} {
		if strings.Contains(got, "topsecret") {
			t.Errorf("shown in %s", got)
		}
	}
}

// A client does not carry its credential to where a server sends it.
func TestRedirectsAreNotFollowed(t *testing.T) {
	var reached bool
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer elsewhere.Close()
	c := over(t, http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect), nil)
	if _, err := c.Status(t.Context()); err == nil || reached {
		t.Errorf("%v, reached %v", err, reached)
	}
}

func TestAnswersThatAreNoneOfThisAPI(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"HTML":    func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502); _, _ = io.WriteString(w, "<html>") },
		"no JSON": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") },
		"empty problem": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(500)
			_, _ = io.WriteString(w, "{}")
		},
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			chunk := []byte(strings.Repeat(" ", 1<<20))
			for range 70 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		},
	} {
		_, err := over(t, handler, nil).Status(t.Context())
		if err == nil || refusal.As(err) != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What creates something is sent again under the same key if no answer came; what merely changes something is not.
func TestRepetition(t *testing.T) {
	var mu sync.Mutex
	var keys []string
	calls := map[string]int{}
	c := over(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		calls[r.Method+r.URL.Path]++
		keys = append(keys, r.Header.Get("Idempotency-Key"))
		if calls[r.Method+r.URL.Path] == 1 {
			panic(http.ErrAbortHandler) // the connection breaks
		}
		_, _ = io.WriteString(w, "{}")
	}), nil)
	if _, err := c.CreateToken(t.Context(), client.TokenRequest{Machine: "m1"}); err != nil {
		t.Error(err)
	}
	if len(keys) != 2 || keys[0] != keys[1] || len(keys[0]) < 20 {
		t.Errorf("keys %v", keys)
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.RollbackPolicySet(t.Context(), client.RollbackRequest{}, "*"); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if err := c.DeleteToken(t.Context(), "t-1"); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if !slices.Equal([]int{calls["POST/v1/join-tokens"], calls["GET/v1/status"], calls["POST/v1/policy-set/rollback"], calls["DELETE/v1/join-tokens/t-1"]}, []int{2, 2, 1, 1}) {
		t.Errorf("calls %v", calls)
	}
}

func TestUnreachable(t *testing.T) {
	srv := httptest.NewTLSServer(nil)
	roots, base := pemOf(srv), srv.URL
	srv.Close()
	c, err := client.New(client.Config{Base: base, Roots: roots, Credential: "ro1.secret-in-header"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.ListWorkloads(t.Context(), client.WorkloadFilter{Service: "orders"}, client.Paging{})
	r := refusal.As(err)
	if !errors.Is(err, client.ErrUnreachable) || r.Kind != refusal.Unavailable || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "orders") {
		t.Errorf("%v", err)
	}
	slow := over(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }), func(c *client.Config) { c.Timeout = 50 * time.Millisecond })
	if _, err := slow.Status(t.Context()); !errors.Is(err, client.ErrUnreachable) || !strings.Contains(err.Error(), "in time") {
		t.Errorf("%v", err)
	}
}
