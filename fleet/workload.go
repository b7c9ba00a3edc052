package fleet

import (
	"encoding/json"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// WorkloadState says whether the workload is there.
type WorkloadState string

// The states of a workload. Gone ones are kept for [Config.KeepGone], for those who ask what was.
const (
	WorkloadPresent WorkloadState = "present"
	WorkloadGone    WorkloadState = "gone"
)

// Listen is one port that a workload declares to listen on.
type Listen struct {
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`          // declared: http, tcp, …
	Address  string `json:"address,omitempty"` // where others reach it, if the agent knows
	Netns    string `json:"netns,omitempty"`   // inode of its network namespace, if it has one of its own
}

// Workload is one running instance, as the server knows it.
//
// Shape: either ID is set, or Refusal says why it has none. Epoch rises whenever identity or facts change; a fact that
// changed carries the epoch of the workload at that time.
type Workload struct {
	Instance string           `json:"instance"` // w-…, unique in the domain
	Machine  string           `json:"machine"`
	Service  string           `json:"service,omitempty"`
	Facts    identity.FactSet `json:"facts"`
	ID       identity.ID      `json:"identity,omitzero"`
	Refusal  *Refusal         `json:"refusal,omitempty"`
	// Issuance is the explanation of the issuance rules: JSON of their own shape.
	Issuance json.RawMessage `json:"issuance,omitempty"`
	State    WorkloadState   `json:"state"`
	Since    time.Time       `json:"since"`
	Seen     time.Time       `json:"seen"`
	Listen   []Listen        `json:"listen,omitempty"`
	Epoch    uint64          `json:"epoch"`
}

// Endpoint is where a service listens: one port of one present workload that has an identity.
type Endpoint struct {
	Service  string      `json:"service"`
	ID       identity.ID `json:"identity"`
	Machine  string      `json:"machine"`
	Netns    string      `json:"netns,omitempty"`
	Address  string      `json:"address,omitempty"`
	Port     uint16      `json:"port"`
	Protocol string      `json:"protocol"`
	Instance string      `json:"instance"`
}

// Report is what an agent says of its machine. Full means that Present is everything: what is not named is gone.
// Trust: attacker-controlled, as far as the agent's own machine goes.
type Report struct {
	Present []Observed `json:"present,omitempty"`
	Gone    []string   `json:"gone,omitempty"` // instances
	Full    bool       `json:"full,omitempty"`
}

// Observed is one workload as an agent sees it.
type Observed struct {
	Instance string           `json:"instance"`
	Facts    identity.FactSet `json:"facts"`
	Listen   []Listen         `json:"listen,omitempty"`
}

// Assigned is the answer to one [Observed]: an identity, or why there is none. Facts are those the server holds now,
// its own included.
type Assigned struct {
	Instance string           `json:"instance"`
	ID       identity.ID      `json:"identity,omitzero"`
	Refusal  *Refusal         `json:"refusal,omitempty"`
	Issuance json.RawMessage  `json:"issuance,omitempty"`
	Facts    identity.FactSet `json:"facts"`
	Epoch    uint64           `json:"epoch"`
}

// Refusal is a [refusal.Error] as it is stored and sent.
type Refusal struct {
	Kind     refusal.Kind `json:"kind"`
	Code     string       `json:"code"`
	What     string       `json:"what"`
	Why      string       `json:"why"`
	Do       string       `json:"do,omitempty"`
	Decision string       `json:"decision,omitempty"`
}

// RefusalOf returns the refusal in err's chain in its stored form, or nil if there is none.
func RefusalOf(err error) *Refusal {
	e := refusal.As(err)
	if e == nil {
		return nil
	}
	return &Refusal{Kind: e.Kind, Code: e.Code, What: e.What, Why: e.Why, Do: e.Do, Decision: e.Decision}
}

// Err returns the refusal as the rest of the house knows it.
func (r *Refusal) Err() *refusal.Error {
	return &refusal.Error{Kind: r.Kind, Code: r.Code, What: r.What, Why: r.Why, Do: r.Do, Decision: r.Decision}
}

// Error renders "what: why; what to do".
func (r *Refusal) Error() string { return r.Err().Error() }

// Unwrap makes [refusal.As] and errors.Is see the refusal.
func (r *Refusal) Unwrap() error { return r.Err() }
