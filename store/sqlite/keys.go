package sqlite

import (
	"context"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/ca"
)

// Keys is the [ca.Store] of a store.
type Keys struct{ s *Store }

var _ ca.Store = Keys{}

// Keys returns the view of the certificate authority.
func (s *Store) Keys() Keys { return Keys{s} }

// Keys implements [ca.Store].
func (k Keys) Keys(ctx context.Context) (out []ca.KeyRecord, err error) {
	err = k.s.view(ctx, func(tx *tx) error {
		out, err = collect(ctx, tx, func(scan func(...any) error) (r ca.KeyRecord, err error) {
			var created, notBefore, notAfter int64
			err = scan(&r.ID, &r.Use, &r.State, &created, &notBefore, &notAfter, &r.Certificate, &r.Sealed)
			r.Created, r.NotBefore, r.NotAfter = time.Unix(created, 0).UTC(), time.Unix(notBefore, 0).UTC(), time.Unix(notAfter, 0).UTC()
			return r, err
		}, "SELECT id, use, state, created, not_before, not_after, certificate, sealed FROM ca_keys ORDER BY id")
		return err
	})
	return out, err
}

// PutKeys implements [ca.Store]. Times are kept in whole seconds, as X.509 has them.
func (k Keys) PutKeys(ctx context.Context, keys []ca.KeyRecord, rec event.Record) error {
	return k.s.update(ctx, func(tx *tx) error {
		for _, r := range keys {
			_, err := tx.exec(ctx, `INSERT INTO ca_keys (id, use, state, created, not_before, not_after, certificate, sealed)
				VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET use = excluded.use, state = excluded.state,
				created = excluded.created, not_before = excluded.not_before, not_after = excluded.not_after,
				certificate = excluded.certificate, sealed = excluded.sealed`,
				r.ID, string(r.Use), string(r.State), r.Created.Unix(), r.NotBefore.Unix(), r.NotAfter.Unix(), r.Certificate, r.Sealed)
			if err != nil {
				return err
			}
		}
		return tx.record(ctx, rec)
	})
}
