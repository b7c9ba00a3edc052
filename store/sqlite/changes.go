package sqlite

import (
	"context"
	"math"

	"github.com/redoubtsec/redoubt/fleet"
)

// changes is the [fleet.ChangeLog]. Revisions are AUTOINCREMENT: SQLite never gives one twice, deleted ones included.
type changes struct{ tx *tx }

func scanChange(scan func(...any) error) (fleet.Change, error) {
	var c fleet.Change
	var revision int64
	var payload []byte
	err := scan(&revision, &c.Kind, &c.Key, &payload, &c.Deleted)
	c.Revision, c.Payload = uint64(revision), payload
	return c, err
}

func (s changes) Append(ctx context.Context, c fleet.Change) (fleet.Change, error) {
	res, err := s.tx.ExecContext(ctx, "INSERT INTO changes (kind, key, payload, deleted) VALUES (?, ?, ?, ?)",
		string(c.Kind), c.Key, []byte(c.Payload), c.Deleted)
	if err != nil {
		return c, err
	}
	revision, err := res.LastInsertId()
	if err != nil {
		return c, err
	}
	if _, err := s.tx.exec(ctx, `INSERT INTO live (kind, key, revision, deleted) VALUES (?, ?, ?, ?)
		ON CONFLICT (kind, key) DO UPDATE SET revision = excluded.revision, deleted = excluded.deleted`,
		string(c.Kind), c.Key, revision, c.Deleted); err != nil {
		return c, err
	}
	if _, err := s.tx.exec(ctx, "UPDATE change_bounds SET latest = ?", revision); err != nil {
		return c, err
	}
	c.Revision = uint64(revision)
	return c, nil
}

func (s changes) Bounds(ctx context.Context) (floor, latest uint64, err error) {
	var f, l int64
	err = s.tx.QueryRowContext(ctx, "SELECT floor, latest FROM change_bounds").Scan(&f, &l)
	return uint64(f), uint64(l), err
}

func (s changes) Changes(ctx context.Context, after uint64, limit int) ([]fleet.Change, error) {
	floor, _, err := s.Bounds(ctx)
	if err != nil {
		return nil, err
	}
	if after < floor {
		return nil, fleet.ErrCompacted
	}
	return collect(ctx, s.tx, scanChange,
		"SELECT revision, kind, key, payload, deleted FROM changes WHERE revision > ? ORDER BY revision LIMIT ?", clamp(after), limit)
}

func (s changes) Live(ctx context.Context, after fleet.Position, limit int) ([]fleet.Change, error) {
	return collect(ctx, s.tx, scanChange, `SELECT c.revision, c.kind, c.key, c.payload, c.deleted
		FROM live JOIN changes c USING (revision) WHERE (live.kind, live.key) > (?, ?) AND NOT live.deleted
		ORDER BY live.kind, live.key LIMIT ?`, string(after.Kind), after.Key, limit)
}

func (s changes) Compact(ctx context.Context, floor uint64) (int, error) {
	old, latest, err := s.Bounds(ctx)
	if err != nil {
		return 0, err
	}
	floor = min(floor, latest)
	if floor <= old {
		return 0, nil
	}
	if _, err := s.tx.exec(ctx, "UPDATE change_bounds SET floor = ?", int64(floor)); err != nil {
		return 0, err
	}
	n, err := s.tx.exec(ctx, `DELETE FROM changes WHERE revision <= ?
		AND NOT EXISTS (SELECT 1 FROM live WHERE live.revision = changes.revision AND NOT live.deleted)`, int64(floor))
	if err != nil {
		return 0, err
	}
	_, err = s.tx.exec(ctx, "DELETE FROM live WHERE deleted AND revision <= ?", int64(floor))
	return n, err
}

// clamp fits a number into a column; there is nothing above what a column holds.
func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) }
