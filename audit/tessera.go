package audit

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
)

// Tessera logs through klog, which is global to the process. It is pointed here once; lines go to the logger of the log
// that ran last, at most one a second.
var klogOnce sync.Once

var klogTarget atomic.Pointer[klogSink]

type klogSink struct {
	logger *slog.Logger
	meter  event.Meter
	last   atomic.Int64 // UnixNano of the last line
}

const klogEvery = time.Second

func redirectTessera(logger *slog.Logger, meter event.Meter) {
	klogTarget.Store(&klogSink{logger: logger, meter: meter})
	klogOnce.Do(func() { klog.SetSlogLogger(slog.New(klogHandler{})) })
}

// klogHandler is the slog.Handler behind klog.
type klogHandler struct{}

func (klogHandler) Enabled(context.Context, slog.Level) bool { return true }
func (h klogHandler) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h klogHandler) WithGroup(string) slog.Handler          { return h }

func (klogHandler) Handle(ctx context.Context, r slog.Record) error {
	sink := klogTarget.Load()
	now, last := time.Now().UnixNano(), sink.last.Load()
	if now-last < int64(klogEvery) || !sink.last.CompareAndSwap(last, now) {
		sink.meter.Count("audit_log_lines_dropped", 1)
		return nil
	}
	level := r.Level
	if level == slog.LevelInfo {
		level = slog.LevelDebug // its infos are of no use to operators
	}
	sink.logger.Log(ctx, level, "tessera", slog.String("text", r.Message))
	return nil
}

// group knows the goroutines that Tessera starts: it offers no way to wait for them, and they go on for a while after
// its shutdown and the end of their context. Goroutines inherit the profiler labels of their maker, so they can be
// found in the goroutine profile.
type group struct{ label string }

const groupKey = "redoubt-audit"

func newGroup() group { return group{label: identity.Unique("g")} }

// run calls fn; goroutines that it starts belong to the group.
func (g group) run(ctx context.Context, fn func(context.Context)) {
	pprof.Do(ctx, pprof.Labels(groupKey, g.label), fn)
}

// wait returns when no goroutine of the group is left, or with an error after limit.
func (g group) wait(limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for pause := time.Millisecond; g.alive(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("audit log: the writer's goroutines did not end in time")
		}
		time.Sleep(pause)
	}
	return nil
}

func (g group) alive() bool {
	var buf bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&buf, 1); err != nil {
		return false
	}
	return bytes.Contains(buf.Bytes(), []byte(g.label))
}
