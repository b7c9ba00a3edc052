package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// Fleet is the [fleet.Store] of a store.
type Fleet struct{ s *Store }

var _ fleet.Store = Fleet{}

// Fleet returns the view of the fleet.
func (s *Store) Fleet() Fleet { return Fleet{s} }

// View implements [fleet.Store].
func (f Fleet) View(ctx context.Context, fn func(fleet.Tx) error) error {
	return f.s.view(ctx, func(tx *tx) error { return fn(parts(tx)) })
}

// Update implements [fleet.Store].
func (f Fleet) Update(ctx context.Context, fn func(fleet.Tx) error) error {
	return f.s.update(ctx, func(tx *tx) error { return fn(parts(tx)) })
}

func parts(t *tx) fleet.Tx {
	return fleet.Tx{
		Tokens: tokens{t}, Machines: machines{t}, Workloads: workloads{t}, Revocations: revocations{t}, Quarantines: quarantines{t},
		Changes: changes{t}, Events: events{t}, Audit: records{t},
	}
}

// orNotFound turns "no rows" into the fleet's word for it.
func orNotFound(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return fleet.ErrNotFound
	}
	return err
}

// deleted is the outcome of a delete by id.
func deleted(n int, err error) error {
	if err == nil && n == 0 {
		return fleet.ErrNotFound
	}
	return err
}

type records struct{ tx *tx }

func (r records) PutRecord(ctx context.Context, rec event.Record) error { return r.tx.record(ctx, rec) }

type tokens struct{ tx *tx }

func scanToken(scan func(...any) error) (fleet.JoinToken, error) {
	var hash []byte
	t, err := body[fleet.JoinToken](func(dest ...any) error { return scan(append(dest, &hash)...) })
	copy(t.Hash[:], hash)
	return t, err
}

func (s tokens) PutToken(ctx context.Context, t fleet.JoinToken) error {
	raw, err := render(t)
	if err != nil {
		return err
	}
	expires := nanos(t.Expires)
	if expires == nil {
		expires = leastTime.UnixNano()
	}
	_, err = s.tx.exec(ctx, `INSERT INTO tokens (id, hash, expires, used, body) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET hash = excluded.hash, expires = excluded.expires, used = excluded.used, body = excluded.body`,
		t.ID, t.Hash[:], expires, nanos(t.Used), raw)
	return err
}

func (s tokens) Token(ctx context.Context, id string) (fleet.JoinToken, error) {
	t, err := scanToken(s.tx.QueryRowContext(ctx, "SELECT body, hash FROM tokens WHERE id = ?", id).Scan)
	return t, orNotFound(err)
}

func (s tokens) Tokens(ctx context.Context, after string, limit int) ([]fleet.JoinToken, error) {
	return collect(ctx, s.tx, scanToken, "SELECT body, hash FROM tokens WHERE id > ? ORDER BY id LIMIT ?", after, limit)
}

func (s tokens) CountOutstanding(ctx context.Context, now time.Time) (int, error) {
	return s.tx.count(ctx, "SELECT count(*) FROM tokens WHERE used IS NULL AND expires > ?", nanos(now))
}

func (s tokens) DeleteTokens(ctx context.Context, before time.Time, limit int) (int, error) {
	return s.tx.exec(ctx, "DELETE FROM tokens WHERE id IN (SELECT id FROM tokens WHERE used < ?1 OR expires < ?1 ORDER BY id LIMIT ?2)",
		nanos(before), limit)
}

type machines struct{ tx *tx }

func (s machines) PutMachine(ctx context.Context, m fleet.Machine) error {
	m.Lost = false // computed when read
	raw, err := render(m)
	if err != nil {
		return err
	}
	_, err = s.tx.exec(ctx, "INSERT INTO machines (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body", m.ID, raw)
	return err
}

func (s machines) Machine(ctx context.Context, id string) (fleet.Machine, error) {
	m, err := body[fleet.Machine](s.tx.QueryRowContext(ctx, "SELECT body FROM machines WHERE id = ?", id).Scan)
	return m, orNotFound(err)
}

func (s machines) Machines(ctx context.Context, after string, limit int) ([]fleet.Machine, error) {
	return collect(ctx, s.tx, body[fleet.Machine], "SELECT body FROM machines WHERE id > ? ORDER BY id LIMIT ?", after, limit)
}

func (s machines) CountMachines(ctx context.Context) (int, error) {
	return s.tx.count(ctx, "SELECT count(*) FROM machines")
}

type revocations struct{ tx *tx }

func (s revocations) PutRevocation(ctx context.Context, r fleet.Revocation) error {
	raw, err := render(r)
	if err != nil {
		return err
	}
	_, err = s.tx.exec(ctx, "INSERT INTO revocations (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body", r.ID, raw)
	return err
}

func (s revocations) Revocations(ctx context.Context, after string, limit int) ([]fleet.Revocation, error) {
	return collect(ctx, s.tx, body[fleet.Revocation], "SELECT body FROM revocations WHERE id > ? ORDER BY id LIMIT ?", after, limit)
}

func (s revocations) DeleteRevocation(ctx context.Context, id string) error {
	return deleted(s.tx.exec(ctx, "DELETE FROM revocations WHERE id = ?", id))
}

func (s revocations) CountRevocations(ctx context.Context) (int, error) {
	return s.tx.count(ctx, "SELECT count(*) FROM revocations")
}

type quarantines struct{ tx *tx }

func (s quarantines) PutQuarantine(ctx context.Context, q fleet.Quarantine) error {
	raw, err := render(q)
	if err != nil {
		return err
	}
	_, err = s.tx.exec(ctx, "INSERT INTO quarantines (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body", q.ID, raw)
	return err
}

func (s quarantines) Quarantines(ctx context.Context, after string, limit int) ([]fleet.Quarantine, error) {
	return collect(ctx, s.tx, body[fleet.Quarantine], "SELECT body FROM quarantines WHERE id > ? ORDER BY id LIMIT ?", after, limit)
}

func (s quarantines) DeleteQuarantine(ctx context.Context, id string) error {
	return deleted(s.tx.exec(ctx, "DELETE FROM quarantines WHERE id = ?", id))
}

func (s quarantines) CountQuarantines(ctx context.Context) (int, error) {
	return s.tx.count(ctx, "SELECT count(*) FROM quarantines")
}
