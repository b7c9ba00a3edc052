package api_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy/set"
)

// The rooms themselves fit the interfaces declared for them.
var (
	_ api.Engine      = (*set.Registry)(nil)
	_ api.PolicySet   = (*set.Registry)(nil)
	_ api.Editions    = (*set.Registry)(nil)
	_ api.Overrides   = (*set.Registry)(nil)
	_ api.Machines    = (*fleet.Fleet)(nil)
	_ api.Tokens      = (*fleet.Fleet)(nil)
	_ api.Workloads   = (*fleet.Fleet)(nil)
	_ api.Withdrawals = (*fleet.Fleet)(nil)
	_ api.Quarantines = (*fleet.Fleet)(nil)
	_ api.Events      = (*fleet.Fleet)(nil)
	_ api.Authority   = (*ca.Authority)(nil)
	_ api.Rotation    = (*ca.Authority)(nil)
	_ api.AuditLog    = (*audit.Log)(nil)
	_ api.Verifier    = (*api.Credentials)(nil)
)

// site is a house whose API is served, without TLS.
type site struct {
	*apitest.House
	url string
	t   testing.TB
}

func serve(t testing.TB, change ...func(*api.Config)) *site {
	t.Helper()
	h := apitest.New(t)
	for _, c := range change {
		c(&h.Config)
	}
	srv := httptest.NewServer(h.Handler(t))
	t.Cleanup(srv.Close)
	return &site{House: h, url: srv.URL, t: t}
}

// reply is an answer, read.
type reply struct {
	status int
	header http.Header
	body   string
}

func (r reply) problem(t testing.TB) client.Problem {
	t.Helper()
	if got := r.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type %q, want application/problem+json; body %s", got, r.body)
	}
	var p client.Problem
	if err := json.Unmarshal([]byte(r.body), &p); err != nil {
		t.Fatalf("no problem: %v in %s", err, r.body)
	}
	if p.Status != r.status || p.Type == "" || p.Title == "" || p.Code == "" || p.Request == "" {
		t.Errorf("incomplete problem (status %d): %s", r.status, r.body)
	}
	return p
}

func into[T any](t testing.TB, r reply) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(r.body), &v); err != nil || r.status > 299 {
		t.Fatalf("status %d, %v: %s", r.status, err, r.body)
	}
	return v
}

// call sends a request as the operator; headers are pairs, and override.
func (s *site) call(method, path, body string, headers ...string) reply {
	s.t.Helper()
	req, err := http.NewRequest(method, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if body != "" {
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Authorization", "Bearer "+s.Secret)
	for i := 0; i+1 < len(headers); i += 2 {
		if req.Header.Del(headers[i]); headers[i+1] != "" {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	return s.send(req)
}

func (s *site) send(req *http.Request) reply {
	s.t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, string(raw)}
}

// described is one operation of the OpenAPI document.
type described struct {
	ID, Method, Path string
	Summary          string                   `json:"summary"`
	Description      string                   `json:"description"`
	OperationID      string                   `json:"operationId"`
	Tags             []string                 `json:"tags"`
	Security         []map[string][]string    `json:"security"`
	RequestBody      *struct{ Required bool } `json:"requestBody"`
	Parameters       []struct {
		Name, In, Description string
		Required              bool
	} `json:"parameters"`
	Responses map[string]struct {
		Description string
		Content     map[string]struct{ Schema map[string]any }
	} `json:"responses"`
}

func (d described) public() bool { return len(d.Security) == 1 && len(d.Security[0]) == 0 }

// path with a value for each parameter.
func (d described) address() string {
	return strings.NewReplacer("{id}", "x-1", "{instance}", "w-1", "{version}", "1").Replace(d.Path)
}

func (s *site) operations() []described {
	s.t.Helper()
	doc := into[struct {
		Paths map[string]map[string]described `json:"paths"`
	}](s.t, s.call("GET", "/v1/openapi.json", ""))
	var out []described
	for path, methods := range doc.Paths {
		for method, op := range methods {
			op.ID, op.Method, op.Path = op.OperationID, strings.ToUpper(method), path
			out = append(out, op)
		}
	}
	if len(out) < 30 {
		s.t.Fatalf("the document has %d operations only: the walk is broken", len(out))
	}
	return out
}

func compact(t testing.TB, v any) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
