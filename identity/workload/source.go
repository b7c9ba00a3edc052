package workload

import (
	"context"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// ErrNoIdentity is the code with which a [Source] says that a caller has no identity. It is always answered
// PERMISSION_DENIED, as the standard wants it, with the refusal's full text. Source: SPIFFE Workload Endpoint, section 6.
var ErrNoIdentity = &refusal.Error{Code: "no-identity"}

// Update is everything that a caller may have now.
type Update struct {
	// SVIDs are the caller's, the default identity first. Needed by X509 only.
	SVIDs []*identity.X509SVID
	// Bundles are those that the caller may trust, its own trust domain's first.
	Bundles []*identity.Bundle
	// Changed is closed when this update is no longer the latest; nil if it never changes. It must have been taken
	// before SVIDs and Bundles were, so that no change is missed.
	Changed <-chan struct{}
}

// Source says what a caller gets. The agent's hall implements it.
//
// Errors: a [*refusal.Error] reaches the client as it is; anything else is logged and answered as internal.
// Concurrency: safe; a method may block, and is then called by many callers at once, but returns when ctx ends.
type Source interface {
	// X509 returns the caller's X.509-SVIDs and bundles. Errors: [ErrNoIdentity].
	X509(ctx context.Context, c *Caller) (Update, error)
	// Bundles returns the bundles that the caller may trust; SVIDs is empty. Errors: [ErrNoIdentity].
	Bundles(ctx context.Context, c *Caller) (Update, error)
	// JWT returns a JWT-SVID for the audience (never empty), of each of the caller's identities or, unless it is zero, of
	// `only`. Errors: [ErrNoIdentity] if there is none, or if `only` is not one of the caller's.
	JWT(ctx context.Context, c *Caller, audience []string, only identity.ID) ([]*identity.JWTSVID, error)
}
