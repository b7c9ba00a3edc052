package fleet_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/refusal"
)

const td = identity.TrustDomain("example.org")

// clock is a clock that the test sets. Concurrency: safe.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// rules issue /service/<service> unless told otherwise.
type rules struct {
	mu      sync.Mutex
	path    string // template with %s, "" for /service/%s
	version uint64
	changed chan struct{}
}

var errNoRule = &refusal.Error{Kind: refusal.Unknown, Code: "no-issuance-rule", What: "identity", Why: "no rule matches", Do: "add one"}

func (r *rules) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	service := facts.Text(identity.FactService)
	if service == "" {
		return identity.ID{}, json.RawMessage(`{"rules":[]}`), errNoRule
	}
	if service == "broken" {
		return identity.ID{}, nil, errors.New("internal")
	}
	path := "/service/" + service
	if r.path != "" {
		path = strings.ReplaceAll(r.path, "%s", service)
	}
	id, err := identity.ParseID("spiffe://" + string(td) + path)
	if strings.HasPrefix(r.path, "spiffe://") {
		id, err = identity.ParseID(r.path)
	}
	return id, json.RawMessage(`{"winner":"services"}`), err
}

func (r *rules) PolicySet() fleet.PolicySet {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fleet.PolicySet{Version: r.version, Digest: fmt.Sprint(r.version), Files: []fleet.PolicyFile{{Name: "a.cedar", Content: "permit(principal, action, resource);"}}}
}

func (r *rules) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.changed
}

func (r *rules) set(path string) {
	ch := r.Changed()
	_ = ch
	r.mu.Lock()
	defer r.mu.Unlock()
	r.path, r.version = path, r.version+1
	close(r.changed)
	r.changed = make(chan struct{})
}

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

type world struct {
	*testing.T
	fleet *fleet.Fleet
	store *fleettest.Memory
	ca    *ca.Authority
	rules *rules
	clock *clock
	meter *counts
	cfg   fleet.Config
}

func newWorld(t *testing.T, change func(*fleet.Config)) *world {
	t.Helper()
	w := &world{T: t, store: &fleettest.Memory{}, rules: &rules{}, clock: &clock{at: time.Now()}, meter: &counts{}}
	authority, err := ca.Open(t.Context(), ca.Config{TrustDomain: td, Store: &catest.Store{}, KEK: make([]byte, 32), ServerID: fleet.ServerID(td), IssuingTTL: 120 * 24 * time.Hour, Now: w.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	w.ca = authority
	w.cfg = fleet.Config{TrustDomain: td, Store: w.store, Authority: authority, Rules: w.rules, Meter: w.meter, Now: w.clock.now}
	if change != nil {
		change(&w.cfg)
	}
	w.open()
	return w
}

func (w *world) open() {
	w.Helper()
	f, err := fleet.Open(w.Context(), w.cfg)
	if err != nil {
		w.Fatal(err)
	}
	w.fleet = f
}

func rec() event.Record { return event.NewRecord(`User::"operator"`, "test", "test") }

func (w *world) token(req fleet.TokenRequest) fleet.JoinSecret {
	w.Helper()
	_, secret, err := w.fleet.CreateToken(w.Context(), req, rec())
	if err != nil {
		w.Fatal(err)
	}
	return secret
}

type key struct {
	*ecdsa.PrivateKey
	csr  []byte
	spki string
}

func newKey(t testing.TB) key {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	return key{k, csr, hex.EncodeToString(sum[:])}
}

func (w *world) join(machine string) (key, fleet.Joined) {
	w.Helper()
	k := newKey(w)
	j, err := w.fleet.Join(w.Context(), fleet.JoinRequest{Secret: w.token(fleet.TokenRequest{Machine: machine}).Reveal(), Machine: machine, CSR: k.csr})
	if err != nil {
		w.Fatal(err)
	}
	return k, j
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

func fact(name string, value any, source identity.Source) identity.Fact {
	return identity.Fact{Name: name, Value: value, Source: source, Evidence: "test"}
}

func facts(t testing.TB, list ...identity.Fact) identity.FactSet {
	t.Helper()
	s, err := identity.NewFactSet(list...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w *world) observed(instance, service string, more ...identity.Fact) fleet.Observed {
	w.Helper()
	return fleet.Observed{Instance: instance, Facts: facts(w, append(more, fact(identity.FactService, service, identity.FromOperator))...)}
}

func (w *world) report(machine string, r fleet.Report) []fleet.Assigned {
	w.Helper()
	a, err := w.fleet.Report(w.Context(), machine, r)
	if err != nil {
		w.Fatal(err)
	}
	return a
}

// live returns the live changes by kind/key.
func (w *world) live() map[string]string {
	w.Helper()
	out := map[string]string{}
	err := w.store.View(w.Context(), func(tx fleet.Tx) error {
		list, err := tx.Changes.Live(w.Context(), fleet.Position{}, 1000)
		for _, c := range list {
			out[string(c.Kind)+"/"+c.Key] = string(c.Payload)
		}
		return err
	})
	if err != nil {
		w.Fatal(err)
	}
	return out
}

// records counts audit records by action.
func (w *world) records(action string) (n int) {
	for _, r := range w.store.Records() {
		if r.Action == action {
			n++
		}
	}
	return n
}

// run runs the fleet until the test ends.
func (w *world) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.fleet.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.Error(err)
		}
	})
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 500 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("did not come about: %s", what)
}
