package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/event/spool"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/refusal"
)

const td = identity.TrustDomain("example.org")

// rules issue /service/<service>.
type rules struct{}

func (rules) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error) {
	service := facts.Text(identity.FactService)
	if service == "" {
		return identity.ID{}, nil, &refusal.Error{
			Kind: refusal.Unknown, Code: "no-issuance-rule", What: "identity", Why: "no rule matches", Do: "add one", Decision: "d-1",
		}
	}
	id, err := identity.MakeID(td, "/service/"+service)
	return id, json.RawMessage(`{"winner":"services"}`), err
}

func (rules) PolicySet() fleet.PolicySet { return fleet.PolicySet{Version: 1, Digest: "d"} }

func (rules) Changed() <-chan struct{} { return nil }

// counts is a meter that remembers. Concurrency: safe.
type counts struct {
	mu sync.Mutex
	n  map[string]int64
}

func (c *counts) Count(name string, n int64, labels ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]int64{}
	}
	c.n[name] += n
	c.n[name+" "+strings.Join(labels, " ")] += n
}

func (c *counts) get(name string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[name]
}

// world is a server with everything real but the disk.
type world struct {
	*testing.T
	fleet       *fleet.Fleet
	store       *fleettest.Memory
	ca          *ca.Authority
	meter       *counts
	cfg         agent.ServerConfig
	fleetConfig fleet.Config
	address     string
	stop        func()

	mu   sync.Mutex
	skew time.Duration // of the server's clock; guarded by mu
}

func (w *world) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.skew)
}

func (w *world) skewBy(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.skew = d
}

func newWorld(t *testing.T, change func(*agent.ServerConfig, *fleet.Config)) *world {
	t.Helper()
	w := &world{T: t, store: &fleettest.Memory{}, meter: &counts{}}
	w.ca = newAuthority(t, w.now)
	fleetConfig := fleet.Config{TrustDomain: td, Store: w.store, Authority: w.ca, Rules: rules{}, Meter: w.meter, Now: w.now}
	w.cfg = agent.ServerConfig{
		TrustDomain: td, Bundle: w.ca.Bundle, GetCertificate: certificates(t, w.ca, fleet.ServerID(td)),
		Heartbeat: 200 * time.Millisecond, Meter: w.meter, Now: w.now,
	}
	if change != nil {
		change(&w.cfg, &fleetConfig)
	}
	w.fleetConfig = fleetConfig
	w.open()
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

func newAuthority(t *testing.T, now func() time.Time) *ca.Authority {
	t.Helper()
	a, err := ca.Open(t.Context(), ca.Config{
		TrustDomain: td, Store: &catest.Store{}, KEK: make([]byte, 32), ServerID: fleet.ServerID(td), IssuingTTL: 120 * 24 * time.Hour, Now: now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// open opens the fleet of what is stored and runs it.
func (w *world) open() {
	w.Helper()
	f, err := fleet.Open(w.Context(), w.fleetConfig)
	if err != nil {
		w.Fatal(err)
	}
	w.fleet, w.cfg.Fleet = f, f
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	w.Cleanup(func() { cancel(); <-done })
}

// certificates returns a certificate of an ID, made when it is first asked for.
func certificates(t *testing.T, a *ca.Authority, id identity.ID) func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	t.Helper()
	once := sync.OnceValues(func() (*tls.Certificate, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		chain, err := a.SignX509(context.Background(), id, key.Public(), time.Hour, ca.SignOptions{})
		if err != nil {
			return nil, err
		}
		c := &tls.Certificate{PrivateKey: key}
		for _, x := range chain {
			c.Certificate = append(c.Certificate, x.Raw)
		}
		return c, nil
	})
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return once() }
}

// start serves, at the address of before if there was one.
func (w *world) start() {
	w.Helper()
	if w.address == "" {
		w.address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", w.address)
	if err != nil {
		w.Fatal(err)
	}
	w.address = l.Addr().String()
	s, err := agent.NewServer(w.cfg)
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.Errorf("Serve: %v", err)
		}
	})
}

func rec() event.Record { return event.NewRecord(`User::"operator"`, "test", "test") }

func (w *world) token(machine string) string {
	w.Helper()
	_, secret, err := w.fleet.CreateToken(w.Context(), fleet.TokenRequest{Machine: machine}, rec())
	if err != nil {
		w.Fatal(err)
	}
	return secret.Reveal()
}

func (w *world) client(dir string, now func() time.Time) *agent.Client {
	w.Helper()
	c, err := agent.Dial(w.Context(), agent.Config{Server: w.address, Credentials: agent.FileCredentials(dir), Version: "v0", Meter: w.meter, Now: now})
	if err != nil {
		w.Fatal(err)
	}
	return c
}

// joined returns the client of a machine that has joined.
func (w *world) joined(machine string) *agent.Client {
	w.Helper()
	c := w.client(w.TempDir(), nil)
	if err := c.Join(w.Context(), agent.Joining{Token: w.token(machine), Machine: machine}); err != nil {
		w.Fatal(err)
	}
	return c
}

// session runs a session until the test ends or stop is called.
func (w *world) session(c *agent.Client, cfg agent.SessionConfig) (s *agent.Session, stop func()) {
	w.Helper()
	s = c.Session(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.Errorf("Run: %v", err)
		}
	})
	w.Cleanup(stop)
	return s, stop
}

func (w *world) connected(s *agent.Session) {
	w.Helper()
	eventually(w, "the session is connected", func() bool { return s.Status().Connected })
}

func observed(instance, service string) fleet.Observed {
	facts, err := identity.NewFactSet(identity.Fact{Name: identity.FactService, Value: service, Source: identity.FromOperator})
	if err != nil {
		panic(err)
	}
	return fleet.Observed{Instance: instance, Facts: facts}
}

// receiver keeps the domain as an agent would, and checks the order of what it gets. Concurrency: safe.
type receiver struct {
	mu        sync.Mutex
	revision  uint64
	state     map[string]string
	snapshots int
	deltas    []uint64
	wrong     []string
	hold      chan struct{} // Apply waits for it, if set
}

func (r *receiver) Revision() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.revision
}

func (r *receiver) Apply(ctx context.Context, changes []fleet.Change, snapshot bool) error {
	r.mu.Lock()
	hold := r.hold
	r.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if snapshot || r.state == nil {
		r.state = map[string]string{}
	}
	if snapshot {
		r.snapshots++
		r.revision = 0
	}
	for _, c := range changes {
		key := string(c.Kind) + "/" + c.Key
		if !snapshot {
			if c.Revision <= r.revision {
				r.wrong = append(r.wrong, fmt.Sprintf("revision %d after %d", c.Revision, r.revision))
			}
			r.deltas = append(r.deltas, c.Revision)
		}
		r.revision = max(r.revision, c.Revision)
		if c.Deleted {
			delete(r.state, key)
		} else {
			r.state[key] = string(c.Payload)
		}
	}
	return nil
}

func (r *receiver) get(key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state[key]
}

func (r *receiver) check(t testing.TB) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.wrong {
		t.Error(w)
	}
	if !slices.IsSorted(r.deltas) {
		t.Error("deltas came out of order")
	}
}

// newSpool returns a running spool.
func newSpool(t *testing.T) *spool.Spool {
	t.Helper()
	s, err := spool.Open(t.TempDir(), spool.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func want(t testing.TB, err error, code *refusal.Error) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("error = %v, want code %s", err, code.Code)
		return
	}
	if e := refusal.As(err); e.What == "" || e.Why == "" || e.Do == "" || e.Kind == "" {
		t.Errorf("refusal %s lacks a part: %#v", e.Code, e)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 800 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("did not come about: %s", what)
}

func request(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
