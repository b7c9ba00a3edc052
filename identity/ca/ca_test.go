package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/refusal"
)

const domain = identity.TrustDomain("example.org")

var (
	kek   = bytes.Repeat([]byte{7}, 32)
	start = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
)

// world is an authority with its surroundings: a clock that stands where it is set, a store, counters and a log.
type world struct {
	*ca.Authority
	store *catest.Store
	clock *clock
	meter *meter
	log   *logBuffer
	cfg   ca.Config
}

func open(t testing.TB, edit ...func(*ca.Config)) *world {
	t.Helper()
	w := &world{store: &catest.Store{}, clock: &clock{at: start}, meter: &meter{}, log: &logBuffer{}}
	w.cfg = ca.Config{
		TrustDomain: domain, Store: w.store, KEK: bytes.Clone(kek), Meter: w.meter,
		Logger: slog.New(slog.NewJSONHandler(w.log, nil)), Now: w.clock.now,
	}
	for _, e := range edit {
		e(&w.cfg)
	}
	w.reopen(t)
	return w
}

func (w *world) reopen(t testing.TB) {
	t.Helper()
	a, err := ca.Open(t.Context(), w.cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	w.Authority = a
}

// logBuffer keeps what is logged, for several goroutines.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) { c.set(c.now().Add(d)) }

func (c *clock) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = t
}

type meter struct {
	mu     sync.Mutex
	counts map[string]int64
}

func (m *meter) Count(name string, n int64, labels ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.counts == nil {
		m.counts = map[string]int64{}
	}
	m.counts[strings.Join(append([]string{name}, labels...), " ")] += n
}

func (m *meter) get() map[string]int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.counts)
}

func id(t testing.TB, path string) identity.ID {
	t.Helper()
	id, err := identity.MakeID(domain, path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func makeCSR(t testing.TB, k crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func audit(action string) event.Record {
	return event.NewRecord(`User::"operator"`, "ca."+action, domain.String())
}

// wantRefusal checks that err is a refusal of this code that tells its reader all three parts.
func wantRefusal(t testing.TB, err error, sentinel *refusal.Error) {
	t.Helper()
	e := refusal.As(err)
	if e == nil || e.Code != sentinel.Code {
		t.Errorf("got %v, want a refusal with code %s", err, sentinel.Code)
		return
	}
	if e.Kind == "" || e.What == "" || e.Why == "" || e.Do == "" {
		t.Errorf("the refusal %#v lacks a part", e)
	}
}

// step is a method of the authority that takes a step of rotation.
type step func(context.Context, event.Record) (ca.Status, error)

func take(t testing.TB, s step, name string) ca.Status {
	t.Helper()
	st, err := s(t.Context(), audit(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return st
}

// states counts the keys of a status by use and state.
func states(st ca.Status) map[string]int {
	out := map[string]int{}
	for _, k := range st.Keys {
		out[string(k.Use)+" "+string(k.State)]++
	}
	return out
}
