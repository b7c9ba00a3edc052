package audit_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestLeavesGetIndexesInOrderAndAreProvenFromFilesAlone(t *testing.T) {
	top := t.TempDir()
	dir, s := filepath.Join(top, "audit"), openStore(t, top)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	s.OnRecord(l.Notify)
	for want := range uint64(5) {
		id := put(t, s)
		for range 2 { // the second time it is known
			if got, err := l.Wait(t.Context(), id); err != nil || got != want {
				t.Fatalf("wait: %d, %v; want %d", got, err, want)
			}
		}
	}
	ids := fill(t, s, 700) // more than two bundles, and a partial one
	if got, err := l.Wait(t.Context(), ids[699]); err != nil || got != 704 {
		t.Fatalf("wait: %d, %v; want 704", got, err)
	}
	drained(t, l) // Wait returns when a leaf is in the log; its mark follows
	for i, id := range ids {
		if got, ok, err := s.Outbox().Placed(t.Context(), id); err != nil || !ok || got != uint64(5+i) {
			t.Fatalf("record %d is at %d, %v, %v", i, got, ok, err)
		}
	}
	stop() // publishes
	r := proven(t, dir, l.Verifier(), s.Outbox(), 705)
	if r.Origin != origin || r.OwnKey || r.First.IsZero() || r.Last.Before(r.First) || !strings.HasPrefix(r.Checkpoint, origin+"\n705\n") {
		t.Errorf("report: %+v", r)
	}
	if own := verify(t, dir, "", audit.Options{}); !own.OwnKey || !own.OK() {
		t.Errorf("with the key beside the log: %+v", own)
	}
	if _, err := l.Wait(t.Context(), "r-later"); !errors.Is(err, audit.ErrNotLogged) {
		t.Errorf("waiting on a log that stopped: %v", err)
	}
}

func TestTheLogGoesOnAfterARestart(t *testing.T) {
	dir, vkey, s := made(t, 300)
	for range 3 {
		l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
		put(t, s)
		drained(t, l)
		stop()
		if l.Verifier() != vkey {
			t.Fatal("the key changed")
		}
	}
	proven(t, dir, vkey, s.Outbox(), 303)
}

// failing is an outbox whose marks fail after they were made in the log: as if the process had died in between.
type failing struct {
	audit.Outbox
	mu   sync.Mutex
	left int
}

func (f *failing) MarkLogged(ctx context.Context, p []audit.Placed) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > 0 {
		f.left--
		return errors.New("no mark")
	}
	return f.Outbox.MarkLogged(ctx, p)
}

func TestALeafWhoseMarkWasLostIsNotLoggedTwice(t *testing.T) {
	top := t.TempDir()
	dir, s := filepath.Join(top, "audit"), openStore(t, top)
	fill(t, s, 10)
	var m meter
	l, stop := run(t, audit.Config{Dir: dir, Outbox: &failing{Outbox: s.Outbox(), left: 3}, Meter: &m})
	drained(t, l)
	fill(t, s, 300)
	drained(t, l)
	stop()
	proven(t, dir, l.Verifier(), s.Outbox(), 310)
	if m.of("audit_recovered") != 10 || m.of("audit_failures reason error") != 3 {
		t.Errorf("counted: %v", m.n)
	}

	// And across a restart, with more rows than one batch.
	fill(t, s, 400)
	lost := &failing{Outbox: s.Outbox(), left: 1 << 30}
	_, stop = run(t, audit.Config{Dir: dir, Outbox: lost})
	time.Sleep(300 * time.Millisecond)
	stop()
	l, stop = run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	proven(t, dir, l.Verifier(), s.Outbox(), 710)
}

func TestWaitingIsBounded(t *testing.T) {
	top := t.TempDir()
	s := openStore(t, top)
	var m meter
	l, err := audit.Open(t.Context(), audit.Config{
		Dir: filepath.Join(top, "audit"), Origin: origin, Outbox: s.Outbox(), MaxWait: 1500 * time.Millisecond, Meter: &m,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Wait(ctx, "r-1"); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that went away: %v", err)
	}
	var wg sync.WaitGroup
	full := make(chan error, 8)
	for i := range audit.MaxWaiters + 8 {
		wg.Go(func() {
			_, err := l.Wait(t.Context(), "r-"+strings.Repeat("x", i%7)+string(rune('a'+i%26))+time.Duration(i).String())
			if errors.Is(err, audit.ErrWaiters) {
				full <- err
			} else if !errors.Is(err, audit.ErrNotLogged) {
				t.Errorf("waiter %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if len(full) != 8 || m.of("audit_wait_refused reason audit-waiters") != 8 {
		t.Errorf("%d waiters were refused, %d counted; want 8", len(full), m.of("audit_wait_refused reason audit-waiters"))
	}
	if r := refusal.As(<-full); r.Kind != refusal.Exhausted || r.Do == "" {
		t.Errorf("refusal: %+v", r)
	}
	if m.of("audit_wait_refused reason audit-not-logged") != audit.MaxWaiters {
		t.Errorf("counted: %v", m.n)
	}
}

// stuck is an outbox with a long backlog that cannot be read.
type stuck struct{ audit.Outbox }

func (stuck) Tail(context.Context) (audit.Tail, error) {
	return audit.Tail{Pending: audit.MaxBacklog}, nil
}

func TestALongBacklogRefusesChanges(t *testing.T) {
	top := t.TempDir()
	var m meter
	l, err := audit.Open(t.Context(), audit.Config{
		Dir: filepath.Join(top, "audit"), Origin: origin, Outbox: stuck{openStore(t, top).Outbox()}, Meter: &m,
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Ready(); !errors.Is(err, audit.ErrBacklog) {
		t.Errorf("got %v, want code %s", err, audit.ErrBacklog.Code)
	}
	if m.of("audit_refused reason audit-backlog") != 1 {
		t.Errorf("counted: %v", m.n)
	}
}

// oversized is an outbox with a leaf that no store should have taken.
type oversized struct{ audit.Outbox }

func (oversized) Pending(context.Context, int64, int) ([]audit.Entry, error) {
	return []audit.Entry{{Seq: 1, RecordID: "r-1", Leaf: make([]byte, audit.MaxLeafBytes+1)}}, nil
}

func TestALeafBeyondTheBoundIsNotLogged(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "audit")
	var m meter
	l, stop := run(t, audit.Config{Dir: dir, Outbox: oversized{openStore(t, top).Outbox()}, Meter: &m})
	for deadline := time.Now().Add(5 * time.Second); m.of("audit_failures reason error") == 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if s, err := l.Status(t.Context()); err != nil || s.Size != 0 || s.Failing == "" {
		t.Errorf("status: %+v, %v", s, err)
	}
	stop()
}

func TestTheSigningKeyIsKeptPrivate(t *testing.T) {
	dir, vkey, s := made(t, 3)
	signer := filepath.Join(dir, audit.SignerFile)
	info, err := os.Stat(signer)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("signer: %v, %v", info.Mode(), err)
	}
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v", info.Mode())
	}
	if pub, err := os.ReadFile(filepath.Join(dir, audit.VerifierFile)); err != nil || strings.TrimSpace(string(pub)) != vkey {
		t.Errorf("verifier file: %q, %v; want %q", pub, err, vkey)
	}
	skey, _ := os.ReadFile(signer)
	open := func(cfg audit.Config) error {
		cfg.Dir, cfg.Outbox = dir, s.Outbox()
		if cfg.Origin == "" {
			cfg.Origin = origin
		}
		_, err := audit.Open(t.Context(), cfg)
		if err != nil && strings.Contains(err.Error(), strings.TrimSpace(string(skey))[40:]) {
			t.Errorf("the error shows the key: %v", err)
		}
		return err
	}
	if err := open(audit.Config{Key: string(skey)}); err != nil {
		t.Errorf("the same key, given: %v", err)
	}
	if err := open(audit.Config{Origin: "example.org/other"}); !errors.Is(err, audit.ErrKey) {
		t.Errorf("another origin: %v", err)
	}
	if err := open(audit.Config{Key: strings.TrimSpace(string(skey))[:60]}); !errors.Is(err, audit.ErrKey) {
		t.Errorf("a broken key: %v", err)
	}
	if err := open(audit.Config{Key: "PRIVATE+KEY+example.org/audit+00000000+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"}); err == nil {
		t.Error("another key opened the log")
	}
	if err := os.Chmod(signer, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := open(audit.Config{}); !errors.Is(err, audit.ErrKey) {
		t.Errorf("a key that others may read: %v", err)
	}
	if err := os.Remove(signer); err != nil {
		t.Fatal(err)
	}
	if err := open(audit.Config{}); !errors.Is(err, audit.ErrKey) {
		t.Errorf("a log whose key is gone: %v", err)
	}
	other, _, _ := made(t, 1)
	raw, _ := os.ReadFile(filepath.Join(other, audit.SignerFile))
	if err := open(audit.Config{Key: string(raw)}); !errors.Is(err, audit.ErrForeign) {
		t.Errorf("a log that another key signed: %v", err)
	}
}

func TestALogThatLostLeavesIsNotGoneOnWith(t *testing.T) {
	old, _, s := made(t, 5)
	kept := t.TempDir()
	if err := os.CopyFS(kept, os.DirFS(old)); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(filepath.Join(kept, audit.SignerFile), 0o600)
	l, stop := run(t, audit.Config{Dir: old, Outbox: s.Outbox()})
	put(t, s)
	drained(t, l)
	stop()
	for name, dir := range map[string]string{"an older copy": kept, "an empty one": filepath.Join(t.TempDir(), "audit")} {
		if _, err := audit.Open(t.Context(), audit.Config{Dir: dir, Origin: origin, Outbox: s.Outbox()}); !errors.Is(err, audit.ErrBehind) {
			t.Errorf("%s: got %v, want code %s", name, err, audit.ErrBehind.Code)
		}
	}
}

func TestRunLeavesNoGoroutineBehindAndKeepsTesseraQuiet(t *testing.T) {
	stderr := os.Stderr
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	os.Stderr = w
	top := t.TempDir()
	s := openStore(t, top)
	var buf bytes.Buffer
	l, stop := run(t, audit.Config{Dir: filepath.Join(top, "audit"), Outbox: s.Outbox(), Logger: slog.New(slog.NewJSONHandler(&buf, nil))})
	put(t, s)
	drained(t, l)
	stop()
	stack := make([]byte, 1<<20) // at once: Run has returned, so its goroutines have ended
	if stack = stack[:runtime.Stack(stack, true)]; bytes.Contains(stack, []byte("transparency-dev/tessera")) {
		t.Errorf("goroutines of the writer are left:\n%s", stack)
	}
	os.Stderr = stderr
	_ = w.Close()
	out := make([]byte, 4096)
	n, _ := r.Read(out)
	if n > 0 {
		t.Errorf("on standard error: %s", out[:n])
	}
}

func TestConfigIsRefusedClearly(t *testing.T) {
	box := openStore(t, t.TempDir()).Outbox()
	for name, cfg := range map[string]audit.Config{
		"no directory":      {Origin: origin, Outbox: box},
		"no outbox":         {Dir: "x", Origin: origin},
		"no origin":         {Dir: "x", Outbox: box},
		"a plus":            {Dir: "x", Origin: "a+b", Outbox: box},
		"a short interval":  {Dir: "x", Origin: origin, Outbox: box, Checkpoint: time.Millisecond},
		"a negative batch":  {Dir: "x", Origin: origin, Outbox: box, Batch: -1},
		"a negative bound":  {Dir: "x", Origin: origin, Outbox: box, MaxWait: -1},
		"a blank in origin": {Dir: "x", Origin: "a b", Outbox: box},
	} {
		_, err := audit.Open(t.Context(), cfg)
		if r := refusal.As(err); r == nil || r.Kind != refusal.Invalid || r.Do == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat("x"); err == nil {
		t.Error("a refused configuration made a directory")
	}
}
