package machine

import (
	"context"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// Decide answers a request with the policy set in force here, records the decision, and returns it. It works without the
// server. It never fails: a request that cannot be decided is a Deny with its reason.
func (m *Machine) Decide(ctx context.Context, req *policy.Request) *policy.Decision {
	v := m.view.Load()
	d := v.set.Decide(ctx, req, set.DecideOptions{
		Machine: m.cfg.ID, Edition: v.edition, Overrides: v.overrides, Released: m.Released() != nil,
	})
	m.decisions.add(d)
	for _, f := range d.Explanation.Failures {
		// A forbid that cannot be evaluated does not forbid: that must not go unseen.
		m.cfg.Meter.Count("policy_failures", 1, "effect", string(f.Policy.Effect))
		m.log.Warn("a policy could not be evaluated", "policy", f.Policy.ID, "effect", string(f.Policy.Effect), "redoubt.decision.id", string(d.ID))
	}
	m.cfg.Meter.Count("decisions", 1, "verdict", string(d.Verdict), "mode", string(d.Mode))
	m.cfg.Sink.Emit(event.OfDecision(d))
	return d
}

// Decision returns a decision that was made here, while it is remembered (the last 4096).
func (m *Machine) Decision(id policy.ID) (*policy.Decision, error) {
	if d := m.decisions.get(id); d != nil {
		return d, nil
	}
	return nil, &refusal.Error{
		Kind: refusal.Unknown, Code: "unknown-decision", What: "decision " + string(id),
		Why: "this machine does not remember it: it keeps its last 4096", Do: "ask the server with redoubt why " + string(id),
	}
}

// history keeps the last decisions, oldest out first.
type history struct {
	mu   sync.Mutex
	ring []*policy.Decision             // guarded by mu
	byID map[policy.ID]*policy.Decision // guarded by mu
	next int                            // guarded by mu
}

func newHistory(n int) *history {
	return &history{ring: make([]*policy.Decision, n), byID: make(map[policy.ID]*policy.Decision, n)}
}

func (h *history) add(d *policy.Decision) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.ring[h.next]; old != nil {
		delete(h.byID, old.ID)
	}
	h.ring[h.next], h.byID[d.ID] = d, d
	h.next = (h.next + 1) % len(h.ring)
}

func (h *history) get(id policy.ID) *policy.Decision {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.byID[id]
}

// Release is the break-glass of this machine: while it holds, nothing is refused here.
type Release struct {
	ID      string    `json:"id"`
	Time    time.Time `json:"time"`
	Actor   string    `json:"actor"`
	Reason  string    `json:"reason,omitempty"`
	Lifted  []string  `json:"lifted"` // what was unpinned from the kernel
	Stays   []string  `json:"stays"`  // what cannot be lifted from programs that run
	Failure string    `json:"failure,omitempty"`
}

// staysAfterRelease says what a release cannot take back: the kernel lets nobody loosen a running process.
var staysAfterRelease = []string{
	"workloads started by redoubt run keep their user, empty capabilities, no_new_privs and seccomp filter until they are restarted",
}

// Released returns the release in force, or nil.
func (m *Machine) Released() *Release {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.released
}

// Release lifts everything on this machine: from now on every decision lets its request through and says so. It needs no
// server, survives a restart of the agent, and is recorded here and, once it is reached, by the server.
// Durability: on disk when it returns.
func (m *Machine) Release(_ context.Context, actor, reason string) (*Release, error) {
	r := &Release{ID: newReleaseID(), Time: time.Now().UTC(), Actor: actor, Reason: reason, Lifted: []string{}, Stays: staysAfterRelease}
	if m.cfg.Unpin != nil {
		lifted, err := m.cfg.Unpin()
		if err != nil {
			r.Failure = err.Error()
		}
		r.Lifted = append(r.Lifted, lifted...)
	}
	m.mu.Lock()
	m.released = r
	err := m.saveLocked()
	m.mu.Unlock()
	m.controlEvent("machine.released", "everything on this machine was lifted by "+actor,
		map[string]any{"release": r.ID, "actor": actor, "reason": reason, "lifted": r.Lifted})
	m.cfg.Meter.Count("releases", 1)
	return r, err
}

// Resume ends a release. Errors: refusal "not-released".
func (m *Machine) Resume(_ context.Context, actor string) error {
	m.mu.Lock()
	if m.released == nil {
		m.mu.Unlock()
		return &refusal.Error{
			Kind: refusal.Conflict, Code: "not-released", What: "end the release of this machine", Why: "it is not released", Do: "nothing",
		}
	}
	id := m.released.ID
	m.released = nil
	err := m.saveLocked()
	m.mu.Unlock()
	m.controlEvent("machine.resumed", "the release was ended by "+actor, map[string]any{"release": id, "actor": actor})
	return err
}
