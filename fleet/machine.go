package fleet

import (
	"time"

	"github.com/redoubtsec/redoubt/identity"
)

// MachineState says whether a machine may speak.
type MachineState string

// The states of a machine. Whether it was heard of lately is [Machine.Lost], which is no state: a lost machine comes back.
const (
	MachineJoined  MachineState = "joined"
	MachineRevoked MachineState = "revoked"
)

// Machine is one host whose agent joined.
//
// Shape: ID is 1 to 63 of [a-z0-9.-], begins and ends with a letter or digit; it names the machine in its SPIFFE ID
// (/machine/<id>), in facts and in policies. SPKI is 64 hex digits, the SHA-256 of the SubjectPublicKeyInfo of its key.
type Machine struct {
	ID   string `json:"id"`
	Name string `json:"name"` // for people; the ID until an operator says otherwise
	// State is set by the server only.
	State MachineState `json:"state"`
	SPKI  string       `json:"spki"`
	// Previous is the key before the last rotation. It is accepted until the agent first speaks with the new one: the
	// answer that carried the new certificate may have been lost.
	Previous string    `json:"previous_spki,omitempty"`
	Joined   time.Time `json:"joined"`
	// Rotated is when SPKI took the place of another key; zero: it is the key it joined with.
	Rotated  time.Time `json:"rotated,omitzero"`
	LastSeen time.Time `json:"last_seen"`
	// Lost is computed when read: nothing was heard for [Config.LostAfter].
	Lost    bool             `json:"lost"`
	Version string           `json:"version,omitempty"` // of the agent, as it says itself
	Facts   identity.FactSet `json:"facts"`
}

// JoinToken lets one agent join once, as one machine, until it expires. The secret is shown once, in a [JoinSecret];
// what is stored is its hash.
type JoinToken struct {
	ID      string    `json:"id"`      // t-…
	Machine string    `json:"machine"` // the id of the machine it is for
	Replace bool      `json:"replace"` // it may take the place of a machine of that id which has joined already
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Used    time.Time `json:"used,omitzero"`
	Author  string    `json:"author"` // Cedar UID of who made it
	// Hash is the SHA-256 of the secret (256 random bits, so a plain hash is enough). Never rendered.
	Hash [32]byte `json:"-"`
}

// Revocation withdraws trust from an identity, a machine or one key, until it expires.
//
// Shape: exactly one of Identity, Machine and SPKI is set. Expires zero: it does not.
type Revocation struct {
	ID       string      `json:"id"` // v-…
	Identity identity.ID `json:"identity,omitzero"`
	Machine  string      `json:"machine,omitempty"`
	SPKI     string      `json:"spki,omitempty"` // 64 hex digits
	Reason   string      `json:"reason"`
	Author   string      `json:"author"`
	Created  time.Time   `json:"created"`
	Expires  time.Time   `json:"expires,omitzero"`
}

// Quarantine marks an identity, or one instance of it, with the fact risk.quarantined, until it is lifted or expires.
// What that forbids is for policies to say.
//
// Shape: exactly one of Identity and Instance is set. Expires zero: it does not.
type Quarantine struct {
	ID       string      `json:"id"` // q-…
	Identity identity.ID `json:"identity,omitzero"`
	Instance string      `json:"instance,omitempty"`
	Reason   string      `json:"reason"`
	Author   string      `json:"author"`
	Created  time.Time   `json:"created"`
	Expires  time.Time   `json:"expires,omitzero"`
}
