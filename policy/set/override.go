package set

import (
	"context"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// Override is one pull of the panic switch, `redoubt observe`: until it expires, the workloads it selects are observed
// in Run, Net and Api. Access is never affected.
//
// Shape: JSON carries the selector's fields beside its own. Expires is required: an override always ends by itself, and
// whoever decides compares it with the clock, so that it ends on a machine that is cut off, too.
type Override struct {
	ID string `json:"id"` // o-…
	Selector
	Expires time.Time `json:"expires"`
	Author  string    `json:"author,omitempty"`
	Note    string    `json:"note,omitempty"`
	Created time.Time `json:"created"`
}

// The bounds of overrides.
const (
	// DefaultOverride is how long an override holds that names no end.
	DefaultOverride = time.Hour
	// MaxOverride is the longest an override may hold; what must be observed for longer takes a Mode document.
	MaxOverride = 7 * 24 * time.Hour
	// MaxOverrides is how many may hold at once.
	MaxOverrides = 256
)

// ErrUnknownOverride says that there is no such override; compare with errors.Is.
var ErrUnknownOverride = &refusal.Error{
	Kind: refusal.Unknown, Code: "unknown-override", What: "override", Why: "there is no override of this id, or it has ended",
	Do: "list those in force with redoubt get overrides",
}

// OverrideStore keeps overrides. [settest.TestOverrideStore] is its contract as a test.
//
// Concurrency: safe. Durability: what a writing method did is on disk, with its audit record, in one transaction, when it
// returns.
type OverrideStore interface {
	// Overrides returns every override kept, expired ones included, in order of id.
	Overrides(ctx context.Context) ([]Override, error)
	// PutOverride adds an override or replaces the one of its id.
	PutOverride(ctx context.Context, o Override, rec event.Record) error
	// DeleteOverride removes one. Errors: [ErrUnknownOverride]; then nothing is recorded.
	DeleteOverride(ctx context.Context, id string, rec event.Record) error
}
