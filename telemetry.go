package redoubt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/bridges/otelslog"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Telemetry is what a role tells of itself: logs as JSON lines with ECS names, counters at /metrics, and, where a
// collector is configured, traces and logs by OTLP.
//
// Concurrency: safe.
type Telemetry struct {
	Logger   *slog.Logger
	Tracer   trace.Tracer
	registry *prometheus.Registry
	level    *slog.LevelVar
	closers  []func(context.Context) error

	mu       sync.Mutex
	counters map[string]*prometheus.CounterVec // guarded by mu
	labels   map[string]int                    // series a counter has, guarded by mu
	dropped  prometheus.Counter
}

// maxSeries bounds the series of one counter; further label values are counted in redoubt_metrics_dropped_total.
const maxSeries = 200

// NewTelemetry makes the telemetry of a role. w takes the log lines.
func NewTelemetry(ctx context.Context, role string, cfg Config, w io.Writer) (*Telemetry, error) {
	level, err := cfg.Log.level()
	if err != nil {
		return nil, err
	}
	t := &Telemetry{
		registry: prometheus.NewRegistry(), level: new(slog.LevelVar),
		counters: map[string]*prometheus.CounterVec{}, labels: map[string]int{},
	}
	t.level.Set(level)
	t.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	t.dropped = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "redoubt_metrics_dropped_total", Help: "Counts that were lost because a counter has too many series.",
	})
	t.registry.MustRegister(t.dropped)
	var handler slog.Handler = slog.NewJSONHandler(w, &slog.HandlerOptions{Level: t.level, ReplaceAttr: ecs})
	t.Tracer = noop.NewTracerProvider().Tracer("redoubt")
	if cfg.Telemetry.OTLP != "" {
		if handler, err = t.export(ctx, role, cfg.Telemetry.OTLP, handler); err != nil {
			return nil, err
		}
	}
	t.Logger = slog.New(handler).With("service.name", "redoubt-"+role)
	return t, nil
}

func (t *Telemetry) export(ctx context.Context, role, endpoint string, local slog.Handler) (slog.Handler, error) {
	base := strings.TrimSuffix(endpoint, "/")
	res := resource.NewSchemaless(attribute.String("service.name", "redoubt-"+role))
	spans, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(base+"/v1/traces"))
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp: %w", err)
	}
	logs, err := otlploghttp.New(ctx, otlploghttp.WithEndpointURL(base+"/v1/logs"))
	if err != nil {
		return nil, fmt.Errorf("telemetry.otlp: %w", err)
	}
	tp := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans), sdktrace.WithResource(res))
	lp := sdklog.NewLoggerProvider(sdklog.WithProcessor(sdklog.NewBatchProcessor(logs)), sdklog.WithResource(res))
	t.closers = append(t.closers, tp.Shutdown, lp.Shutdown)
	t.Tracer = tp.Tracer("redoubt")
	return both{local, otelslog.NewHandler("redoubt", otelslog.WithLoggerProvider(lp))}, nil
}

func (c *Config) checkOTLP() error {
	if c.Telemetry.OTLP == "" {
		return nil
	}
	u, err := url.Parse(c.Telemetry.OTLP)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("telemetry.otlp: it is not an http or https URL")
	}
	if u.User != nil {
		return errors.New("telemetry.otlp: a URL must not hold a password")
	}
	if ip := net.ParseIP(u.Hostname()); u.Scheme == "http" && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return errors.New("telemetry.otlp: plain http goes to loopback only, since spans name identities; use https")
	}
	return nil
}

// Trace makes a span of each request, which continues the caller's trace (W3C Trace Context). Without a collector it is next
// to nothing. Paths below the first noun are left out of names: they hold ids.
func (t *Telemetry) Trace(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
		noun, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v1/"), "/")
		ctx, span := t.Tracer.Start(ctx, r.Method+" /v1/"+noun, trace.WithSpanKind(trace.SpanKindServer))
		defer span.End()
		seen := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(seen, r.WithContext(ctx))
		span.SetAttributes(attribute.Int("http.response.status_code", seen.status), attribute.String("http.request.method", r.Method))
		if seen.status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, http.StatusText(seen.status))
		}
	})
}

// statusWriter remembers the status. Unwrap lets streams flush through it.
type statusWriter struct {
	http.ResponseWriter
	status int
}

// WriteHeader remembers the status and passes it on.
func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap implements the contract of http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Close sends what is left, within the context.
func (t *Telemetry) Close(ctx context.Context) error {
	var errs []error
	for _, c := range t.closers {
		errs = append(errs, c(ctx))
	}
	return errors.Join(errs...)
}

// SetLevel changes what is logged from now on.
func (t *Telemetry) SetLevel(l slog.Level) { t.level.Set(l) }

// Handler serves /metrics.
func (t *Telemetry) Handler() http.Handler {
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{})
}

var metricName = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// Count implements event.Meter: redoubt_<name>_total. A counter's label names are those of its first use.
func (t *Telemetry) Count(name string, n int64, labels ...string) {
	if n == 0 {
		return // nothing happened
	}
	if n < 0 || len(labels)%2 != 0 || !metricName.MatchString(name) {
		t.dropped.Inc()
		return
	}
	names, values := make([]string, 0, len(labels)/2), make([]string, 0, len(labels)/2)
	for i := 0; i < len(labels); i += 2 {
		names, values = append(names, strings.ReplaceAll(labels[i], ".", "_")), append(values, labels[i+1])
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	vec := t.counters[name]
	if vec == nil {
		vec = prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "redoubt_" + name + "_total", Help: "Count of " + strings.ReplaceAll(name, "_", " ") + ".",
		}, names)
		if err := t.registry.Register(vec); err != nil {
			t.dropped.Inc()
			return
		}
		t.counters[name] = vec
	}
	key := name + "\x00" + strings.Join(values, "\x00")
	if _, seen := t.labels[key]; !seen {
		if t.labels[name] >= maxSeries {
			t.dropped.Add(float64(n))
			return
		}
		t.labels[name]++
		t.labels[key] = 1
	}
	counter, err := vec.GetMetricWithLabelValues(values...)
	if err != nil {
		t.dropped.Add(float64(n))
		return
	}
	counter.Add(float64(n))
}

// serveMetrics serves /metrics at addr until ctx ends.
func (t *Telemetry) serveMetrics(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", t.Handler())
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// ecs gives slog's own keys the names of the Elastic Common Schema.
func ecs(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch a.Key {
	case slog.TimeKey:
		return slog.String("@timestamp", a.Value.Time().UTC().Format(time.RFC3339Nano))
	case slog.LevelKey:
		return slog.String("log.level", strings.ToLower(a.Value.String()))
	case slog.MessageKey:
		return slog.Attr{Key: "message", Value: a.Value}
	case "error":
		return slog.Attr{Key: "error.message", Value: a.Value}
	}
	return a
}

// both hands each record to two handlers.
type both [2]slog.Handler

// Enabled reports whether either takes the level.
func (b both) Enabled(ctx context.Context, l slog.Level) bool { return b[0].Enabled(ctx, l) }

// Handle gives the record to those that take its level.
func (b both) Handle(ctx context.Context, r slog.Record) error {
	var errs []error
	for _, h := range b {
		if h.Enabled(ctx, r.Level) {
			errs = append(errs, h.Handle(ctx, r.Clone()))
		}
	}
	return errors.Join(errs...)
}

// WithAttrs returns both with the attributes.
func (b both) WithAttrs(attrs []slog.Attr) slog.Handler {
	return both{b[0].WithAttrs(slices.Clone(attrs)), b[1].WithAttrs(slices.Clone(attrs))}
}

// WithGroup returns both within the group.
func (b both) WithGroup(name string) slog.Handler {
	return both{b[0].WithGroup(name), b[1].WithGroup(name)}
}
