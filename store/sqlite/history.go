package sqlite

import (
	"context"

	"github.com/redoubtsec/redoubt/event"
)

// historyGap is what a new history of the change log leaves free: no server writes so many changes between two back-ups.
const historyGap = 1 << 32

// NewHistory makes every agent take the whole state anew: the change log goes on far above any revision that was given
// since this copy of the database was made, and answers nothing from before. Called on a restored database, whose agents
// may have followed changes that the copy does not know. Join tokens are deleted, since the copy does not know which of
// them were used after it was made. rec is the audit record of it.
//
// Durability: on disk when it returns.
func (s *Store) NewHistory(ctx context.Context, rec event.Record) error {
	return s.update(ctx, func(tx *tx) error {
		_, latest, err := changes{tx}.Bounds(ctx)
		if err != nil {
			return err
		}
		next := int64(latest) + historyGap
		if _, err := tx.exec(ctx, "DELETE FROM sqlite_sequence WHERE name = 'changes'"); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "INSERT INTO sqlite_sequence (name, seq) VALUES ('changes', ?)", next); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "UPDATE change_bounds SET latest = ?, floor = ?", next, next); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "DELETE FROM tokens"); err != nil {
			return err
		}
		return tx.record(ctx, rec)
	})
}
