package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver named "sqlite"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// FileName is the usual name of the database in a data directory.
const FileName = "redoubt.db"

// applicationID marks a file as Redoubt's, in the field that SQLite has for it ("RDBT").
const applicationID = 0x52444254

// MaxWaiting bounds the updates that wait for the one writer.
const MaxWaiting = 1024

// The other bounds of this room.
const (
	maxReaders  = 4               // connections that read
	busyTimeout = 5 * time.Second // for locks that other programs hold
	opening     = time.Minute     // for the checks at Open
)

//go:embed migrations/*.sql
var migrations embed.FS

// Config is what a [Store] is made of.
type Config struct {
	// Path of the database; the directory must be there. The caller holds the directory's lock ([LockDir]).
	Path string
	// AsIs refuses a database of an older schema rather than migrate it, for those who only look: a back-up is taken while
	// an older server may be using it.
	AsIs   bool
	Meter  event.Meter
	Logger *slog.Logger
}

// Store is the open database.
//
// Concurrency: safe. Durability: what a method of a view acknowledged is on disk.
type Store struct {
	path   string
	meter  event.Meter
	logger *slog.Logger

	writer  *sql.DB // one connection; transactions begin immediate
	reader  *sql.DB // maxReaders connections, query_only
	waiting atomic.Int64
	notify  atomic.Pointer[func()]
}

// Open opens the database, and makes it (0600) if there is none. Schema migrations run here.
//
// Errors: [ErrNotSQLite], [ErrForeign], [ErrCorrupt], [ErrNewer], [ErrOlder], [ErrMissing]: the file is then left as it is.
// [ErrDiskFull].
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Path == "" {
		return nil, openRefusal(ErrConfig, refusal.Invalid, "", "no path is given", "set the data directory")
	}
	path, err := filepath.Abs(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	s := &Store{path: path, meter: cfg.Meter, logger: cfg.Logger}
	if s.meter == nil {
		s.meter = event.NoMeter
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithTimeout(ctx, opening)
	defer cancel()
	fresh, err := s.examine()
	if err != nil {
		return nil, err
	}
	if !fresh {
		if err := s.check(ctx); err != nil {
			return nil, err
		}
	}
	if err := s.connect(ctx, fresh, cfg.AsIs); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the database. Views of the store fail afterwards.
func (s *Store) Close() error {
	var errs []error
	for _, db := range []*sql.DB{s.reader, s.writer} { // the writer last: it folds the write-ahead log in
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// OnRecord makes the store call fn after every commit that added an audit record; fn must not block. The roof sets it
// to the audit log's Notify.
func (s *Store) OnRecord(fn func()) { s.notify.Store(&fn) }

// examine looks at the file without SQLite, so that nothing foreign is touched, and makes an empty one if there is none.
func (s *Store) examine() (fresh bool, err error) {
	name := filepath.Base(s.path)
	file, err := os.OpenFile(s.path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if info, err := os.Stat(s.path + "-wal"); err == nil && info.Size() > 0 {
			return false, openRefusal(ErrMissing, refusal.Conflict, name, "it is gone, but its write-ahead log is there",
				"put the database back beside its -wal file, or restore the data directory from a back-up")
		}
		// 0600 from its first moment; SQLite gives its other files the same mode.
		if file, err = os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return false, fmt.Errorf("make database: %w", fullOr("database "+name, err))
		}
		return true, file.Close()
	}
	if err != nil {
		return false, fmt.Errorf("open database: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return false, fmt.Errorf("open database: %w", err)
	}
	if !info.Mode().IsRegular() {
		return false, openRefusal(ErrNotSQLite, refusal.Invalid, name, "it is no regular file", "give the path of a database, or of a file to make")
	}
	if info.Mode().Perm()&0o077 != 0 {
		s.logger.Warn("the database could be read by others; that is ended", slog.String("mode", info.Mode().Perm().String()))
		if err := file.Chmod(0o600); err != nil {
			return false, fmt.Errorf("open database: %w", err)
		}
	}
	if info.Size() == 0 {
		return true, nil // made, and not begun
	}
	return false, header(file, name)
}

// header reads what marks a database as SQLite's and ours. Source: SQLite database file format, section 1.3.
func header(r io.Reader, name string) error {
	var head [100]byte
	if _, err := io.ReadFull(r, head[:]); err != nil || string(head[:16]) != "SQLite format 3\x00" {
		return openRefusal(ErrNotSQLite, refusal.Invalid, name, "it is no SQLite database, or its beginning is destroyed",
			"give the path of Redoubt's database, or restore the data directory from a back-up; the file is left as it is")
	}
	if id := binary.BigEndian.Uint32(head[68:72]); id != applicationID {
		return openRefusal(ErrForeign, refusal.Invalid, name, fmt.Sprintf("it belongs to another program (application id %08x)", id),
			"give another path; the file is left as it is")
	}
	return nil
}

// dsn makes a data source name. Pragmas are set on every connection.
func (s *Store) dsn(params url.Values, pragmas ...string) string {
	params["_pragma"] = append(pragmas, fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()))
	return "file:" + (&url.URL{Path: s.path}).EscapedPath() + "?" + params.Encode()
}

// check runs SQLite's own check, and looks at the version of the schema, over a connection that cannot write.
func (s *Store) check(ctx context.Context) error {
	name := filepath.Base(s.path)
	db, err := sql.Open("sqlite", s.dsn(url.Values{"mode": {"ro"}}, "query_only(1)"))
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	defer func() { _ = db.Close() }()
	db.SetMaxOpenConns(1)
	var result string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&result); err != nil {
		return s.fault(err)
	}
	if result != "ok" {
		return corrupt(name, errors.New(result))
	}
	var version, tables int64
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_schema WHERE name = 'goose_db_version'").Scan(&tables); err != nil {
		return s.fault(err)
	}
	if tables == 0 {
		return nil // ours, and the first migration did not happen yet
	}
	if err := db.QueryRowContext(ctx, "SELECT coalesce(max(version_id), 0) FROM goose_db_version WHERE is_applied").Scan(&version); err != nil {
		return s.fault(err)
	}
	if known := latestMigration(); version > known {
		return openRefusal(ErrNewer, refusal.Conflict, name, fmt.Sprintf("its schema is of version %d, this Redoubt knows %d", version, known),
			"start the Redoubt that wrote it, or a later one")
	}
	return nil
}

func latestMigration() int64 {
	var latest int64
	entries, _ := fs.ReadDir(migrations, "migrations") // embedded: cannot fail
	for _, e := range entries {
		if v, err := goose.NumericComponent(e.Name()); err == nil {
			latest = max(latest, v)
		}
	}
	return latest
}

func (s *Store) connect(ctx context.Context, fresh, asIs bool) (err error) {
	// synchronous=FULL: a commit has been synced when it returns; NORMAL would lose the last ones with the power.
	writing := []string{"synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)"}
	s.writer, err = sql.Open("sqlite", s.dsn(url.Values{"_txlock": {"immediate"}}, writing...))
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	s.writer.SetMaxOpenConns(1)
	if fresh {
		// Before anything else: whoever finds the file must see whose it is.
		if _, err := s.writer.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID)); err != nil {
			return s.fault(err)
		}
	}
	var mode string
	if err := s.writer.QueryRowContext(ctx, "PRAGMA journal_mode = WAL").Scan(&mode); err != nil {
		return s.fault(err)
	}
	if mode != "wal" {
		return fmt.Errorf("open database: the file system cannot do write-ahead logging (journal mode %q)", mode)
	}
	root, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("migrate database: %w", err)
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, s.writer, root, goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("migrate database: %w", err)
	}
	if asIs && !fresh {
		pending, err := provider.HasPending(ctx)
		if err != nil {
			return fmt.Errorf("migrate database: %w", s.fault(err))
		}
		if pending {
			return openRefusal(ErrOlder, refusal.Conflict, s.path, "it is of an older version of Redoubt, and must not be migrated by this command",
				"use the redoubt of the server's own version")
		}
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate database: %w", s.fault(err))
	}
	s.reader, err = sql.Open("sqlite", s.dsn(url.Values{}, "query_only(1)", "trusted_schema(0)"))
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	s.reader.SetMaxOpenConns(maxReaders)
	s.reader.SetMaxIdleConns(maxReaders)
	return s.fault(s.reader.PingContext(ctx))
}
