package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/refusal"
)

// Outbox is the [audit.Outbox] of a store.
type Outbox struct{ s *Store }

var _ audit.Outbox = Outbox{}

// Outbox returns the view of the audit log's sequencer.
func (s *Store) Outbox() Outbox { return Outbox{s} }

// Pending implements [audit.Outbox].
func (o Outbox) Pending(ctx context.Context, after int64, limit int) (out []audit.Entry, err error) {
	err = o.s.view(ctx, func(tx *tx) error {
		out, err = collect(ctx, tx, func(scan func(...any) error) (e audit.Entry, err error) {
			return e, scan(&e.Seq, &e.RecordID, &e.Leaf)
		}, "SELECT seq, record_id, leaf FROM outbox WHERE idx IS NULL AND seq > ? ORDER BY seq LIMIT ?", after, limit)
		return err
	})
	return out, err
}

// MarkLogged implements [audit.Outbox]. The leaf is dropped: it is in the log.
func (o Outbox) MarkLogged(ctx context.Context, placed []audit.Placed) error {
	return o.s.update(ctx, func(tx *tx) error {
		mark, err := tx.PrepareContext(ctx, "UPDATE outbox SET idx = ?, leaf = NULL WHERE seq = ? AND (idx IS NULL OR idx = ?)")
		if err != nil {
			return err
		}
		defer func() { _ = mark.Close() }()
		for _, p := range placed {
			res, err := mark.ExecContext(ctx, int64(p.Index), p.Seq, int64(p.Index))
			if isUnique(err) {
				return marked(p, err)
			}
			if err != nil {
				return err
			}
			if n, err := res.RowsAffected(); err != nil || n != 1 {
				return marked(p, err)
			}
		}
		return nil
	})
}

func marked(p audit.Placed, err error) error {
	return &refusal.Error{
		Kind: refusal.Conflict, Code: ErrMarked.Code, What: fmt.Sprintf("mark of outbox row %d", p.Seq),
		Why: fmt.Sprintf("the row is gone, or it or the index %d is marked otherwise", p.Index), Do: "verify the audit log", Err: err,
	}
}

// Placed implements [audit.Outbox].
func (o Outbox) Placed(ctx context.Context, recordID string) (uint64, bool, error) {
	var index sql.NullInt64
	err := o.s.view(ctx, func(tx *tx) error {
		err := tx.QueryRowContext(ctx, "SELECT idx FROM outbox WHERE record_id = ?", recordID).Scan(&index)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	return uint64(index.Int64), index.Valid, err
}

// Tail implements [audit.Outbox].
func (o Outbox) Tail(ctx context.Context) (t audit.Tail, err error) {
	err = o.s.view(ctx, func(tx *tx) error {
		var next int64
		err := tx.QueryRowContext(ctx, `SELECT (SELECT coalesce(max(idx) + 1, 0) FROM outbox),
			(SELECT count(*) FROM outbox WHERE idx IS NULL)`).Scan(&next, &t.Pending)
		t.Next = uint64(next)
		return err
	})
	return t, err
}
