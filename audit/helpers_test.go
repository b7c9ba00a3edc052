package audit_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

const origin = "example.org/audit"

// meter counts by name and labels.
type meter struct {
	mu sync.Mutex
	n  map[string]int64
}

func (m *meter) Count(name string, n int64, labels ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n == nil {
		m.n = map[string]int64{}
	}
	m.n[strings.Join(append([]string{name}, labels...), " ")] += n
}

func (m *meter) of(key string) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n[key]
}

func openStore(t testing.TB, dir string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(dir, sqlite.FileName)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// put commits one record, as a change would, and returns its id.
func put(t testing.TB, s *sqlite.Store) string {
	t.Helper()
	r := event.NewRecord(`User::"op"`, "test.change", "thing")
	if err := commit(t.Context(), s, r); err != nil {
		t.Fatal(err)
	}
	return r.ID
}

func commit(ctx context.Context, s *sqlite.Store, records ...event.Record) error {
	return s.Fleet().Update(ctx, func(tx fleet.Tx) error {
		for _, r := range records {
			if err := tx.Audit.PutRecord(ctx, r); err != nil {
				return err
			}
		}
		return nil
	})
}

// fill commits n records in one transaction.
func fill(t testing.TB, s *sqlite.Store, n int) []string {
	t.Helper()
	var records []event.Record
	var ids []string
	for range n {
		r := event.NewRecord(`User::"op"`, "test.change", "thing")
		records, ids = append(records, r), append(ids, r.ID)
	}
	if err := commit(t.Context(), s, records...); err != nil {
		t.Fatal(err)
	}
	return ids
}

// run opens the log and runs it until stop is called, or the test ends.
func run(t testing.TB, cfg audit.Config) (l *audit.Log, stop func()) {
	t.Helper()
	if cfg.Origin == "" {
		cfg.Origin = origin
	}
	l, err := audit.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(stop)
	return l, stop
}

// drained waits until the outbox is empty.
func drained(t testing.TB, l *audit.Log) {
	t.Helper()
	l.Notify()
	for deadline := time.Now().Add(8 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s, err := l.Status(t.Context())
		if err == nil && s.Pending == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the outbox is not drained: %+v, %v", s, err)
		}
	}
}

func verify(t testing.TB, dir, vkey string, opts audit.Options) audit.Report {
	t.Helper()
	r, err := audit.Verify(t.Context(), dir, vkey, opts)
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	return r
}

// proven fails the test unless the log has exactly these leaves, and all of them are under a checkpoint.
func proven(t testing.TB, dir, vkey string, box audit.Outbox, leaves int) audit.Report {
	t.Helper()
	r := verify(t, dir, vkey, audit.Options{Outbox: box})
	if !r.OK() || r.Size != uint64(leaves) || r.Checked != uint64(leaves) || r.Unpublished != 0 || r.Pending != 0 {
		t.Fatalf("want %d proven leaves, got %+v", leaves, r)
	}
	return r
}

// made returns an audit directory with this many leaves, at rest, and its verifier key.
func made(t testing.TB, leaves int) (dir, vkey string, s *sqlite.Store) {
	t.Helper()
	top := t.TempDir()
	dir = filepath.Join(top, "audit")
	s = openStore(t, top)
	fill(t, s, leaves)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	return dir, l.Verifier(), s
}

func codes(r audit.Report) string {
	var out []string
	for _, f := range r.Findings {
		out = append(out, fmt.Sprintf("%s@%d", f.Code, f.Index))
	}
	return strings.Join(out, " ")
}
