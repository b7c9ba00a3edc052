package sqlite

import (
	"context"
	"database/sql"
	"errors"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// events is the [fleet.EventStore]. The oldest are trimmed only, so that what is kept is one run of positions.
type events struct{ tx *tx }

func (s events) AppendEvent(ctx context.Context, e fleet.StoredEvent) (fleet.StoredEvent, error) {
	raw, err := render(e.Event)
	if err != nil {
		return e, err
	}
	at := nanos(e.Event.Time)
	if at == nil {
		at = leastTime.UnixNano()
	}
	res, err := s.tx.ExecContext(ctx, `INSERT INTO events (machine, seq, time, layer, kind, workload, identity, decision, verdict, body)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, e.Machine, int64(e.Seq), at, string(e.Event.Layer), e.Event.Kind, e.Event.Workload,
		e.Event.Identity.String(), string(e.Event.Decision), string(e.Event.Verdict), raw)
	if err != nil {
		return e, err
	}
	position, err := res.LastInsertId()
	e.Position = uint64(position)
	return e, err
}

func scanEvent(scan func(...any) error) (fleet.StoredEvent, error) {
	var e fleet.StoredEvent
	var position, seq int64
	var err error
	e.Event, err = body[event.Event](func(dest ...any) error { return scan(append(dest, &position, &e.Machine, &seq)...) })
	e.Position, e.Seq = uint64(position), uint64(seq)
	return e, err
}

func (s events) Events(ctx context.Context, q fleet.EventQuery) ([]fleet.StoredEvent, error) {
	var cond where
	order := " ORDER BY position LIMIT ?"
	if q.Newest {
		order = " ORDER BY position DESC LIMIT ?"
		if q.Before > 0 {
			cond.and("position < ?", clamp(q.Before))
		}
	} else {
		cond.and("position > ?", clamp(q.After))
	}
	cond.equal("machine", q.Machine)
	cond.equal("layer", string(q.Layer))
	cond.equal("kind", q.Kind)
	// The second half of each lets SQLite use the index, which leaves the empty ones out.
	if q.Workload != "" {
		cond.and("workload = ? AND workload <> ''", q.Workload)
	}
	if !q.Identity.IsZero() {
		cond.and("identity = ? AND identity <> ''", q.Identity.String())
	}
	if q.Decision != "" {
		cond.and("decision = ? AND decision <> ''", string(q.Decision))
	}
	cond.equal("verdict", string(q.Verdict))
	if !q.Since.IsZero() {
		cond.and("time >= ?", nanos(q.Since))
	}
	if !q.Until.IsZero() {
		cond.and("time < ?", nanos(q.Until))
	}
	return collect(ctx, s.tx, scanEvent, "SELECT body, position, machine, seq FROM events"+cond.String()+order, append(cond.args, q.Limit)...)
}

func (s events) Stream(ctx context.Context, machine string) (fleet.EventStream, error) {
	out := fleet.EventStream{Machine: machine}
	var last int64
	err := s.tx.QueryRowContext(ctx, "SELECT stream, last FROM event_streams WHERE machine = ?", machine).Scan(&out.Stream, &last)
	if errors.Is(err, sql.ErrNoRows) {
		return out, nil
	}
	out.Last = uint64(last)
	return out, err
}

func (s events) PutStream(ctx context.Context, st fleet.EventStream) error {
	_, err := s.tx.exec(ctx, `INSERT INTO event_streams (machine, stream, last) VALUES (?, ?, ?)
		ON CONFLICT (machine) DO UPDATE SET stream = excluded.stream, last = excluded.last`, st.Machine, st.Stream, int64(st.Last))
	return err
}

func (s events) Trim(ctx context.Context, keep, limit int) (int, error) {
	return s.tx.exec(ctx, `DELETE FROM events WHERE position IN
		(SELECT position FROM events WHERE position <= (SELECT max(position) FROM events) - ? ORDER BY position LIMIT ?)`, max(keep, 0), limit)
}
