package fleet

import (
	"encoding/json"

	"github.com/redoubtsec/redoubt/identity"
)

// ChangeKind says what a [Change] is about.
type ChangeKind string

// The kinds of change, and the type of their payload.
const (
	KindIdentity   ChangeKind = "identity"   // key: instance; [Identity]
	KindPolicySet  ChangeKind = "policy_set" // key: "current"; [PolicySet]
	KindEndpoint   ChangeKind = "endpoint"   // key: instance/port; [Endpoint]
	KindBundle     ChangeKind = "bundle"     // key: trust domain; a SPIFFE bundle document
	KindRevocation ChangeKind = "revocation" // key: id; [Revocation]
)

// KeyCurrent is the key of the one change of kind policy_set.
const KeyCurrent = "current"

// Change is one step of the domain's state: the thing of this kind and key now is Payload, or is no more. Changes are
// idempotent: applying one twice, or only the last of several to one key, gives the same state.
type Change struct {
	// Revision is given by the change log; it rises strictly, with gaps.
	Revision uint64          `json:"revision"`
	Kind     ChangeKind      `json:"kind"`
	Key      string          `json:"key"`
	Payload  json.RawMessage `json:"payload,omitempty"`
	Deleted  bool            `json:"deleted,omitempty"`
}

// Identity is the payload of a change of kind identity: who an instance is, and what is known of it. Machines are told
// of all identities of the domain: any of them may be called by any other.
type Identity struct {
	Instance string           `json:"instance"`
	ID       identity.ID      `json:"identity"`
	Service  string           `json:"service,omitempty"`
	Machine  string           `json:"machine"`
	Facts    identity.FactSet `json:"facts"`
	Epoch    uint64           `json:"epoch"`
}

// PolicySet is the payload of a change of kind policy_set: the edition in force with the files it was applied from, and
// the overrides (the panic switch) that are on.
type PolicySet struct {
	Version   uint64          `json:"version"`
	Digest    string          `json:"digest"`
	Files     []PolicyFile    `json:"files,omitempty"`
	Overrides json.RawMessage `json:"overrides,omitempty"` // a JSON list of policy/set's Override
}

// PolicyFile is one file of a policy set.
type PolicyFile struct {
	Name    string `json:"name"`
	Content string `json:"content"`
}

// Position is a place in the live state, in order of kind and key. Zero value: before the first.
type Position struct {
	Kind ChangeKind
	Key  string
}
