package api_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
)

func TestWhatTheMuxWouldAnswerIsAProblemToo(t *testing.T) {
	s := serve(t)
	for path, want := range map[string]string{
		"GET /": "404 no-such-path", "GET /v1": "404 no-such-path", "GET /v1/": "404 no-such-path", "GET /v2/status": "404 no-such-path",
		"GET //v1/status": "404 no-such-path", "GET /v1/../v1/status": "404 no-such-path", "GET /v1/machines/a/b": "404 no-such-path",
		"GET /v1/status/": "404 no-such-path", "GET /docs": "404 no-such-path", "GET /openapi.json": "404 no-such-path",
		"GET /v1/openapi-3.0.json": "404 no-such-path", "GET /schemas/Problem.json": "404 no-such-path",
		"DELETE /v1/status": "405 method-not-allowed", "PATCH /v1/policy-set": "405 method-not-allowed",
		"OPTIONS /v1/machines": "405 method-not-allowed", "TRACE /v1/status": "405 method-not-allowed", "BREW /v1/status": "405 method-not-allowed",
	} {
		method, p, _ := strings.Cut(path, " ")
		r := s.call(method, p, "", "Authorization", "")
		problem := r.problem(t)
		if got := fmt.Sprint(r.status, " ", problem.Code); got != want || r.header.Get("X-Request-ID") != problem.Request {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
		if r.status == 405 && r.header.Get("Allow") == "" {
			t.Errorf("%s: no Allow", path)
		}
	}
	if r := s.call("HEAD", "/v1/status", ""); r.status != 200 || r.body != "" || r.header.Get("ETag") == "" {
		t.Errorf("HEAD: %d %q", r.status, r.body)
	}
}

// broken panics when asked for machines.
type machines = api.Machines

type broken struct{ machines }

func (broken) Machines(context.Context, string, int) ([]fleet.Machine, error) {
	panic("at /root/secret.go:7")
}

func (broken) Machine(context.Context, string) (fleet.Machine, error) {
	return fleet.Machine{}, errors.New("sql: no such table: machines_v9")
}

func TestPanicsAndFailuresShowAnIDAndNothingElse(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Machines = broken{c.Machines} })
	for path, inside := range map[string]string{"/v1/machines": "secret.go", "/v1/machines/m1": "machines_v9"} {
		r := s.call("GET", path, "", "X-Request-ID", "req-77")
		p := r.problem(t)
		if r.status != 500 || p.Code != "internal" || p.Request != "req-77" || strings.Contains(r.body, inside) || p.Kind() != "" {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
		if log := s.Log.String(); !strings.Contains(log, inside) || !strings.Contains(log, "req-77") {
			t.Errorf("%s: the log lacks the cause or the id: %s", path, log)
		}
	}
	if s.Meter.Of("api_panics") != 1 || s.Meter.Of("api_internal") != 2 {
		t.Errorf("panics %d, internal %d", s.Meter.Of("api_panics"), s.Meter.Of("api_internal"))
	}
	if r := s.call("GET", "/v1/status", ""); r.status != 200 {
		t.Errorf("after a panic: %d", r.status)
	}
}

func TestBodiesAreBounded(t *testing.T) {
	s := serve(t)
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"`+strings.Repeat("a", 300<<10)+`"}`); r.status != 413 || r.problem(t).Code != "body-too-large" {
		t.Errorf("300 KiB: %d", r.status)
	}
	if r := s.call("PUT", "/v1/policy-set", `{"files":[{"name":"a.cedar","content":"`+strings.Repeat(" ", 17<<20)+`"}]}`, "If-Match", "*"); r.status != 413 {
		t.Errorf("17 MiB: %d", r.status)
	}
	if n := s.Meter.Of("api_body_refused"); n != 2 {
		t.Errorf("counted %d", n)
	}
	for _, bad := range []string{`{"machine":"m1","MACHINE":"m2"}`, `{"machine":"m1"}{}`, `{"machine":`, strings.Repeat("[", 70) + strings.Repeat("]", 70)} {
		if r := s.call("POST", "/v1/join-tokens", bad); r.status != 400 || r.problem(t).Code != "malformed-request" {
			t.Errorf("%.40s: %d %s", bad, r.status, r.body)
		}
	}
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"m1"}`, "Content-Type", "application/x-www-form-urlencoded"); r.status != 415 {
		t.Errorf("a form: %d", r.status)
	}
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"m1"}`, "Content-Type", "text/plain+json"); r.status != 415 {
		t.Errorf("what a browser sends without asking first: %d", r.status)
	}
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"m1"}`, "Content-Type", ""); r.status != 415 {
		t.Errorf("no Content-Type: %d", r.status)
	}
	if r := s.call("POST", "/v1/join-tokens", `{"machine":"m1"}`, "Content-Type", "application/json; charset=utf-8"); r.status != 201 {
		t.Errorf("charset: %d", r.status)
	}
	if r := s.call("POST", "/v1/join-tokens", ""); r.status != 400 {
		t.Errorf("no body: %d %s", r.status, r.body)
	}
}

// slow answers when the test lets it.
type slow struct {
	machines
	entered chan struct{}
	let     chan struct{}
}

func (x slow) Machines(ctx context.Context, after string, limit int) ([]fleet.Machine, error) {
	x.entered <- struct{}{}
	select {
	case <-x.let:
		return nil, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestRequestsInWorkAreBounded(t *testing.T) {
	h := apitest.New(t)
	inner := slow{machines: h.Config.Machines, entered: make(chan struct{}, 300), let: make(chan struct{})}
	h.Config.Machines = inner
	handler := h.Handler(t)
	get := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/v1/machines", nil)
		r.Header.Set("Authorization", "Bearer "+h.Secret)
		handler.ServeHTTP(w, r)
		return w
	}
	done := make(chan int, 256)
	for range 256 {
		go func() { done <- get().Code }()
	}
	for range 256 {
		<-inner.entered
	}
	if w := get(); w.Code != 503 || !strings.Contains(w.Body.String(), "server-busy") || w.Header().Get("Retry-After") == "" {
		t.Errorf("the 257th: %d %s", w.Code, w.Body)
	}
	if h.Meter.Of("api_busy") != 1 {
		t.Errorf("counted %d", h.Meter.Of("api_busy"))
	}
	close(inner.let)
	for range 256 {
		if code := <-done; code != 200 {
			t.Errorf("one in work: %d", code)
		}
	}
}

// A request that takes longer than its operation may ends with a problem; time passes in a bubble.
func TestRequestsEndInTime(t *testing.T) {
	h := apitest.New(t)
	synctest.Test(t, func(t *testing.T) {
		gate := slow{machines: h.Config.Machines, entered: make(chan struct{}, 1), let: make(chan struct{})}
		cfg := h.Config
		cfg.Machines, cfg.Events, cfg.Sink = gate, h.Fleet, nil
		handler, err := api.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/v1/machines", nil)
		r.Header.Set("Authorization", "Bearer "+h.Secret)
		begin := time.Now()
		handler.ServeHTTP(w, r)
		if took := time.Since(begin); w.Code != 503 || !strings.Contains(w.Body.String(), "took-too-long") || took != 20*time.Second {
			t.Errorf("after %s: %d %s", took, w.Code, w.Body)
		}
	})
}

// A body that trickles in is cut off, by the clock of the real connection.
func TestSlowBodyIsCutOff(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.BodyTime = 200 * time.Millisecond })
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/join-tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{", s.Secret)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 408 {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestRequestIDsAndTraces(t *testing.T) {
	s := serve(t)
	if r := s.call("GET", "/v1/status", "", "X-Request-ID", "abc-1.x_Y"); r.header.Get("X-Request-ID") != "abc-1.x_Y" {
		t.Errorf("a fit id is kept: %q", r.header.Get("X-Request-ID"))
	}
	for _, bad := range []string{"", "a b", strings.Repeat("x", 65), "<script>"} {
		if got := s.call("GET", "/v1/status", "", "X-Request-ID", bad).header.Get("X-Request-ID"); !strings.HasPrefix(got, "q-") {
			t.Errorf("id %q became %q", bad, got)
		}
	}
	for trace, want := range map[string]string{
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01":      "0af7651916cd43dd8448eb211c80319c",
		"00-00000000000000000000000000000000-b7ad6b7169203331-01":      "",
		"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01":      "",
		"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01":      "",
		"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more": "",
		"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more": "0af7651916cd43dd8448eb211c80319c",
		"x": "",
	} {
		s.Engine.Asked()
		s.call("GET", "/v1/status", "", "Traceparent", trace)
		if asked := s.Engine.Asked(); len(asked) != 1 || asked[0].Trace != want {
			t.Errorf("traceparent %s: %+v", trace, asked)
		}
	}
	for name, want := range map[string]string{"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} {
		if got := s.call("GET", "/v1/status", "").header.Get(name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestMissingPartsAreRefused(t *testing.T) {
	h := apitest.New(t)
	for name, change := range map[string]func(*api.Config){
		"trust domain": func(c *api.Config) { c.TrustDomain = "" }, "operators": func(c *api.Config) { c.Operators = nil },
		"engine": func(c *api.Config) { c.Engine = nil }, "audit": func(c *api.Config) { c.Audit = nil },
	} {
		cfg := h.Config
		change(&cfg)
		if _, err := api.New(cfg); err == nil {
			t.Errorf("without %s", name)
		}
	}
	cfg := h.Config
	cfg.Meter, cfg.Logger, cfg.Sink, cfg.Now = nil, nil, nil, nil
	if _, err := api.New(cfg); err != nil {
		t.Error(err)
	}
}

func TestUncertainPermitIsNone(t *testing.T) {
	s := serve(t)
	s.Engine.Answer("maybe", policy.Enforce)
	if r := s.call("GET", "/v1/status", ""); r.status != 403 {
		t.Errorf("a verdict that is no permit: %d", r.status)
	}
}
