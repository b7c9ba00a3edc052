// Package apitest puts a management API together for tests: the real fleet, policy set and authority on stores in memory,
// an audit log that checks what is asked of it, and knobs for what only goes wrong seldom.
//
// Trust: for tests only.
package apitest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/policy/set/settest"
)

// TrustDomain is that of every [House].
const TrustDomain = identity.TrustDomain("test.redoubt")

// House is everything that a management API needs, and the secret of its operator.
//
// Config may be changed before [House.Handler] is called.
type House struct {
	Config    api.Config
	Secret    string // of User::"operator"
	Fleet     *fleet.Fleet
	Events    *fleettest.Memory
	Sets      *settest.Memory
	Registry  *set.Registry
	Authority *ca.Authority
	Audit     *AuditLog
	Engine    *Engine
	Meter     *Meter
	Log       *Log
}

// New returns a house. Its fleet stores events that were emitted until the test ends.
func New(t testing.TB) *House {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	h := &House{Meter: &Meter{counts: map[string]int64{}}, Log: &Log{}, Sets: &settest.Memory{}, Events: &fleettest.Memory{}}
	keys := &catest.Store{}
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	var err error
	h.Authority, err = ca.Open(ctx, ca.Config{TrustDomain: TrustDomain, Store: keys, KEK: make([]byte, 32)})
	must(err)
	h.Registry, err = set.Open(ctx, set.Config{Store: h.Sets, Overrides: h.Sets})
	must(err)
	h.Fleet, err = fleet.Open(ctx, fleet.Config{
		TrustDomain: TrustDomain, Store: h.Events, Authority: h.Authority, Rules: rules{h.Registry},
	})
	must(err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Fleet.Run(ctx) // returns when the test ends
	}()
	t.Cleanup(func() { cancel(); <-done })
	h.Audit = &AuditLog{records: []func() []event.Record{h.Events.Records, h.Sets.Records, keys.Records}}
	h.Engine = &Engine{real: h.Registry}
	var hash string
	h.Secret, hash = api.NewCredential()
	operators, err := api.NewCredentials(map[string]string{"operator": hash})
	must(err)
	h.Config = api.Config{
		TrustDomain: TrustDomain, Version: "v0.0.0-test", Operators: operators, Engine: h.Engine, Authority: h.Authority,
		Rotation: h.Authority, Machines: h.Fleet, Tokens: h.Fleet, Workloads: h.Fleet, Withdrawals: h.Fleet,
		Quarantines: h.Fleet, Events: h.Fleet, PolicySet: h.Registry, Editions: h.Registry, Overrides: h.Registry,
		Audit: h.Audit, Sink: h.Fleet, Meter: h.Meter, Logger: slog.New(slog.NewJSONHandler(h.Log, nil)),
	}
	return h
}

// Handler returns the API.
func (h *House) Handler(t testing.TB) http.Handler {
	t.Helper()
	handler, err := api.New(h.Config)
	if err != nil {
		t.Fatal(err)
	}
	return handler
}

// rules is the policy set as a fleet sees it.
type rules struct{ *set.Registry }

func (r rules) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error) {
	id, issuance, err := r.Registry.Issue(td, facts)
	raw, jsonErr := json.Marshal(issuance)
	if jsonErr != nil {
		return identity.ID{}, nil, jsonErr
	}
	return id, raw, err
}

func (r rules) PolicySet() fleet.PolicySet {
	_, edition := r.Current()
	return fleet.PolicySet{Version: edition.Version, Digest: edition.Digest}
}

// Engine is the policy set's, or whatever the test puts in its place.
type Engine struct {
	real api.Engine
	mu   sync.Mutex
	// guarded by mu
	instead func(*policy.Request) *policy.Decision
	asked   []policy.Request
}

// Decide implements api.Engine.
func (e *Engine) Decide(ctx context.Context, r *policy.Request) *policy.Decision {
	e.mu.Lock()
	instead := e.instead
	e.asked = append(e.asked, *r)
	e.mu.Unlock()
	if instead != nil {
		return instead(r)
	}
	return e.real.Decide(ctx, r)
}

// Answer makes the engine answer everything with this verdict, in this mode; "" is the real engine again.
func (e *Engine) Answer(v policy.Verdict, mode policy.Mode) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.instead = nil; v == "" {
		return
	}
	e.instead = func(r *policy.Request) *policy.Decision {
		return &policy.Decision{
			ID: policy.NewID(), Time: time.Now().UTC(), Verdict: v, Mode: mode, Request: *r, Machine: "server",
			Explanation: policy.Explanation{Reason: policy.ReasonDefault, Summary: "the test says so"},
		}
	}
}

// Silence makes the engine answer nil.
func (e *Engine) Silence() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.instead = func(*policy.Request) *policy.Decision { return nil }
}

// Asked returns the requests so far, and forgets them.
func (e *Engine) Asked() []policy.Request {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := e.asked
	e.asked = nil
	return out
}

// AuditLog is an audit log without a tree. It indexes what the stores were given, and holds callers to the contract:
// waiting for a record that no store has is an error.
type AuditLog struct {
	records []func() []event.Record

	mu     sync.Mutex
	waited []string // guarded by mu
	fail   error    // guarded by mu
	full   error    // guarded by mu
}

// Wait implements api.AuditLog.
func (a *AuditLog) Wait(ctx context.Context, id string) (uint64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fail != nil {
		return 0, a.fail
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if !slices.ContainsFunc(a.Records(), func(r event.Record) bool { return r.ID == id }) {
		return 0, fmt.Errorf("waited for record %s, which no store was given", id)
	}
	a.waited = append(a.waited, id)
	return uint64(len(a.waited)), nil
}

// Records returns every record that a store was given.
func (a *AuditLog) Records() []event.Record {
	var out []event.Record
	for _, list := range a.records {
		out = append(out, list()...)
	}
	return out
}

// Waited returns the ids waited for so far, and forgets them.
func (a *AuditLog) Waited() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.waited
	a.waited = nil
	return out
}

// FailWait makes every Wait fail, and RefuseChanges every Ready; nil is as before.
func (a *AuditLog) FailWait(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fail = err
}

// RefuseChanges makes Ready answer err.
func (a *AuditLog) RefuseChanges(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.full = err
}

// Ready implements api.AuditLog.
func (a *AuditLog) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.full
}

// Status implements api.AuditLog.
func (a *AuditLog) Status(context.Context) (audit.Status, error) {
	n := uint64(len(a.Records()))
	return audit.Status{Origin: "test.redoubt/audit", Size: n, Published: n}, nil
}

// Checkpoint implements api.AuditLog.
func (a *AuditLog) Checkpoint() ([]byte, error) {
	return fmt.Appendf(nil, "test.redoubt/audit\n%d\nAAAA\n\n— test.redoubt/audit AAAA\n", len(a.Records())), nil
}

// Verifier implements api.AuditLog.
func (a *AuditLog) Verifier() string { return "test.redoubt/audit+00000000+AAAA" }
