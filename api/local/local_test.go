package local_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// host stands for the machine, of which these tests need nothing.
type host struct{ block chan struct{} }

func (h host) Resolve(context.Context, string) (local.Target, error) {
	return local.Target{Cgroup: "/shared", PIDs: []int{os.Getpid()}}, nil
}
func (h host) Family(local.Target) []int                            { return nil }
func (h host) User(context.Context, string) (uint32, uint32, error) { return 65001, 65001, nil }
func (h host) Explain(_ context.Context, name string) (json.RawMessage, error) {
	if name == "panic" {
		panic("told to")
	}
	if name == "fail" {
		return nil, errors.New("a secret inside")
	}
	return json.RawMessage(`{}`), nil
}

func (h host) Doctor(context.Context) (json.RawMessage, error) {
	if h.block != nil {
		<-h.block
	}
	return json.RawMessage(`{}`), nil
}
func (h host) Protections() []policy.Protection { return nil }

type counter struct {
	mu sync.Mutex
	n  map[string]int64
}

func (c *counter) Count(name string, n int64, labels ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[strings.Join(append([]string{name}, labels...), " ")] += n
}

func serve(t *testing.T, h host, meter *counter) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m, err := machine.New(machine.Config{ID: "m1", TrustDomain: "td", StateDir: filepath.Join(dir, "state"), CgroupRoot: dir})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := local.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- local.New(local.Config{Machine: m, Host: h, Meter: meter}).Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func code(err error) string {
	if r := refusal.As(err); r != nil {
		return r.Code
	}
	return ""
}

func post(t *testing.T, path, url, body string) (*http.Response, client.Problem) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	defer c.CloseIdleConnections()
	resp, err := c.Post("http://agent"+url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(resp.Body)
	var p client.Problem
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatalf("%s is no problem document: %v", raw, err)
	}
	return resp, p
}

func TestEveryRefusalIsAProblemDocument(t *testing.T) {
	path := serve(t, host{}, &counter{n: map[string]int64{}})
	for _, c := range []struct{ url, body, code string }{
		{"/v1/nothing", "{}", "no-such-path"},
		{"/v1/workloads", `{"service":"hunter2","unknown":1}`, "malformed-request"},
		{"/v1/workloads", "not JSON", "malformed-request"},
		{"/v1/workloads", `{"service":"` + strings.Repeat("a", 2<<20) + `"}`, "malformed-request"},
		{"/v1/workloads", `{"service":"no blanks"}`, "invalid-workload"},
		{"/v1/workloads/w-1/started", `{"pid":1}`, "unknown-workload"},
		{"/v1/enroll", `{"name":"1","service":"x","stay":true}`, "shared-cgroup"},
		{"/v1/release", `{"resume":true}`, "not-released"},
	} {
		resp, p := post(t, path, c.url, c.body)
		if p.Code != c.code || resp.StatusCode < 400 || resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %s %+v", c.url, resp.Status, p)
		}
		if strings.Contains(p.Detail+p.What+p.Why, "hunter2") {
			t.Errorf("a submitted value is repeated: %+v", p)
		}
	}
}

func TestInternalsStayInside(t *testing.T) {
	c := local.NewClient(serve(t, host{}, &counter{n: map[string]int64{}}))
	defer c.Close()
	for _, name := range []string{"fail", "panic"} {
		_, err := c.Explain(t.Context(), name)
		if err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "told to") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Explain(t.Context(), "fine"); err != nil {
		t.Errorf("the server did not live on: %v", err)
	}
}

func TestOnlyRootIsAnswered(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: another user is played")
	}
	meter := &counter{n: map[string]int64{}}
	path := serve(t, host{}, meter)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	// Even if somebody opened the path for all: the kernel says who connects.
	if err := errors.Join(os.Chmod(path, 0o666), os.Chmod(filepath.Dir(path), 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("curl", "-s", "--unix-socket", path, "http://agent/v1/workloads")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(out, []byte("not-root")) || meter.n["local_refused reason not-root"] != 1 {
		t.Errorf("another user got %s; counted %v", out, meter.n)
	}
}

func TestCallsInFlightAreBounded(t *testing.T) {
	meter := &counter{n: map[string]int64{}}
	h := host{block: make(chan struct{})}
	path := serve(t, h, meter)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			c := local.NewClient(path)
			defer c.Close()
			_, _ = c.Doctor(context.Background())
		})
	}
	c := local.NewClient(path)
	defer c.Close()
	deadline := time.Now().Add(5 * time.Second)
	for {
		_, err := c.Status(t.Context())
		if code(err) == "agent-busy" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the bound was not reached: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	// The break-glass waits for nobody.
	if _, err := c.Release(t.Context(), local.Release{Reason: "drill"}); err != nil {
		t.Errorf("release while the agent is busy: %v", err)
	}
	close(h.block)
	wg.Wait()
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("after the crowd: %v", err)
	}
	if meter.n["local_refused reason busy"] == 0 {
		t.Error("refusals are not counted")
	}
}

func TestSocketOfARunningAgentIsNotTaken(t *testing.T) {
	path := serve(t, host{}, &counter{n: map[string]int64{}})
	if _, err := local.Listen(t.Context(), path); code(err) != "agent-running" {
		t.Errorf("got %v", err)
	}
	if _, err := local.NewClient(path + "-none").Status(t.Context()); code(err) != "agent-away" {
		t.Errorf("got %v", err)
	}
}

func TestDecisionsTakeTheTypesOfARequestBack(t *testing.T) {
	c := local.NewClient(serve(t, host{}, &counter{n: map[string]int64{}}))
	defer c.Close()
	got, err := c.Decide(t.Context(), policy.Request{
		Principal: policy.Entity{UID: policy.UID{Type: "Workload", ID: "w"}, Attrs: policy.Record{"uid": int64(7), "machine": policy.UID{Type: "Machine", ID: "m1"}}},
		Action:    policy.Action(policy.Net, "connect"), Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "s"}},
		Context: policy.Record{"port": int64(80)},
	})
	if err != nil || got.Decision.Explanation.Reason != policy.ReasonDefault || !got.Allowed {
		t.Fatalf("%+v, %v", got.Decision, err)
	}
	again, err := c.Decision(t.Context(), got.Decision.ID)
	if err != nil || again.ID != got.Decision.ID {
		t.Errorf("%v", err)
	}
}
