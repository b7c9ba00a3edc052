package sqlite

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of this room's refusals, to be matched with errors.Is.
var (
	// At Open.
	ErrConfig    = &refusal.Error{Code: "database-config"}
	ErrNotSQLite = &refusal.Error{Code: "database-not-sqlite"} // the file is something else
	ErrForeign   = &refusal.Error{Code: "database-foreign"}    // it is another program's database
	ErrCorrupt   = &refusal.Error{Code: "database-corrupt"}    // it is damaged
	ErrNewer     = &refusal.Error{Code: "database-newer"}      // a later Redoubt wrote it
	ErrOlder     = &refusal.Error{Code: "database-older"}      // an earlier Redoubt wrote it, and it may not be migrated now
	ErrMissing   = &refusal.Error{Code: "database-missing"}    // its write-ahead log is there, itself is not
	ErrLocked    = &refusal.Error{Code: "data-dir-locked"}     // another process works in the data directory

	// At work.
	ErrDiskFull = &refusal.Error{Code: "disk-full"}
	ErrBusy     = &refusal.Error{Code: "database-busy"}       // another program holds it for longer than the bound
	ErrRecord   = &refusal.Error{Code: "audit-record"}        // the audit record is malformed, too large, or there already
	ErrTooMany  = &refusal.Error{Code: "database-overload"}   // too many wait for the one writer
	ErrMarked   = &refusal.Error{Code: "outbox-mark-differs"} // a row of the outbox is marked with another index
)

// fewBytes is how little free space counts as none: SQLite then fails in ways other than SQLITE_FULL, too.
const fewBytes = 128 << 10

// fault turns an error of the driver into the refusal that it means; others pass.
func (s *Store) fault(err error) error {
	var e *sqlite.Error
	if err == nil || !errors.As(err, &e) {
		return err
	}
	switch code := e.Code(); {
	case code&0xff == sqlite3.SQLITE_FULL, code&0xff == sqlite3.SQLITE_IOERR && s.noSpace(), code&0xff == sqlite3.SQLITE_CANTOPEN && s.noSpace():
		s.meter.Count("sqlite_refused", 1, "reason", ErrDiskFull.Code)
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrDiskFull.Code, What: "change of the server's state", Why: "the disk of the database is full",
			Do: "free space on it and try again; nothing was changed", Err: err,
		}
	case code&0xff == sqlite3.SQLITE_BUSY, code&0xff == sqlite3.SQLITE_LOCKED:
		s.meter.Count("sqlite_refused", 1, "reason", ErrBusy.Code)
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrBusy.Code, What: "change of the server's state",
			Why: "another program has locked the database", Do: "end it (a database browser, a copy job) and try again", Err: err,
		}
	case code&0xff == sqlite3.SQLITE_CORRUPT, code&0xff == sqlite3.SQLITE_NOTADB:
		s.meter.Count("sqlite_refused", 1, "reason", ErrCorrupt.Code)
		return corrupt(filepath.Base(s.path), err)
	case code&0xff == sqlite3.SQLITE_INTERRUPT:
		return errors.Join(context.Canceled, err)
	}
	return fmt.Errorf("database: %w", err)
}

func (s *Store) noSpace() bool {
	var fs unix.Statfs_t
	return unix.Statfs(filepath.Dir(s.path), &fs) == nil && uint64(fs.Bavail)*uint64(fs.Bsize) < fewBytes
}

// isUnique reports whether err is about a value that is there already.
func isUnique(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && (e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)
}

func corrupt(name string, err error) error {
	return &refusal.Error{
		Kind: refusal.Unavailable, Code: ErrCorrupt.Code, What: "database " + name, Why: "its content is damaged",
		Do: "restore the data directory from a back-up (redoubt restore); the file is left as it is", Err: err,
	}
}

func openRefusal(sentinel *refusal.Error, kind refusal.Kind, name, why, do string) error {
	return &refusal.Error{Kind: kind, Code: sentinel.Code, What: "database " + name, Why: why, Do: do}
}

// fullOr is fault for errors of plain file operations.
func fullOr(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrDiskFull.Code, What: what, Why: "the disk is full", Do: "free space on it and try again", Err: err,
		}
	}
	return err
}
