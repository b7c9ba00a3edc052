package backup

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"filippo.io/age"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/refusal"
)

// Database can copy itself consistently while it is in use; *sqlite.Store does.
type Database interface {
	// Snapshot writes a copy, of one state of the database, to a new file, 0600.
	Snapshot(ctx context.Context, path string) error
}

// Source is what is backed up. Names are relative to the data directory that it will be restored to.
type Source struct {
	Database     Database
	DatabaseName string // "redoubt.db"
	AuditDir     string // the audit directory, where it is now
	AuditName    string // "audit"
	Files        []File // key-encryption key, configuration, credentials
	// TempDir holds the copy of the database while it is made; its name is gone before the first byte is written out.
	// Default: the directory of AuditDir.
	TempDir string
	// WorkFactor is scrypt's, as a power of two. Default: age's, 18, about a second.
	WorkFactor int
}

// File is one further file, kept as 0600.
type File struct {
	Name string // in the archive
	Path string // where it is now
}

// Backup writes an encrypted archive of src to w while the server runs, and returns what it holds. An archive that ends
// early (any error) is refused by [Restore].
//
// Errors: [ErrPassphrase], [ErrSource], [ErrDiskFull]; ctx's. Durability: w is the caller's to sync.
func Backup(ctx context.Context, src Source, w io.Writer, passphrase string) (Manifest, error) {
	m := Manifest{Format: formatName, Version: version, Created: time.Now().UTC(), Database: src.DatabaseName, Audit: src.AuditName}
	if len(passphrase) < MinPassphrase {
		return m, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrPassphrase.Code, What: "back-up", Why: fmt.Sprintf("the passphrase has fewer than %d bytes", MinPassphrase),
			Do: "take a longer one, best of several random words",
		}
	}
	if err := src.check(); err != nil {
		return m, err
	}
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return m, fmt.Errorf("back-up: %w", err)
	}
	if src.WorkFactor > 0 {
		recipient.SetWorkFactor(min(src.WorkFactor, maxWorkFactor))
	}
	sealed, err := age.Encrypt(w, recipient)
	if err != nil {
		return m, fullOr(fmt.Errorf("back-up: %w", err))
	}
	a := &archive{tar: tar.NewWriter(sealed), manifest: &m}
	if err := a.fill(ctx, src); err != nil {
		return m, fullOr(fmt.Errorf("back-up: %w", err))
	}
	if err := errors.Join(a.tar.Close(), sealed.Close()); err != nil {
		return m, fullOr(fmt.Errorf("back-up: %w", err))
	}
	return m, nil
}

func (src *Source) check() error {
	bad := func(why string) error {
		return &refusal.Error{Kind: refusal.Invalid, Code: ErrSource.Code, What: "back-up", Why: why, Do: "give what is to be backed up"}
	}
	if src.Database == nil || src.AuditDir == "" {
		return bad("the database or the audit directory is not given")
	}
	names := map[string]bool{manifestName: true}
	for _, name := range append([]string{src.DatabaseName, src.AuditName}, fileNames(src.Files)...) {
		first := top(name)
		if checkName(name) != nil || names[name] || names[first] {
			return bad("a name is malformed, or is there twice")
		}
		names[name], names[first] = true, true
	}
	if src.TempDir == "" {
		src.TempDir = filepath.Dir(src.AuditDir)
	}
	return nil
}

// top is the first part of a slash-separated name.
func top(name string) string {
	first, _, _ := strings.Cut(name, "/")
	return first
}

func fileNames(files []File) []string {
	var out []string
	for _, f := range files {
		out = append(out, f.Name)
	}
	return out
}

// archive is a tar stream being written.
type archive struct {
	tar      *tar.Writer
	manifest *Manifest
}

// fill writes everything. The order of database and audit log is what makes the two fit: see the package comment.
func (a *archive) fill(ctx context.Context, src Source) error {
	if err := a.database(ctx, src); err != nil {
		return err
	}
	leaves, err := audit.Copy(ctx, src.AuditDir, func(f audit.CopiedFile) error {
		return a.add(path.Join(src.AuditName, f.Name), f.Mode, int64(len(f.Data)), bytes.NewReader(f.Data))
	})
	if err != nil {
		return err
	}
	a.manifest.Leaves = leaves
	for _, f := range src.Files {
		raw, err := readFile(f)
		if err != nil {
			return err
		}
		if err := a.add(f.Name, 0o600, int64(len(raw)), bytes.NewReader(raw)); err != nil {
			return err
		}
	}
	raw, err := json.Marshal(a.manifest)
	if err != nil {
		return err
	}
	return a.write(manifestName, 0o600, int64(len(raw)), bytes.NewReader(raw))
}

func (a *archive) database(ctx context.Context, src Source) error {
	dir, err := os.MkdirTemp(src.TempDir, ".backup-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	name := filepath.Join(dir, "copy.db")
	if err := src.Database.Snapshot(ctx, name); err != nil {
		return err
	}
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := os.RemoveAll(dir); err != nil { // from here on a crash leaves nothing
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if info.Size() > MaxDatabase {
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: ErrSource.Code, What: "back-up", Why: "the database is larger than an archive takes",
			Do: "keep fewer events, or copy the disk",
		}
	}
	return a.add(src.DatabaseName, 0o600, info.Size(), contextReader{ctx, file})
}

func readFile(f File) ([]byte, error) {
	file, err := os.OpenFile(f.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // not to hang on a pipe
	if err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrSource.Code, What: "back-up of " + f.Name, Why: "it cannot be opened", Do: "look at the path, or leave it out", Err: err,
		}
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxFile {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrSource.Code, What: "back-up of " + f.Name, Why: fmt.Sprintf("it is no regular file, or larger than %d bytes", MaxFile),
			Do: "look at the path, or leave it out",
		}
	}
	return io.ReadAll(io.LimitReader(file, MaxFile))
}

// add writes a file and enters it in the manifest.
func (a *archive) add(name string, mode fs.FileMode, size int64, r io.Reader) error {
	hash := sha256.New()
	if err := a.write(name, mode, size, io.TeeReader(r, hash)); err != nil {
		return err
	}
	a.manifest.Files = append(a.manifest.Files, Entry{Name: name, Size: size, Mode: mode, SHA256: hex.EncodeToString(hash.Sum(nil))})
	return nil
}

func (a *archive) write(name string, mode fs.FileMode, size int64, r io.Reader) error {
	if err := a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(mode), Size: size, Format: tar.FormatPAX}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	n, err := io.Copy(a.tar, io.LimitReader(r, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// contextReader ends a long copy with its context.
type contextReader struct {
	ctx context.Context // lives as long as one copy
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

func fullOr(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrDiskFull.Code, What: "back-up or restore", Why: "the disk is full", Do: "free space and begin again", Err: err,
		}
	}
	return err
}
