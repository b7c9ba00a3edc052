package machine

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// view is the domain as this machine last heard of it; immutable, swapped whole.
type view struct {
	revision    uint64
	set         *set.Set
	edition     uint64
	source      *fleet.PolicySet // what set was parsed from, to be kept on disk
	overrides   []set.Override
	bundle      *identity.Bundle
	identities  map[string]fleet.Identity // by instance
	endpoints   map[string]fleet.Endpoint // by key
	revocations map[string]fleet.Revocation
}

func emptyView(td identity.TrustDomain) *view {
	builtin, err := set.Parse(nil)
	if err != nil {
		panic(fmt.Sprintf("machine: the built-in policy set of %s does not parse: %v", td, err)) // a broken build
	}
	return &view{
		set: builtin, identities: map[string]fleet.Identity{}, endpoints: map[string]fleet.Endpoint{},
		revocations: map[string]fleet.Revocation{},
	}
}

// Revision returns the revision that this machine has applied; a resumed stream begins after it.
func (m *Machine) Revision() uint64 { return m.view.Load().revision }

// Apply takes changes from the server, in order; a snapshot replaces everything. What it does not understand in one
// change it leaves as it was, and says so: a bad policy set must not take the good one away.
// Durability: the policy set, the bundle and the revision are on disk when it returns.
// Trust: the server is trusted for the domain; a defect in what it sends is still met with a refusal, not a crash.
func (m *Machine) Apply(ctx context.Context, changes []fleet.Change, snapshot bool) error {
	old := m.view.Load()
	next := *old
	if snapshot {
		next.identities, next.endpoints = map[string]fleet.Identity{}, map[string]fleet.Endpoint{}
		next.revocations = map[string]fleet.Revocation{}
		next.revision = 0 // the server may have been restored, and count from lower down
	} else {
		next.identities, next.endpoints = maps.Clone(old.identities), maps.Clone(old.endpoints)
		next.revocations = maps.Clone(old.revocations)
	}
	for _, c := range changes {
		if err := m.applyOne(&next, c); err != nil {
			m.cfg.Meter.Count("changes_refused", 1, "kind", string(c.Kind))
			m.controlEvent("change.refused", err.Error(), map[string]any{"kind": string(c.Kind), "revision": c.Revision})
			m.log.Error("a change from the server was refused; what it replaces stays in force",
				"kind", string(c.Kind), "key", c.Key, "revision", c.Revision, "error", err)
		}
		next.revision = max(next.revision, c.Revision)
	}
	m.view.Store(&next)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.workloads {
		if next.bundle != old.bundle || len(next.revocations)+len(old.revocations) > 0 {
			w.touch()
		}
		_, was := old.identities[w.Instance]
		peer, is := next.identities[w.Instance]
		switch {
		case is:
			m.assignLocked(w, peer)
		case was && !w.ID.IsZero():
			// The server took it away: nothing is served under it from now on, and the next report says why.
			m.assignLocked(w, fleet.Identity{})
			w.dirty = true
		}
	}
	return m.saveLocked()
}

func (m *Machine) applyOne(v *view, c fleet.Change) error {
	switch c.Kind {
	case fleet.KindIdentity:
		return upsert(v.identities, c)
	case fleet.KindEndpoint:
		return upsert(v.endpoints, c)
	case fleet.KindRevocation:
		return upsert(v.revocations, c)
	case fleet.KindBundle:
		bundle, err := identity.ParseBundle(m.cfg.TrustDomain, c.Payload)
		if err != nil {
			return err
		}
		if len(bundle.X509Authorities) == 0 {
			return fmt.Errorf("bundle of %s: it holds no X.509 authority", m.cfg.TrustDomain)
		}
		v.bundle = bundle
		return nil
	case fleet.KindPolicySet:
		var p fleet.PolicySet
		if err := json.Unmarshal(c.Payload, &p); err != nil {
			return fmt.Errorf("policy set: %w", err)
		}
		return v.takePolicySet(&p)
	default:
		return fmt.Errorf("a change of kind %q, which this agent does not know", c.Kind) // a newer server: harmless
	}
}

func (v *view) takePolicySet(p *fleet.PolicySet) error {
	var overrides []set.Override
	if len(p.Overrides) > 0 {
		if err := json.Unmarshal(p.Overrides, &overrides); err != nil {
			return fmt.Errorf("overrides of policy set %d: %w", p.Version, err)
		}
	}
	if v.source == nil || v.source.Digest != p.Digest || v.source.Version != p.Version {
		files := make([]set.File, len(p.Files))
		for i, f := range p.Files {
			files[i] = set.File{Name: f.Name, Content: f.Content}
		}
		parsed, err := set.Parse(files)
		if err != nil {
			return fmt.Errorf("policy set %d: %w", p.Version, err)
		}
		v.set = parsed
	}
	v.source, v.edition, v.overrides = p, p.Version, overrides
	return nil
}

func upsert[T any](into map[string]T, c fleet.Change) error {
	if c.Deleted {
		delete(into, c.Key)
		return nil
	}
	var v T
	if err := json.Unmarshal(c.Payload, &v); err != nil {
		return fmt.Errorf("%s %s: %w", c.Kind, c.Key, err)
	}
	into[c.Key] = v
	return nil
}

// assignLocked takes what the change log says of a workload of ours: its identity and the facts that only the server sets.
func (m *Machine) assignLocked(w *workload, peer fleet.Identity) {
	if peer.ID != w.ID {
		w.ID, w.refused, w.Refusal = peer.ID, nil, ""
		w.svid, w.renewAt, w.jwts = nil, time.Time{}, map[string]*cachedJWT{}
		w.touch()
		m.wake()
	}
}

// revoked returns the refusal that withdraws trust from an SVID, or nil.
func (v *view) revoked(s *identity.X509SVID) error {
	spki := s.SPKI()
	for _, r := range v.revocations {
		if !r.Expires.IsZero() && time.Now().After(r.Expires) {
			continue
		}
		if r.Identity == s.ID && !r.Identity.IsZero() || r.SPKI != "" && r.SPKI == hex.EncodeToString(spki[:]) {
			return &refusal.Error{
				Kind: refusal.Denied, Code: "identity-revoked", What: "identity " + s.ID.String(), Why: "it was revoked: " + r.Reason,
				Do: "ask an operator; redoubt get revocations shows " + r.ID,
			}
		}
	}
	return nil
}

// Status is what the machine knows of the domain, for `doctor` and tests.
type Status struct {
	Machine    string   `json:"machine"`
	Revision   uint64   `json:"revision"`
	PolicySet  uint64   `json:"policy_set"`
	Digest     string   `json:"policy_digest"`
	Workloads  int      `json:"workloads"`
	Identities int      `json:"identities"`
	Endpoints  int      `json:"endpoints"`
	Released   *Release `json:"released,omitempty"`
}

// Status returns a summary.
func (m *Machine) Status() Status {
	v := m.view.Load()
	m.mu.Lock()
	defer m.mu.Unlock()
	return Status{
		Machine: m.cfg.ID, Revision: v.revision, PolicySet: v.edition, Digest: v.set.Digest(), Workloads: len(m.workloads),
		Identities: len(v.identities), Endpoints: len(v.endpoints), Released: m.released,
	}
}
