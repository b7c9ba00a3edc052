package fleet

import (
	"context"
	"errors"
	"time"

	"github.com/redoubtsec/redoubt/event"
)

// The errors of a store that its caller tells apart. Any other error is a failure of the store.
var (
	// ErrNotFound: nothing has that id.
	ErrNotFound = errors.New("fleet: not found")
	// ErrCompacted: the change log no longer reaches back so far; take a snapshot.
	ErrCompacted = errors.New("fleet: change log compacted")
)

// Store is where the fleet keeps its state. fleettest.TestStores is its conformance suite.
//
// Durability: what Update did is on disk when it returns nil, all of it or, if fn or the commit failed, nothing.
// Isolation: updates are serializable, one after another; a view sees one state. fn may run more than once
// (a store that retries), and must not keep tx, nor call the store again (it would deadlock). Concurrency: safe.
type Store interface {
	View(ctx context.Context, fn func(tx Tx) error) error
	Update(ctx context.Context, fn func(tx Tx) error) error
}

// Tx is one transaction: every part sees and changes the same state. In a view, a method that writes fails.
type Tx struct {
	Tokens      TokenStore
	Machines    MachineStore
	Workloads   WorkloadStore
	Revocations RevocationStore
	Quarantines QuarantineStore
	Changes     ChangeLog
	Events      EventStore
	Audit       AuditStore
}

// TokenStore keeps join tokens. Lists are in order of id, which begin after the id given ("" is the first); limit > 0.
type TokenStore interface {
	// PutToken inserts or replaces by id, the hash included.
	PutToken(ctx context.Context, t JoinToken) error
	// Token returns ErrNotFound if there is none. The hash is filled in.
	Token(ctx context.Context, id string) (JoinToken, error)
	Tokens(ctx context.Context, after string, limit int) ([]JoinToken, error)
	// CountOutstanding counts tokens that are unused and expire after now.
	CountOutstanding(ctx context.Context, now time.Time) (int, error)
	// DeleteTokens deletes at most limit tokens that were used, or expired, before the time given, and says how many.
	DeleteTokens(ctx context.Context, before time.Time, limit int) (int, error)
}

// MachineStore keeps machines. Lists are in order of id, after the id given; limit > 0.
type MachineStore interface {
	// PutMachine inserts or replaces by id. Lost is not stored.
	PutMachine(ctx context.Context, m Machine) error
	// Machine returns ErrNotFound if there is none.
	Machine(ctx context.Context, id string) (Machine, error)
	Machines(ctx context.Context, after string, limit int) ([]Machine, error)
	// CountMachines counts all, whatever their state.
	CountMachines(ctx context.Context) (int, error)
}

// WorkloadQuery selects workloads, in order of instance, after After. The zero value of a field does not restrict.
type WorkloadQuery struct {
	After   string
	Machine string
	Service string
	ID      string // the SPIFFE ID
	State   WorkloadState
	Limit   int // > 0
}

// WorkloadStore keeps workloads by instance.
type WorkloadStore interface {
	// PutWorkload inserts or replaces by instance.
	PutWorkload(ctx context.Context, w Workload) error
	// Workload returns ErrNotFound if there is none.
	Workload(ctx context.Context, instance string) (Workload, error)
	Workloads(ctx context.Context, q WorkloadQuery) ([]Workload, error)
	// CountWorkloads counts those of a machine ("" is all machines), whatever their state.
	CountWorkloads(ctx context.Context, machine string) (int, error)
	// WorkloadBytes adds up the JSON of those of a machine, whatever their state.
	WorkloadBytes(ctx context.Context, machine string) (int, error)
	// DeleteGone deletes at most limit workloads of state gone that were last seen before the time given, of one machine
	// or, with "", of all, the longest gone first, and returns their instances, in no order.
	DeleteGone(ctx context.Context, machine string, before time.Time, limit int) ([]string, error)
}

// RevocationStore keeps revocations. Lists are in order of id, after the id given; limit > 0.
type RevocationStore interface {
	// PutRevocation inserts or replaces by id.
	PutRevocation(ctx context.Context, r Revocation) error
	Revocations(ctx context.Context, after string, limit int) ([]Revocation, error)
	// DeleteRevocation returns ErrNotFound if there is none.
	DeleteRevocation(ctx context.Context, id string) error
	CountRevocations(ctx context.Context) (int, error)
}

// QuarantineStore keeps quarantines. Lists are in order of id, after the id given; limit > 0.
type QuarantineStore interface {
	// PutQuarantine inserts or replaces by id.
	PutQuarantine(ctx context.Context, q Quarantine) error
	Quarantines(ctx context.Context, after string, limit int) ([]Quarantine, error)
	// DeleteQuarantine returns ErrNotFound if there is none.
	DeleteQuarantine(ctx context.Context, id string) error
	CountQuarantines(ctx context.Context) (int, error)
}

// ChangeLog keeps what changed, in order, and the last change of every key, which together are the live state.
type ChangeLog interface {
	// Append gives the change the next revision, above every one before it (compacted ones too), stores and returns it.
	Append(ctx context.Context, c Change) (Change, error)
	// Bounds returns the floor, below which changes are no longer complete, and the latest revision; 0, 0 of an empty log.
	Bounds(ctx context.Context) (floor, latest uint64, err error)
	// Changes returns at most limit changes with revisions above after, in order. It returns ErrCompacted if after is
	// below the floor.
	Changes(ctx context.Context, after uint64, limit int) ([]Change, error)
	// Live returns at most limit of the last changes of each key, deleted keys left out, in byte order of kind and key,
	// beginning after the position given.
	Live(ctx context.Context, after Position, limit int) ([]Change, error)
	// Compact raises the floor to the revision given (never lowers it; at most the latest) and deletes what at or below
	// it has been superseded or is deleted. Live states and Changes(≥ floor) are as before. It says how many it deleted.
	Compact(ctx context.Context, floor uint64) (int, error)
}

// EventStore keeps what happened, bounded.
type EventStore interface {
	// AppendEvent gives the event the next position (rising for ever, trimmed ones counted), stores it and returns it.
	// It does not look for doubles.
	AppendEvent(ctx context.Context, e StoredEvent) (StoredEvent, error)
	// Events answers the query; Limit > 0.
	Events(ctx context.Context, q EventQuery) ([]StoredEvent, error)
	// Stream returns the stream of a machine, or one with Stream "" and Last 0 if it has none.
	Stream(ctx context.Context, machine string) (EventStream, error)
	// PutStream inserts or replaces by machine.
	PutStream(ctx context.Context, s EventStream) error
	// Trim deletes events (at most limit) until keep are left, and says how many it deleted: always the oldest of the
	// machine with the greatest [Share.Weight], as [Share.Cut] says, so that one that tells much drives out only itself.
	Trim(ctx context.Context, keep, reserve, limit int) (int, error)
}

// AuditStore takes audit records: each is a leaf of the audit log (store/sqlite puts it into the outbox).
type AuditStore interface {
	PutRecord(ctx context.Context, r event.Record) error
}
