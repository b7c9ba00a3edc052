package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"slices"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// events is the [fleet.EventStore]. How many each machine has is counted by triggers.
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

func (s events) Trim(ctx context.Context, keep, reserve, limit int) (int, error) {
	deleted := 0
	for {
		total, err := s.tx.count(ctx, "SELECT n FROM event_total")
		if err != nil {
			return deleted, err
		}
		excess := min(total-max(keep, 0), limit-deleted)
		if excess <= 0 {
			return deleted, nil
		}
		first, second, err := s.heaviest(ctx, reserve)
		if err != nil {
			return deleted, err
		}
		decisions, n := first.Cut(reserve, second, excess)
		n, err = s.tx.exec(ctx, `DELETE FROM events WHERE position IN
			(SELECT position FROM events WHERE machine = ? AND (decision <> '') = ? ORDER BY position LIMIT ?)`, first.Machine, decisions, n)
		if err != nil {
			return deleted, err
		}
		if n == 0 {
			return deleted, errors.New("database: the shares of events do not fit the events")
		}
		deleted += n
	}
}

// heaviest returns the heaviest share, and the weight of the next.
func (s events) heaviest(ctx context.Context, reserve int) (first fleet.Share, second int, err error) {
	scan := func(scan func(...any) error) (x fleet.Share, err error) {
		err = scan(&x.Machine, &x.Decisions, &x.Others)
		return x, err
	}
	// The two heaviest are among these: the reserve makes only the server lighter.
	list, err := collect(ctx, s.tx, scan, "SELECT machine, decisions, others FROM event_shares ORDER BY decisions + others DESC LIMIT 3")
	if err != nil || len(list) == 0 {
		return first, 0, err
	}
	slices.SortStableFunc(list, func(a, b fleet.Share) int { return cmp.Compare(b.Weight(reserve), a.Weight(reserve)) })
	if len(list) > 1 {
		second = list[1].Weight(reserve)
	}
	return list[0], second, nil
}
