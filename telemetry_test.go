package redoubt_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/redoubtsec/redoubt"
)

func telemetry(t *testing.T, text string, w *bytes.Buffer) *redoubt.Telemetry {
	t.Helper()
	cfg, err := redoubt.ParseConfig("t", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	tel, err := redoubt.NewTelemetry(t.Context(), "server", cfg, w)
	if err != nil {
		t.Fatal(err)
	}
	return tel
}

func TestLogsAreJSONWithECSNames(t *testing.T) {
	var out bytes.Buffer
	tel := telemetry(t, "", &out)
	tel.Logger.Error("something failed", "error", fmt.Errorf("why"), "redoubt.decision.id", "d-1")
	tel.Logger.Debug("not at this level")
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	for k, v := range map[string]string{
		"log.level": "error", "message": "something failed", "error.message": "why", "service.name": "redoubt-server", "redoubt.decision.id": "d-1",
	} {
		if line[k] != v {
			t.Errorf("%s is %v, want %s", k, line[k], v)
		}
	}
	if _, err := time.Parse(time.RFC3339Nano, line["@timestamp"].(string)); err != nil {
		t.Error(err)
	}
	tel.SetLevel(slog.LevelDebug)
	tel.Logger.Debug("now")
	if !strings.Contains(out.String(), `"now"`) {
		t.Error("the level was not changed")
	}
}

func scrape(t *testing.T, tel *redoubt.Telemetry) string {
	t.Helper()
	w := httptest.NewRecorder()
	tel.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return w.Body.String()
}

func TestMetricsAreBoundedAndCleanUnderPromtool(t *testing.T) {
	var out bytes.Buffer
	tel := telemetry(t, "", &out)
	tel.Count("decisions", 2, "verdict", "deny", "mode", "enforce")
	tel.Count("decisions", 1, "verdict", "permit") // other labels than at first: counted as dropped, not lost in silence
	tel.Count("Not A Name", 1)
	for i := range 300 {
		tel.Count("flood", 1, "who", fmt.Sprint(i))
	}
	text := scrape(t, tel)
	if !strings.Contains(text, `redoubt_decisions_total{mode="enforce",verdict="deny"} 2`) {
		t.Error("a counter is missing")
	}
	if n := strings.Count(text, "redoubt_flood_total{"); n != 200 {
		t.Errorf("%d series of one counter, the limit is 200", n)
	}
	if !strings.Contains(text, "redoubt_metrics_dropped_total 102") {
		t.Error("what was dropped is not counted")
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed (make test installs it when root)")
	}
	cmd := exec.CommandContext(t.Context(), promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// A real OTLP/HTTP receiver takes what is exported.
func TestOTLPExportsLogsAndTraces(t *testing.T) {
	var mu sync.Mutex
	got := map[string]int{}
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.Header.Get("Content-Type") == "application/x-protobuf" && r.ContentLength != 0 {
			got[r.URL.Path]++
		}
	}))
	defer collector.Close()
	var out bytes.Buffer
	tel := telemetry(t, "telemetry: {otlp: '"+collector.URL+"'}\n", &out)
	tel.Logger.Info("hello")
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/v1/workloads/w-1", nil)
	r.Header.Set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	tel.Trace(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := trace.SpanContextFromContext(r.Context()).TraceID().String(); got != "4bf92f3577b34da6a3ce929d0e0e4736" {
			t.Errorf("the caller's trace was not continued: %s", got)
		}
		w.WriteHeader(http.StatusTeapot)
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Errorf("streams cannot flush through the trace: %v", err)
		}
	})).ServeHTTP(w, r)
	if w.Code != http.StatusTeapot {
		t.Errorf("status %d", w.Code)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := tel.Close(ctx); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if got["/v1/logs"] == 0 || got["/v1/traces"] == 0 {
		t.Errorf("the collector got %v", got)
	}
	if !strings.Contains(out.String(), `"hello"`) {
		t.Error("logs still go to standard error")
	}
}
