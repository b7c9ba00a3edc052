// Package refusal is the word for "no": an error that tells its reader what was refused, why, and what to do about it.
//
// Every refusal of bad input or of a request that crosses a room ends up before a person or a program that must act on
// it. An [Error] carries the three parts apart, so that the edge (CLI, REST, gRPC) can render them without guessing, and
// a stable code, so that programs need not parse prose. Internal failures stay plain errors: they go to the log, and the
// edge answers with a bare "internal" and an id.
//
// Trust: texts are written by Redoubt. A value taken from outside may be quoted in Why only if it cannot be a secret.
package refusal

import (
	"errors"
	"fmt"
)

// Kind says what sort of "no" this is. The edge maps it to an HTTP status, a gRPC code and an exit code, in one table.
type Kind string

// The kinds of refusal.
const (
	Invalid      Kind = "invalid"      // the input is wrong whatever the state: 400/422, INVALID_ARGUMENT
	Unknown      Kind = "unknown"      // the thing named does not exist: 404, NOT_FOUND
	Conflict     Kind = "conflict"     // the state has moved on: 409/412, ABORTED
	Unproven     Kind = "unproven"     // who asks is not established: 401, UNAUTHENTICATED
	Denied       Kind = "denied"       // policy said no: 403, PERMISSION_DENIED
	Exhausted    Kind = "exhausted"    // a bound was reached: 429, RESOURCE_EXHAUSTED
	Unavailable  Kind = "unavailable"  // a part needed is away for now: 503, UNAVAILABLE
	Unsupported  Kind = "unsupported"  // this machine cannot do it: 501, FAILED_PRECONDITION
	Precondition Kind = "precondition" // the caller must state what it saw: 428, FAILED_PRECONDITION
)

// Error is a refusal. It renders as "what: why; what to do", the form of every error that Redoubt prints.
//
// Zero value: not useful; What and Why must be set. Do may be empty only if there is nothing to do.
// Concurrency: immutable once returned.
type Error struct {
	Kind Kind
	// Code is stable, lower-case and hyphenated ("join-token-used"): programs and tests match on it.
	Code string
	What string // what was refused: "join of machine m1"
	Why  string // the reason: "the token was used at 2026-11-22T10:00:00Z"
	Do   string // what to do: "make a new one with redoubt token create"
	// Decision is the id of the policy decision behind it, if there was one.
	Decision string
	// Err is the cause, for errors.Is; it is never rendered to a client.
	Err error
}

// Error renders "what: why; what to do".
func (e *Error) Error() string {
	if e.Do == "" {
		return fmt.Sprintf("%s: %s", e.What, e.Why)
	}
	return fmt.Sprintf("%s: %s; %s", e.What, e.Why, e.Do)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is a refusal with the same code, so that rooms can publish refusals as sentinels
// (`var ErrUsed = &refusal.Error{Code: "join-token-used"}`) and return detailed copies.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code != "" && t.Code == e.Code
}

// As returns the first refusal in err's chain, or nil.
func As(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return nil
}
