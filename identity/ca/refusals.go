package ca

import (
	"fmt"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of this room's refusals, to be matched with errors.Is.
var (
	// At Open.
	ErrConfig     = &refusal.Error{Code: "ca-config"}            // a field of Config is missing or of a wrong shape
	ErrLifetimes  = &refusal.Error{Code: "ca-lifetimes"}         // a lifetime of Config could not carry another
	ErrWrongKEK   = &refusal.Error{Code: "ca-wrong-kek"}         // the KEK opens none of the keys
	ErrCorruptKey = &refusal.Error{Code: "ca-corrupt-key"}       // a record is damaged, or does not fit the others
	ErrForeignKey = &refusal.Error{Code: "ca-foreign-authority"} // the store holds another trust domain's keys

	// On signing.
	ErrWeakKey      = &refusal.Error{Code: "weak-key"}           // a public key of a type or size that is not accepted
	ErrMalformedCSR = &refusal.Error{Code: "malformed-csr"}      // not a PKCS #10 request, or too large
	ErrUnprovenKey  = &refusal.Error{Code: "unproven-key"}       // the request is not signed by the key in it
	ErrForeignID    = &refusal.Error{Code: "foreign-spiffe-id"}  // an ID that this authority may not vouch for
	ErrNames        = &refusal.Error{Code: "names-not-allowed"}  // DNS names or addresses for another than the server
	ErrAudience     = &refusal.Error{Code: "malformed-audience"} // no audience, too many, or too long
	ErrTTL          = &refusal.Error{Code: "ttl-not-allowed"}    // a lifetime asked that is not given
	ErrTooShort     = &refusal.Error{Code: "parent-too-short"}   // what is left of the parent is too short for the child
	ErrNotYetValid  = &refusal.Error{Code: "parent-not-yet-valid"}
	ErrExpired      = &refusal.Error{Code: "parent-expired"}

	// On rotation.
	ErrStep  = &refusal.Error{Code: "rotation-step"}  // this step is not the next one
	ErrEarly = &refusal.Error{Code: "rotation-early"} // this step is next, but not yet

	// Of a token that does not verify.
	ErrToken        = &refusal.Error{Code: "malformed-jwt-svid"}
	ErrTokenKey     = &refusal.Error{Code: "jwt-svid-unknown-key"}
	ErrTokenProof   = &refusal.Error{Code: "jwt-svid-bad-signature"}
	ErrTokenExpired = &refusal.Error{Code: "jwt-svid-expired"}
	ErrTokenEarly   = &refusal.Error{Code: "jwt-svid-not-yet-valid"}
	ErrTokenFor     = &refusal.Error{Code: "jwt-svid-wrong-audience"}
)

// refuse makes the refusal with the code of sentinel.
func refuse(sentinel *refusal.Error, kind refusal.Kind, what, why, do string) *refusal.Error {
	return &refusal.Error{Kind: kind, Code: sentinel.Code, What: what, Why: why, Do: do}
}

func badConfig(field, why string) error {
	return refuse(ErrConfig, refusal.Invalid, "certificate authority, "+field, why, "correct the configuration")
}

func corrupt(rec KeyRecord, why string, err error) error {
	e := refuse(ErrCorruptKey, refusal.Unavailable, fmt.Sprintf("%s key %s", rec.Use, rec.ID), why,
		"restore the server's state from a back-up; do not delete the key, what it signed depends on it")
	e.Err = err
	return e
}

func badToken(sentinel *refusal.Error, why string, err error) error {
	e := refuse(sentinel, refusal.Unproven, "JWT-SVID", why, "fetch a new one from the Workload API, for the audience that it is sent to")
	e.Err = err
	return e
}

func subject(id identity.ID) string { return "SVID of " + id.String() }

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
