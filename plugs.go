package redoubt

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// The plugs between rooms whose sockets differ in shape only.

// rules is the policy set as the fleet needs it.
type rules struct{ registry *set.Registry }

// Issue implements fleet.Rules.
func (r rules) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error) {
	id, issuance, err := r.registry.Issue(td, facts)
	raw, jsonErr := json.Marshal(issuance)
	if jsonErr != nil {
		raw = nil // the identity stands; only its explanation is lost
	}
	return id, raw, err
}

// PolicySet implements fleet.Rules.
func (r rules) PolicySet() fleet.PolicySet {
	s, edition := r.registry.Current()
	p := fleet.PolicySet{Version: edition.Version, Digest: s.Digest()}
	for _, f := range s.Files() {
		p.Files = append(p.Files, fleet.PolicyFile{Name: f.Name, Content: f.Content})
	}
	if overrides := r.registry.Overrides(); len(overrides) > 0 {
		p.Overrides, _ = json.Marshal(overrides) // overrides are plain data
	}
	return p
}

// Changed implements fleet.Rules.
func (r rules) Changed() <-chan struct{} { return r.registry.Changed() }

// kindProtections is the event in which an agent says what it protects, with the list as detail.
const kindProtections = "protections"

// protections are what the agents last said of themselves.
type protections struct{ fleet *fleet.Fleet }

// Protections implements api.Protections. What a machine said that was not heard of lately is said no longer.
func (p protections) Protections(ctx context.Context) ([]policy.Protection, error) {
	out := []policy.Protection{}
	for after := ""; ; {
		machines, err := p.fleet.Machines(ctx, after, fleet.MaxPage)
		if err != nil {
			return nil, err
		}
		for _, m := range machines {
			of, err := p.of(ctx, m)
			if err != nil {
				return nil, err
			}
			out = append(out, of...)
			after = m.ID
		}
		if len(machines) < fleet.MaxPage {
			return out, nil
		}
	}
}

func (p protections) of(ctx context.Context, m fleet.Machine) ([]policy.Protection, error) {
	nothing := func(reason, change string) []policy.Protection {
		return []policy.Protection{{Machine: m.ID, Name: "machine", State: policy.NotEnforceable, Reason: reason, Change: change}}
	}
	if m.State == fleet.MachineRevoked {
		return nothing("the machine was revoked", "let it join anew with another token"), nil
	}
	if m.Lost {
		return nothing("the machine was last heard of at "+m.LastSeen.UTC().Format(time.RFC3339), "start its agent, or look at its network"), nil
	}
	told, err := p.fleet.Events(ctx, fleet.EventQuery{Newest: true, Machine: m.ID, Kind: kindProtections, Limit: maxParts})
	if err != nil {
		return nil, err
	}
	if len(told) == 0 {
		return nothing("its agent has not told yet", "wait for its first probe"), nil
	}
	var out []policy.Protection
	for _, t := range told {
		if t.Event.Attrs["round"] != told[0].Event.Attrs["round"] {
			break
		}
		var part []policy.Protection
		if err := json.Unmarshal(t.Event.Detail, &part); err != nil {
			return nothing("what its agent told cannot be read", "upgrade the agent"), nil //nolint:nilerr // it is said
		}
		out = append(part, out...)
	}
	for i := range out {
		out[i].Machine = m.ID // whoever speaks speaks of itself
	}
	return out, nil
}

// The bounds of what an agent tells of its protections: one event holds so many, and one round so many events.
const (
	protectionsPart = 150
	maxParts        = 64
)

// protectionsEvents is what an agent tells of its protections: one round, in parts that each fit into an event.
func protectionsEvents(list []policy.Protection) ([]event.Event, error) {
	round := identity.Unique("round")
	var out []event.Event
	for part := range slices.Chunk(list, protectionsPart) {
		raw, err := json.Marshal(part)
		if err != nil {
			return nil, fmt.Errorf("render protections: %w", err)
		}
		e := event.New(event.Control, kindProtections)
		e.Detail, e.Attrs = raw, map[string]any{"round": round}
		if out = append(out, e); len(out) == maxParts {
			break
		}
	}
	return out, nil
}
