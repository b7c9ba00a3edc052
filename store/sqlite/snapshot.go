package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
)

// Snapshot writes a consistent copy of the database to a new file, 0600, while the store is in use: one state, that of
// some moment of the call. Writers are not held up.
//
// Errors: wraps fs.ErrExist if there is a file; [ErrDiskFull]; nothing is left behind. Durability: none.
func (s *Store) Snapshot(ctx context.Context, path string) (err error) {
	// VACUUM INTO takes an empty file: made here for its mode, and so that no other file is overwritten.
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("copy database: %w", fullOr("copy of the database", err))
	}
	defer func() {
		if err != nil {
			if rm := os.Remove(path); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
				err = errors.Join(err, rm)
			}
		}
	}()
	if err := file.Close(); err != nil {
		return fmt.Errorf("copy database: %w", err)
	}
	// A connection of its own: the readers' are query_only, which forbids VACUUM, and the copy may take long.
	db, err := sql.Open("sqlite", s.dsn(url.Values{"mode": {"rw"}}))
	if err != nil {
		return fmt.Errorf("copy database: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", path); err != nil {
		return fmt.Errorf("copy database: %w", s.fault(err))
	}
	return nil
}
