package api

import (
	"context"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// What the API needs of the rooms below. All implementations are safe for concurrent use; an error that is no refusal
// is an internal failure. A method that takes an event.Record stores it in the same transaction as the change, and only
// if it changes something; without a change it answers with a refusal.

// Engine answers requests with the policy set in force; set.Registry is one. It never returns nil.
type Engine interface {
	Decide(ctx context.Context, request *policy.Request) *policy.Decision
}

// Authority is whose SVIDs are believed; ca.Authority is one.
type Authority interface {
	Bundle() *identity.Bundle
}

// Rotation is the life of the authority's keys; ca.Authority is one.
type Rotation interface {
	Status() ca.Status
	Prepare(ctx context.Context, rec event.Record) (ca.Status, error)
	Publish(ctx context.Context, rec event.Record) (ca.Status, error)
	Activate(ctx context.Context, rec event.Record) (ca.Status, error)
	Retire(ctx context.Context, rec event.Record) (ca.Status, error)
}

// Machines is the register of machines; fleet.Fleet is one. Lists are in order of id, after the id given.
type Machines interface {
	// Authenticate says whether a machine that holds the key (64 hex digits, SHA-256 of its SubjectPublicKeyInfo) may
	// speak. A refusal of kind unproven says why not.
	Authenticate(ctx context.Context, machine, spki string) error
	Machine(ctx context.Context, id string) (fleet.Machine, error)
	Machines(ctx context.Context, after string, limit int) ([]fleet.Machine, error)
	RevokeMachine(ctx context.Context, id, reason string, rec event.Record) (fleet.Revocation, error)
}

// Tokens are join tokens; fleet.Fleet has them.
type Tokens interface {
	CreateToken(ctx context.Context, req fleet.TokenRequest, rec event.Record) (fleet.JoinToken, fleet.JoinSecret, error)
	Tokens(ctx context.Context, after string, limit int) ([]fleet.JoinToken, error)
	DeleteToken(ctx context.Context, id string, rec event.Record) error
}

// Workloads are those known; fleet.Fleet has them.
type Workloads interface {
	Workload(ctx context.Context, instance string) (fleet.Workload, error)
	Workloads(ctx context.Context, q fleet.WorkloadQuery) ([]fleet.Workload, error)
}

// Withdrawals are revocations; fleet.Fleet has them.
type Withdrawals interface {
	Revoke(ctx context.Context, r fleet.Revocation, rec event.Record) (fleet.Revocation, error)
	Revocations(ctx context.Context, after string, limit int) ([]fleet.Revocation, error)
	Lift(ctx context.Context, id string, rec event.Record) error
}

// Quarantines are identities and instances that are marked; fleet.Fleet has them.
type Quarantines interface {
	Quarantine(ctx context.Context, q fleet.Quarantine, rec event.Record) (fleet.Quarantine, error)
	Quarantines(ctx context.Context, after string, limit int) ([]fleet.Quarantine, error)
	Release(ctx context.Context, id string, rec event.Record) error
}

// Events is what happened; fleet.Fleet has it. It may also have Dropped() uint64, how many events were lost, and
// PublishProblem() string, why the policy set in force cannot be given to the agents: the status shows them.
type Events interface {
	Events(ctx context.Context, q fleet.EventQuery) ([]fleet.StoredEvent, error)
	// Decision returns what was told of a decision, by whom. Errors: a refusal of kind unknown.
	Decision(ctx context.Context, id policy.ID) ([]fleet.Told, error)
	// EventsStored is closed when the next event is stored. Take it before Events, and none is missed.
	EventsStored() <-chan struct{}
}

// PolicySet is the set in force and what changes it; set.Registry is one.
type PolicySet interface {
	Current() (*set.Set, set.Edition)
	Apply(ctx context.Context, files []set.File, o set.ApplyOptions, rec event.Record) (set.Edition, set.Diff, error)
	Confirm(ctx context.Context, version uint64, rec event.Record) (set.Edition, error)
	Rollback(ctx context.Context, to uint64, o set.ApplyOptions, rec event.Record) (set.Edition, set.Diff, error)
}

// Editions are the versions of the set that are kept; set.Registry has them. Edition 0 is the built-in set.
type Editions interface {
	Edition(ctx context.Context, version uint64) (set.Edition, error)
	Editions(ctx context.Context, before uint64, limit int) ([]set.Edition, error)
}

// Overrides are the pulls of the panic switch that are in force; set.Registry has them.
type Overrides interface {
	Overrides() []set.Override
	Observe(ctx context.Context, o set.Override, rec event.Record) (set.Override, error)
	EndObserve(ctx context.Context, id string, rec event.Record) error
}

// AuditLog is the audit log, as far as the API goes; audit.Log is one.
type AuditLog interface {
	// Wait returns once the record is in the log.
	Wait(ctx context.Context, recordID string) (uint64, error)
	// Ready says whether a change should be begun now. It does no I/O.
	Ready() error
	Status(ctx context.Context) (audit.Status, error)
	Checkpoint() ([]byte, error)
	Verifier() string
}

// Protections is what is claimed of each machine and workload, and on what proof.
type Protections interface {
	Protections(ctx context.Context) ([]policy.Protection, error)
}

// Recorder is what a Sink may also be: one that can store an event at once. fleet.Fleet is one.
type Recorder interface {
	// Record stores e. Durability: on disk when it returns.
	Record(ctx context.Context, e event.Event) error
}
