package set

import (
	"context"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// EditionState says where an edition stands.
type EditionState string

// The states of editions. The newest edition is Active or Pending; all others are Superseded or Returned.
const (
	EditionActive     EditionState = "active"     // in force
	EditionPending    EditionState = "pending"    // in force until ConfirmBy, unless confirmed before
	EditionSuperseded EditionState = "superseded" // a later edition took its place
	EditionReturned   EditionState = "returned"   // was never confirmed: the former edition was put back
)

// Cause says how an edition came to be.
type Cause string

// The causes of editions.
const (
	CauseApply    Cause = "apply"    // an operator applied files
	CauseRollback Cause = "rollback" // an operator restored the edition named by Restores
	CauseReturn   Cause = "return"   // Redoubt restored it, since the edition between was not confirmed in time
)

// Edition is one version of the policy set.
//
// Shape: versions are consecutive from 1; version 0 is the built-in set of a fresh server and is never stored. Times are
// UTC. Restores is the version whose files these are, for CauseRollback and CauseReturn (0 is then the built-in set).
// Zero value: the built-in set.
type Edition struct {
	Version   uint64       `json:"version"`
	Digest    string       `json:"digest"` // [Set.Digest] of Files
	Files     []File       `json:"files,omitempty"`
	Author    string       `json:"author,omitempty"`
	Note      string       `json:"note,omitempty"`
	Created   time.Time    `json:"created,omitzero"`
	State     EditionState `json:"state,omitempty"`
	ConfirmBy time.Time    `json:"confirm_by,omitzero"` // of Pending; zero otherwise
	Cause     Cause        `json:"cause,omitempty"`
	Restores  uint64       `json:"restores,omitempty"`
}

// KeepEditions is how many editions a [Store] keeps: the newest ones. Older ones cannot be rolled back to; that they
// were in force stays in the audit log.
const KeepEditions = 100

// What a [Store] answers; compare with errors.Is.
var (
	// ErrNone says that no edition was ever stored.
	ErrNone = &refusal.Error{
		Kind: refusal.Unknown, Code: "no-edition", What: "policy set", Why: "no edition was ever applied",
		Do: "apply one with redoubt apply -f DIR",
	}
	// ErrUnknownEdition says that there is no such version, or no longer.
	ErrUnknownEdition = &refusal.Error{
		Kind: refusal.Unknown, Code: "unknown-edition", What: "policy set edition",
		Why: "there is no edition of this version, or it is older than those kept", Do: "list the editions kept with redoubt get editions",
	}
	// ErrConflict says that the current edition is not the one expected.
	ErrConflict = &refusal.Error{
		Kind: refusal.Conflict, Code: "edition-conflict", What: "policy set", Why: "another edition came in force meanwhile",
		Do: "look at it with redoubt diff and apply again",
	}
)

// Store keeps editions. [settest.TestStore] is its contract as a test.
//
// Concurrency: safe; of concurrent Activates that expect one version exactly one succeeds.
// Durability: what a writing method did is on disk, with its audit record, in one transaction, when it returns.
// Trust: what comes back is trusted to be what was stored; the digest is checked anyway.
type Store interface {
	// Current returns the newest edition, with files. Errors: [ErrNone].
	Current(ctx context.Context) (Edition, error)
	// Edition returns one edition with files. Errors: [ErrUnknownEdition].
	Edition(ctx context.Context, version uint64) (Edition, error)
	// Editions lists editions without their files, newest first, with versions below before (0: from the newest), at most limit.
	Editions(ctx context.Context, before uint64, limit int) ([]Edition, error)
	// Activate makes next the current edition if the current version is expect (0: none is stored) and next.Version is
	// expect+1; else it changes nothing and answers [ErrConflict]. The former current edition loses its ConfirmBy and
	// becomes Returned if it was Pending, else Superseded. Editions beyond the newest [KeepEditions] are dropped.
	Activate(ctx context.Context, next Edition, expect uint64, rec event.Record) error
	// Confirm makes a pending current edition Active and clears its ConfirmBy. Errors: [ErrConflict] if version is not the
	// current one or is not pending.
	Confirm(ctx context.Context, version uint64, rec event.Record) error
}
