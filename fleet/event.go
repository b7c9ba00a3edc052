package fleet

import (
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

// Numbered is an event with its place in the stream of the agent that sends it.
type Numbered struct {
	Seq   uint64
	Event event.Event
}

// StoredEvent is an event that the server holds. Position rises with every event stored, over all machines.
//
// Trust: Machine is set by the server from who sent it; the rest is the sender's word.
type StoredEvent struct {
	Position uint64      `json:"position"`
	Machine  string      `json:"machine"` // a machine id, or "server"
	Seq      uint64      `json:"seq"`     // in the sender's stream
	Event    event.Event `json:"event"`
}

// EventStream is how far the events of a machine were stored.
//
// Stream names the sender's queue: a machine that lost its queue begins a new one, whose numbers start afresh.
type EventStream struct {
	Machine string
	Stream  string
	Last    uint64
}

// EventQuery selects stored events. The zero value of a field does not restrict.
//
// Ascending, Positions after After; with Newest, descending, Positions below Before (0: from the last).
type EventQuery struct {
	After    uint64
	Before   uint64
	Newest   bool
	Machine  string
	Layer    event.Layer
	Kind     string
	Workload string
	Identity identity.ID
	Decision policy.ID
	Verdict  policy.Verdict
	Since    time.Time
	Until    time.Time
	Limit    int // the fleet bounds it to [MaxPage]
}
