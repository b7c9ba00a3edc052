// Package catest has what other rooms need to test with an authority: a [Store] in memory, and the conformance suite that
// every store of keys passes.
//
// Trust: for tests; keys that are kept here are lost with the process.
package catest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/ca"
)

// Store is a [ca.Store] in memory.
//
// Zero value: empty, ready for use. Concurrency: safe.
type Store struct {
	mu      sync.Mutex // guards the fields below
	keys    []ca.KeyRecord
	records []event.Record
	fail    error
}

var _ ca.Store = (*Store)(nil)

// Keys implements [ca.Store].
func (s *Store) Keys(ctx context.Context) ([]ca.KeyRecord, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return clone(s.keys), nil
}

// PutKeys implements [ca.Store]; it checks what the contract asks of callers.
func (s *Store) PutKeys(ctx context.Context, keys []ca.KeyRecord, rec event.Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.fail != nil {
		return s.fail
	}
	if rec.ID == "" || slices.ContainsFunc(s.records, func(r event.Record) bool { return r.ID == rec.ID }) {
		return fmt.Errorf("audit record %q: empty, or there already", rec.ID)
	}
	next := clone(s.keys)
	for _, k := range clone(keys) {
		if err := check(k); err != nil {
			return err
		}
		if i := slices.IndexFunc(next, func(o ca.KeyRecord) bool { return o.ID == k.ID }); i >= 0 {
			next[i] = k
		} else {
			next = append(next, k)
		}
	}
	s.keys, s.records = next, append(s.records, rec)
	return nil
}

// check refuses a record of a wrong shape.
func check(k ca.KeyRecord) error {
	switch {
	case k.ID == "" || len(k.Certificate) == 0:
		return fmt.Errorf("key %q: no id or no certificate", k.ID)
	case !slices.Contains([]ca.Use{ca.Root, ca.X509, ca.JWT}, k.Use):
		return fmt.Errorf("key %s: use %q", k.ID, k.Use)
	case !slices.Contains([]ca.State{ca.Prepared, ca.Published, ca.Active, ca.Superseded, ca.Retired}, k.State):
		return fmt.Errorf("key %s: state %q", k.ID, k.State)
	case (k.State == ca.Retired) != (len(k.Sealed) == 0):
		return fmt.Errorf("key %s: a retired key has no private half, any other has", k.ID)
	case k.Created.IsZero() || k.NotBefore.IsZero() || k.NotAfter.IsZero() || k.NotAfter.Before(k.NotBefore):
		return errors.New("key " + k.ID + ": times")
	}
	return nil
}

// Records returns the audit records, in the order in which they came.
func (s *Store) Records() []event.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.records)
}

// Fail makes PutKeys return err and change nothing, as a full disk does; nil ends that.
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func clone(keys []ca.KeyRecord) []ca.KeyRecord {
	out := slices.Clone(keys)
	for i := range out {
		out[i].Certificate, out[i].Sealed = slices.Clone(out[i].Certificate), slices.Clone(out[i].Sealed)
	}
	return out
}
