package event

import (
	"encoding/json"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

// Layer is where something happened.
type Layer string

// The layers.
const (
	Runtime Layer = "runtime"
	Network Layer = "network"
	API     Layer = "api"
	Access  Layer = "access"
	Control Layer = "control" // Redoubt's own life: joins, rotations, releases
)

// Event is what happened, at one layer, by which identity, under which trace.
//
// Shape: JSON of at most [MaxBytes]; Attrs are plain JSON values with dotted, lower-case names.
type Event struct {
	ID       string          `json:"id"` // e-…
	Time     time.Time       `json:"time"`
	Layer    Layer           `json:"layer"`
	Kind     string          `json:"kind"` // "workload.started", "svid.issued", "decision"
	Machine  string          `json:"machine,omitempty"`
	Workload string          `json:"workload,omitempty"` // instance, w-…
	Identity identity.ID     `json:"identity,omitzero"`
	PID      int             `json:"pid,omitempty"`
	Trace    string          `json:"trace,omitempty"`
	Decision policy.ID       `json:"decision,omitempty"`
	Verdict  policy.Verdict  `json:"verdict,omitempty"`
	Mode     policy.Mode     `json:"mode,omitempty"`
	Message  string          `json:"message,omitempty"`
	Attrs    map[string]any  `json:"attrs,omitempty"`
	Detail   json.RawMessage `json:"detail,omitempty"` // of a decision: the whole policy.Decision
}

// MaxBytes bounds the JSON of one event; a larger one loses its Detail and says so in Attrs.
const MaxBytes = 64 << 10

// New returns an event of this layer and kind, with a fresh id and the time now.
func New(layer Layer, kind string) Event {
	return Event{ID: identity.Unique("e"), Time: time.Now().UTC(), Layer: layer, Kind: kind}
}

// OfDecision returns the event that records a decision.
func OfDecision(d *policy.Decision) Event {
	e := New(layerOf(d.Request.Action), "decision")
	e.Time, e.Machine, e.Trace = d.Time, d.Machine, d.Request.Trace
	e.Decision, e.Verdict, e.Mode, e.Message = d.ID, d.Verdict, d.Mode, d.Explanation.Summary
	e.Detail, _ = json.Marshal(d) // a decision is plain data; one that cannot be rendered keeps its summary
	return e
}

func layerOf(action policy.UID) Layer {
	switch action.Namespace() {
	case policy.Run:
		return Runtime
	case policy.Net:
		return Network
	case policy.API:
		return API
	case policy.Access:
		return Access
	default:
		return Control
	}
}
