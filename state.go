package redoubt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/backup"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// Backup writes an encrypted archive of the server's data directory to w, whether the server runs or not: the database as of
// one moment, the audit log, the key-encryption key and the operator's credential. With that file and the passphrase the
// authority can be restored elsewhere; keep both apart.
func Backup(ctx context.Context, dir string, w io.Writer, passphrase string) (backup.Manifest, error) {
	if _, err := os.Stat(filepath.Join(dir, DatabaseFile)); err != nil {
		return backup.Manifest{}, noServer(dir, err)
	}
	db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, DatabaseFile), AsIs: true})
	if err != nil {
		return backup.Manifest{}, err
	}
	src := backup.Source{
		Database: db, DatabaseName: DatabaseFile, AuditDir: filepath.Join(dir, AuditDir), AuditName: AuditDir, TempDir: dir,
	}
	for _, name := range []string{KEKName, OperatorFile} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			src.Files = append(src.Files, backup.File{Name: name, Path: filepath.Join(dir, name)})
		}
	}
	m, err := backup.Backup(ctx, src, w, passphrase)
	return m, errors.Join(err, db.Close())
}

// KEKName is the key-encryption key within an archive; one that is kept elsewhere (authority.kek_file) is not in it.
const KEKName = "kek"

// Restore unpacks an archive into an empty data directory and proves it before it counts: every hash, the audit log, and that
// log and database belong together. What happened after the back-up is forgotten: join tokens are therefore deleted, and
// revocations made since must be made again. The restore is recorded in the audit log.
func Restore(ctx context.Context, r io.Reader, dir, passphrase string) (backup.Manifest, error) {
	rec := event.NewRecord(`User::"root@server"`, "server.restore", dir)
	return backup.Restore(ctx, r, dir, passphrase, func(ctx context.Context, dir string) (err error) {
		db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, DatabaseFile)})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
		report, err := audit.Verify(ctx, filepath.Join(dir, AuditDir), "", audit.Options{Outbox: db.Outbox()})
		if err != nil {
			return err
		}
		if !report.OK() {
			return fmt.Errorf("the audit log and the database do not belong together: %s", report.Findings[0].Detail)
		}
		return db.NewHistory(ctx, rec)
	})
}

func noServer(dir string, err error) error {
	return &refusal.Error{
		Kind: refusal.Unknown, Code: "no-server", What: "server state in " + dir, Why: "there is no " + DatabaseFile,
		Do: "name the server's data directory with --data", Err: err,
	}
}
