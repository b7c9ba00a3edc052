package set

import (
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// File is one file of a set.
//
// Shape: Name is a relative, slash-separated path that ends in .cedar, .yaml or .yml; Content is UTF-8.
type File struct {
	Name    string `json:"name"`
	Content string `json:"content"`
}

// Problems is everything that is wrong with a set, in order of file and line. Each names file, line, kind and name of
// the document (or the policy), the key, the reason and what to do.
type Problems []*refusal.Error

// DecideOptions is what a point knows beside the request.
type DecideOptions struct {
	Machine   string     // where it is decided: a machine id, or "server"
	Edition   uint64     // the version of the set that answers
	Overrides []Override // the panic switch; expired ones have no effect
	Released  bool       // redoubt release lifted everything on this machine
}

var _ = policy.Enforce
