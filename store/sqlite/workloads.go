package sqlite

import (
	"context"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
)

// where collects conditions, each with its bound value. Conditions are constants of this package.
type where struct {
	terms []string
	args  []any
}

func (w *where) and(term string, arg any) {
	w.terms = append(w.terms, term)
	w.args = append(w.args, arg)
}

// equal adds a condition unless the value does not restrict.
func (w *where) equal(column, value string) {
	if value != "" {
		w.and(column+" = ?", value)
	}
}

func (w *where) String() string {
	if len(w.terms) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(w.terms, " AND ")
}

type workloads struct{ tx *tx }

func (s workloads) PutWorkload(ctx context.Context, w fleet.Workload) error {
	raw, err := render(w)
	if err != nil {
		return err
	}
	seen := nanos(w.Seen)
	if seen == nil {
		seen = leastTime.UnixNano()
	}
	_, err = s.tx.exec(ctx, `INSERT INTO workloads (instance, machine, service, identity, state, seen, body) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (instance) DO UPDATE SET machine = excluded.machine, service = excluded.service, identity = excluded.identity,
		state = excluded.state, seen = excluded.seen, body = excluded.body`,
		w.Instance, w.Machine, w.Service, w.ID.String(), string(w.State), seen, raw)
	return err
}

func (s workloads) Workload(ctx context.Context, instance string) (fleet.Workload, error) {
	w, err := body[fleet.Workload](s.tx.QueryRowContext(ctx, "SELECT body FROM workloads WHERE instance = ?", instance).Scan)
	return w, orNotFound(err)
}

func (s workloads) Workloads(ctx context.Context, q fleet.WorkloadQuery) ([]fleet.Workload, error) {
	var cond where
	cond.and("instance > ?", q.After)
	cond.equal("machine", q.Machine)
	cond.equal("service", q.Service)
	cond.equal("identity", q.ID)
	cond.equal("state", string(q.State))
	return collect(ctx, s.tx, body[fleet.Workload],
		"SELECT body FROM workloads"+cond.String()+" ORDER BY instance LIMIT ?", append(cond.args, q.Limit)...)
}

func (s workloads) CountWorkloads(ctx context.Context, machine string) (int, error) {
	var cond where
	cond.equal("machine", machine)
	return s.tx.count(ctx, "SELECT count(*) FROM workloads"+cond.String(), cond.args...)
}

func (s workloads) WorkloadBytes(ctx context.Context, machine string) (int, error) {
	return s.tx.count(ctx, "SELECT coalesce(sum(octet_length(body)), 0) FROM workloads WHERE machine = ?", machine)
}

func (s workloads) DeleteGone(ctx context.Context, machine string, before time.Time, limit int) ([]string, error) {
	var cond where
	cond.and("state = 'gone' AND seen < ?", nanos(before))
	cond.equal("machine", machine)
	return collect(ctx, s.tx, text, "DELETE FROM workloads WHERE instance IN (SELECT instance FROM workloads"+cond.String()+
		" ORDER BY seen, instance LIMIT ?) RETURNING instance", append(cond.args, limit)...)
}

// text scans one column of text.
func text(scan func(...any) error) (string, error) {
	var s string
	err := scan(&s)
	return s, err
}
