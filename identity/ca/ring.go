package ca

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// ring is every key of the trust domain at one moment, read and checked, and the bundle that follows from them.
// It is immutable: a step makes a new one from the records.
type ring struct {
	root    *key
	keys    []*key // issuing and JWT keys, oldest first
	records []KeyRecord
	bundle  *identity.Bundle
}

// newRing reads all records. Errors: a refusal.
func (s *sealer) newRing(td identity.TrustDomain, records []KeyRecord, hint time.Duration) (*ring, error) {
	records = slices.Clone(records)
	slices.SortFunc(records, func(a, b KeyRecord) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	r := &ring{records: records}
	var sealed []KeyRecord // that did not open
	opened := 0
	for _, rec := range records {
		var root *x509.Certificate
		if r.root != nil {
			root = r.root.cert
		}
		k, err := s.read(td, rec, root)
		if errors.Is(err, errSealed) {
			sealed = append(sealed, rec)
			if rec.Use == Root { // the others are read against its certificate all the same
				cert, err := readAuthority(td, rec, nil)
				if err != nil {
					return nil, corrupt(rec, err.Error(), err)
				}
				r.root = &key{KeyRecord: rec, cert: cert}
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if k.private != nil {
			opened++
		}
		if rec.Use == Root {
			if r.root != nil {
				return nil, corrupt(rec, "there is more than one root", nil)
			}
			k.private = nil // unsealed again when it is needed
			r.root = k
			continue
		}
		r.keys = append(r.keys, k)
	}
	switch {
	case len(sealed) > 0 && opened == 0:
		return nil, refuse(ErrWrongKEK, refusal.Invalid, "certificate authority of "+td.String(),
			fmt.Sprintf("the key-encryption key opens none of its %d keys", len(sealed)),
			"give the key-encryption key that this data directory was made with")
	case len(sealed) > 0:
		return nil, corrupt(sealed[0], "its private key is damaged: the key-encryption key opens others, and not this one", nil)
	}
	if err := r.complete(); err != nil {
		return nil, err
	}
	r.bundle = r.makeBundle(td, hint)
	return r, nil
}

// rank orders roots before the rest, since the rest is checked against them.
func rank(rec KeyRecord) int {
	if rec.Use == Root {
		return 0
	}
	return 1
}

// complete refuses a ring that lacks a key, or has two where there may be one.
func (r *ring) complete() error {
	if r.root == nil || r.root.State != Active {
		return corrupt(KeyRecord{Use: Root, ID: "(none)"}, "the store holds keys and no active root", nil)
	}
	for _, use := range []Use{X509, JWT} {
		seen := map[State]int{}
		for _, k := range r.keys {
			if k.Use == use {
				switch k.State {
				case Prepared, Published: // at most one of both together
					seen[Prepared]++
				case Active, Superseded, Retired:
					seen[k.State]++
				default:
					return corrupt(k.KeyRecord, "its state is not known", nil)
				}
			}
		}
		if seen[Active] != 1 || seen[Prepared] > 1 {
			return corrupt(KeyRecord{Use: use, ID: "(all)"},
				fmt.Sprintf("there are %d active keys and %d in preparation; one, and at most one, is right", seen[Active], seen[Prepared]), nil)
		}
	}
	if x, j := r.next(X509), r.next(JWT); (x == nil) != (j == nil) || x != nil && x.State != j.State {
		return corrupt(KeyRecord{Use: JWT, ID: "(next)"}, "the next issuing and JWT keys are not in the same state", nil)
	}
	return nil
}

// find returns the newest key of a use in one of these states, or nil.
func (r *ring) find(use Use, states ...State) *key {
	for _, k := range slices.Backward(r.keys) {
		if k.Use == use && slices.Contains(states, k.State) {
			return k
		}
	}
	return nil
}

func (r *ring) active(use Use) *key { return r.find(use, Active) }

// next is the key that is to follow the active one, or nil.
func (r *ring) next(use Use) *key { return r.find(use, Prepared, Published) }

// makeBundle renders the root, and each JWT key from its publication to its retirement.
//
// The sequence follows from the records alone, so that it rises across restarts with no counter beside them: a JWT key
// adds one when it enters the bundle and one when it leaves.
func (r *ring) makeBundle(td identity.TrustDomain, hint time.Duration) *identity.Bundle {
	b := &identity.Bundle{
		TrustDomain: td, X509Authorities: []*x509.Certificate{r.root.cert},
		JWTAuthorities: map[string]crypto.PublicKey{}, Sequence: 1, RefreshHint: hint,
	}
	for _, k := range r.keys {
		if k.Use != JWT {
			continue
		}
		switch k.State {
		case Prepared:
		case Published, Active, Superseded:
			b.JWTAuthorities[k.ID] = k.public
			b.Sequence++
		case Retired:
			b.Sequence += 2
		}
	}
	return b
}
