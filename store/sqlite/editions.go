package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy/set"
)

// Editions is the [set.Store] of a store.
type Editions struct{ s *Store }

var _ set.Store = Editions{}

// Editions returns the view of the policy set's registry.
func (s *Store) Editions() Editions { return Editions{s} }

const editionColumns = "SELECT head, files FROM editions "

func scanEdition(scan func(...any) error) (set.Edition, error) {
	var head, files []byte
	if err := scan(&head, &files); err != nil {
		return set.Edition{}, err
	}
	var e set.Edition
	if err := errors.Join(json.Unmarshal(head, &e), json.Unmarshal(files, &e.Files)); err != nil {
		return e, fmt.Errorf("database: a stored edition cannot be read: %w", err)
	}
	return e, nil
}

func current(ctx context.Context, tx *tx) (set.Edition, error) {
	e, err := scanEdition(tx.QueryRowContext(ctx, editionColumns+"ORDER BY version DESC LIMIT 1").Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return e, set.ErrNone
	}
	return e, err
}

func putHead(ctx context.Context, tx *tx, e set.Edition) error {
	e.Files = nil
	head, err := render(e)
	if err != nil {
		return err
	}
	_, err = tx.exec(ctx, "UPDATE editions SET head = ? WHERE version = ?", head, int64(e.Version))
	return err
}

// Current implements [set.Store].
func (v Editions) Current(ctx context.Context) (e set.Edition, err error) {
	err = v.s.view(ctx, func(tx *tx) error {
		e, err = current(ctx, tx)
		return err
	})
	return e, err
}

// Edition implements [set.Store].
func (v Editions) Edition(ctx context.Context, version uint64) (e set.Edition, err error) {
	if version > math.MaxInt64 {
		return e, set.ErrUnknownEdition
	}
	err = v.s.view(ctx, func(tx *tx) error {
		e, err = scanEdition(tx.QueryRowContext(ctx, editionColumns+"WHERE version = ?", int64(version)).Scan)
		if errors.Is(err, sql.ErrNoRows) {
			return set.ErrUnknownEdition
		}
		return err
	})
	return e, err
}

// Editions implements [set.Store].
func (v Editions) Editions(ctx context.Context, before uint64, limit int) (out []set.Edition, err error) {
	if before == 0 || before > math.MaxInt64 {
		before = math.MaxInt64
	}
	err = v.s.view(ctx, func(tx *tx) error {
		out, err = collect(ctx, tx, body[set.Edition], "SELECT head FROM editions WHERE version < ? ORDER BY version DESC LIMIT ?", int64(before), max(limit, 0))
		return err
	})
	return out, err
}

// Activate implements [set.Store].
func (v Editions) Activate(ctx context.Context, next set.Edition, expect uint64, rec event.Record) error {
	return v.s.update(ctx, func(tx *tx) error {
		former, err := current(ctx, tx)
		if err != nil && !errors.Is(err, set.ErrNone) {
			return err
		}
		if former.Version != expect || next.Version != expect+1 {
			return set.ErrConflict
		}
		if err == nil {
			state := set.EditionSuperseded
			if former.State == set.EditionPending {
				state = set.EditionReturned
			}
			former.State, former.ConfirmBy = state, time.Time{}
			if err := putHead(ctx, tx, former); err != nil {
				return err
			}
		}
		files, err := render(next.Files)
		if err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "INSERT INTO editions (version, head, files) VALUES (?, '', ?)", int64(next.Version), files); err != nil {
			return err
		}
		if err := putHead(ctx, tx, next); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "DELETE FROM editions WHERE version <= ?", int64(next.Version)-set.KeepEditions); err != nil {
			return err
		}
		return tx.record(ctx, rec)
	})
}

// Confirm implements [set.Store].
func (v Editions) Confirm(ctx context.Context, version uint64, rec event.Record) error {
	return v.s.update(ctx, func(tx *tx) error {
		e, err := current(ctx, tx)
		if err != nil && !errors.Is(err, set.ErrNone) {
			return err
		}
		if err != nil || e.Version != version || e.State != set.EditionPending {
			return set.ErrConflict
		}
		e.State, e.ConfirmBy = set.EditionActive, time.Time{}
		if err := putHead(ctx, tx, e); err != nil {
			return err
		}
		return tx.record(ctx, rec)
	})
}

// Overrides is the [set.OverrideStore] of a store.
type Overrides struct{ s *Store }

var _ set.OverrideStore = Overrides{}

// Overrides returns the view of the panic switch.
func (s *Store) Overrides() Overrides { return Overrides{s} }

// Overrides implements [set.OverrideStore].
func (v Overrides) Overrides(ctx context.Context) (out []set.Override, err error) {
	err = v.s.view(ctx, func(tx *tx) error {
		out, err = collect(ctx, tx, body[set.Override], "SELECT body FROM overrides ORDER BY id")
		return err
	})
	return out, err
}

// PutOverride implements [set.OverrideStore].
func (v Overrides) PutOverride(ctx context.Context, o set.Override, rec event.Record) error {
	return v.s.update(ctx, func(tx *tx) error {
		raw, err := render(o)
		if err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "INSERT INTO overrides (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body", o.ID, raw); err != nil {
			return err
		}
		return tx.record(ctx, rec)
	})
}

// DeleteOverride implements [set.OverrideStore].
func (v Overrides) DeleteOverride(ctx context.Context, id string, rec event.Record) error {
	return v.s.update(ctx, func(tx *tx) error {
		n, err := tx.exec(ctx, "DELETE FROM overrides WHERE id = ?", id)
		if err != nil {
			return err
		}
		if n == 0 {
			return set.ErrUnknownOverride
		}
		return tx.record(ctx, rec)
	})
}
