package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// update runs fn in a transaction that may write. It commits if fn returns nil, and undoes everything else.
func (s *Store) update(ctx context.Context, fn func(tx *tx) error) error {
	if s.waiting.Add(1) > MaxWaiting {
		s.waiting.Add(-1)
		s.meter.Count("sqlite_refused", 1, "reason", ErrTooMany.Code)
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: ErrTooMany.Code, What: "change of the server's state",
			Why: fmt.Sprintf("%d changes wait already", MaxWaiting), Do: "try again later, with fewer at one time",
		}
	}
	defer s.waiting.Add(-1)
	t, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return s.fault(err)
	}
	defer func() { _ = t.Rollback() }() // after a commit it does nothing
	work := &tx{Tx: t}
	if err := fn(work); err != nil {
		return s.fault(err)
	}
	if err := t.Commit(); err != nil {
		return s.fault(err)
	}
	s.meter.Count("sqlite_commits", 1)
	if work.recorded {
		if notify := s.notify.Load(); notify != nil {
			(*notify)()
		}
	}
	return nil
}

// view runs fn in a transaction that sees one state and cannot write.
func (s *Store) view(ctx context.Context, fn func(tx *tx) error) error {
	t, err := s.reader.BeginTx(ctx, nil)
	if err != nil {
		return s.fault(err)
	}
	defer func() { _ = t.Rollback() }()
	return s.fault(fn(&tx{Tx: t}))
}

// tx is one transaction.
type tx struct {
	*sql.Tx
	recorded bool // an audit record was added
}

// exec runs a statement and says how many rows it changed.
func (t *tx) exec(ctx context.Context, query string, args ...any) (int, error) {
	res, err := t.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}

// count runs a query for one number.
func (t *tx) count(ctx context.Context, query string, args ...any) (int, error) {
	var n int
	err := t.QueryRowContext(ctx, query, args...).Scan(&n)
	return n, err
}

// record adds an audit record to the outbox, in this transaction.
func (t *tx) record(ctx context.Context, r event.Record) error {
	bad := func(why string, err error) error {
		return &refusal.Error{
			Kind: refusal.Invalid, Code: ErrRecord.Code, What: "audit record of the change", Why: why,
			Do: "report it: the change was not made", Err: err,
		}
	}
	if r.ID == "" || r.Time.IsZero() || r.Actor == "" || r.Action == "" {
		return bad("it lacks an id, a time, an actor or an action", nil)
	}
	leaf, err := r.Leaf()
	if err != nil {
		return bad("it cannot be rendered", err)
	}
	if len(leaf) > audit.MaxLeafBytes {
		return bad(fmt.Sprintf("it has %d bytes, more than %d", len(leaf), audit.MaxLeafBytes), nil)
	}
	_, err = t.ExecContext(ctx, "INSERT INTO outbox (record_id, leaf) VALUES (?, ?)", r.ID, leaf)
	if isUnique(err) {
		return &refusal.Error{
			Kind: refusal.Conflict, Code: ErrRecord.Code, What: "audit record of the change", Why: "a record of this id is there already",
			Do: "report it: the change was not made", Err: err,
		}
	}
	t.recorded = t.recorded || err == nil
	return err
}

// collect runs a query and reads every row of it.
func collect[T any](ctx context.Context, t *tx, scan func(scan func(...any) error) (T, error), query string, args ...any) ([]T, error) {
	rows, err := t.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var out []T
	for rows.Next() {
		v, err := scan(rows.Scan)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// body scans one column that holds the JSON of a T.
func body[T any](scan func(...any) error) (T, error) {
	var v T
	var raw []byte
	if err := scan(&raw); err != nil {
		return v, err
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, fmt.Errorf("database: a stored %T cannot be read: %w", v, err)
	}
	return v, nil
}

// render returns the JSON that body reads.
func render(v any) (string, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("database: a %T cannot be stored: %w", v, err)
	}
	return string(raw), nil
}

// nanos renders a time for a column: NULL for the zero time. Times beyond what 64 bits hold (1678 to 2262) become the
// nearest that they do.
func nanos(t time.Time) any {
	switch {
	case t.IsZero():
		return nil
	case t.Before(leastTime):
		return leastTime.UnixNano()
	case t.After(mostTime):
		return mostTime.UnixNano()
	}
	return t.UnixNano()
}

var (
	leastTime = time.Unix(0, -1<<63)
	mostTime  = time.Unix(0, 1<<63-1)
)
