package backup

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"filippo.io/age"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/refusal"
)

// staging is where an archive is unpacked, within the target directory, until all of it is proven.
const staging = ".restoring"

// Check looks at a restored data directory before it counts: the roof opens the database there and compares it with
// the audit log. What it returns refuses the restore.
type Check func(ctx context.Context, dir string) error

// Restore unpacks the archive r into dir, which must be empty or missing, and verifies all of it: every file's hash, that
// none is missing or foreign, the audit log, and check (which may be nil). Until then dir holds a staging directory only;
// an error leaves dir as it was. The database is moved into place last: a directory with a database is whole.
//
// Errors: [ErrPassphrase], [ErrNotEmpty], [ErrDamaged], [ErrHostile], [ErrNewer], [ErrAudit], [ErrDiskFull]; ctx's.
// Durability: on disk when it returns. Trust: r is attacker-controlled.
func Restore(ctx context.Context, r io.Reader, dir, passphrase string, check Check) (m Manifest, err error) {
	made, err := claim(dir)
	if err != nil {
		return m, err
	}
	work := filepath.Join(dir, staging)
	defer func() {
		err = fullOr(err)
		if err != nil {
			err = errors.Join(err, os.RemoveAll(work))
			if made {
				_ = os.Remove(dir)
			}
		}
	}()
	plain, err := decrypt(r, passphrase)
	if err != nil {
		return m, err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return m, fmt.Errorf("restore: %w", err)
	}
	if m, err = unpack(ctx, plain, work); err != nil {
		return m, err
	}
	if err := proveAudit(ctx, work, m); err != nil {
		return m, err
	}
	if check != nil {
		if err := check(ctx, work); err != nil {
			return m, err
		}
	}
	return m, settle(dir, m)
}

// claim makes sure that dir is there and empty, and says whether it made it.
func claim(dir string) (made bool, err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return false, fullOr(fmt.Errorf("restore: %w", err))
		}
		return true, nil
	case err != nil:
		return false, fmt.Errorf("restore: %w", err)
	case len(entries) > 0:
		return false, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrNotEmpty.Code, What: "restore into " + dir, Why: "the directory is not empty",
			Do: "give an empty one; what is there is never overwritten",
		}
	}
	return false, nil
}

func decrypt(r io.Reader, passphrase string) (io.Reader, error) {
	identity, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return nil, wrongPassphrase("none is given", nil)
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	plain, err := age.Decrypt(bufio.NewReaderSize(r, 1<<16), identity)
	if _, ok := errors.AsType[*age.NoIdentityMatchError](err); ok {
		return nil, wrongPassphrase("it does not open the archive", err)
	}
	if err != nil {
		return nil, damaged("it is no age archive to a passphrase, or its beginning is damaged", err)
	}
	return plain, nil
}

func wrongPassphrase(why string, err error) error {
	return &refusal.Error{
		Kind: refusal.Unproven, Code: ErrPassphrase.Code, What: "restore: passphrase", Why: why, Do: "give the one that the back-up was made with", Err: err,
	}
}

// unpack writes the files of a tar stream below dir and holds them against the manifest that ends it.
// Trust: r is attacker-controlled; it has no influence outside dir, which must be empty.
func unpack(ctx context.Context, r io.Reader, dir string) (Manifest, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Manifest{}, fmt.Errorf("restore: %w", err)
	}
	defer func() { _ = root.Close() }()
	stream := contextReader{ctx, r}
	in := tar.NewReader(stream)
	found := map[string]Entry{}
	var total int64
	for {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return Manifest{}, damaged("it ends without a manifest", nil)
		}
		if err != nil {
			return Manifest{}, unreadable(ctx, err)
		}
		if err := checkHeader(header); err != nil {
			return Manifest{}, err
		}
		if header.Name == manifestName {
			m, err := finish(ctx, in, header, found)
			if err != nil {
				return m, err
			}
			return m, atEnd(ctx, stream)
		}
		if total += header.Size; total > MaxTotal || len(found) >= MaxFiles {
			return Manifest{}, hostile("more files or bytes than a back-up has")
		}
		e, err := writeFile(ctx, root, header, in)
		if err != nil {
			return Manifest{}, err
		}
		found[e.Name] = e
	}
}

// checkHeader refuses everything but a plain file of a plain name and a size within bounds.
func checkHeader(h *tar.Header) error {
	if h.Typeflag != tar.TypeReg {
		return hostile("something that is no regular file")
	}
	for key := range h.PAXRecords { // sparse files among them, which would unpack to more than they hold
		if key != "size" && key != "path" {
			return hostile("a file with extended attributes")
		}
	}
	limit := int64(MaxDatabase)
	if strings.Contains(h.Name, "/") {
		limit = MaxFile
	}
	if h.Name == manifestName {
		limit = maxManifest
	}
	if h.Size < 0 || h.Size > limit {
		return hostile("a file larger than its bound")
	}
	return checkName(h.Name)
}

func writeFile(ctx context.Context, root *os.Root, h *tar.Header, r io.Reader) (e Entry, err error) {
	if parent := path.Dir(h.Name); parent != "." {
		if err := root.MkdirAll(parent, 0o700); err != nil {
			return e, blocked(err)
		}
	}
	// Exclusive: of two files of one name none is taken.
	file, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return e, blocked(err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(file, hash), r)
	if err != nil {
		return e, unreadable(ctx, err)
	}
	if n != h.Size {
		return e, damaged("it is cut short", io.ErrUnexpectedEOF)
	}
	if err := file.Sync(); err != nil {
		return e, fmt.Errorf("restore: %w", err)
	}
	return Entry{Name: h.Name, Size: n, SHA256: hex.EncodeToString(hash.Sum(nil))}, nil
}

// blocked is an error of making a file or directory: a name that is a file and a directory at once, or the disk.
func blocked(err error) error {
	var p *fs.PathError
	if errors.Is(err, fs.ErrExist) || errors.As(err, &p) && strings.Contains(p.Err.Error(), "not a directory") {
		return hostile("one name for two things")
	}
	return fmt.Errorf("restore: %w", err)
}

// unreadable is an error of reading the archive, or of the disk that it is copied to.
func unreadable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if _, ok := errors.AsType[*fs.PathError](err); ok {
		return fmt.Errorf("restore: %w", err)
	}
	return damaged("it is cut short or altered", err)
}

// finish reads the manifest and holds what was found against it.
func finish(ctx context.Context, in *tar.Reader, header *tar.Header, found map[string]Entry) (Manifest, error) {
	raw, err := io.ReadAll(in)
	if err != nil {
		return Manifest{}, unreadable(ctx, err)
	}
	if int64(len(raw)) != header.Size {
		return Manifest{}, damaged("it is cut short", io.ErrUnexpectedEOF)
	}
	m, err := parseManifest(raw)
	if err != nil {
		return m, err
	}
	if _, err := in.Next(); err != io.EOF {
		if err == nil {
			return m, hostile("files after its manifest")
		}
		return m, unreadable(ctx, err)
	}
	for _, want := range m.Files {
		got, ok := found[want.Name]
		if !ok {
			return m, damaged("a file is missing: "+want.Name, nil)
		}
		if got.SHA256 != want.SHA256 || got.Size != want.Size {
			return m, damaged("a file is not as it was backed up: "+want.Name, nil)
		}
		delete(found, want.Name)
	}
	if len(found) > 0 {
		return m, hostile("files that are not in its manifest")
	}
	if !slices.ContainsFunc(m.Files, func(e Entry) bool { return e.Name == m.Database }) {
		return m, damaged("it has no database", nil)
	}
	return m, nil
}

// atEnd reads the stream to its end, where age proves that nothing was cut off, and refuses what follows the tar.
func atEnd(ctx context.Context, r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	if err != nil {
		return unreadable(ctx, err)
	}
	if n > 0 {
		return hostile("something after its end")
	}
	return nil
}

// proveAudit verifies the unpacked audit log, by the key beside it: whether that is the key that auditors know is for
// them to say.
func proveAudit(ctx context.Context, dir string, m Manifest) error {
	checkpoint := path.Join(m.Audit, audit.LogDir, "checkpoint")
	if m.Leaves == 0 && !slices.ContainsFunc(m.Files, func(e Entry) bool { return e.Name == checkpoint }) {
		return nil // the log was never run
	}
	report, err := audit.Verify(ctx, filepath.Join(dir, filepath.FromSlash(m.Audit)), "", audit.Options{})
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	if report.OK() && report.Integrated == m.Leaves {
		return nil
	}
	why := fmt.Sprintf("it has %d leaves, %d were backed up", report.Integrated, m.Leaves)
	if len(report.Findings) > 0 {
		why = report.Findings[0].Detail
	}
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrAudit.Code, What: "restore: audit log", Why: why, Do: "use another back-up; nothing was restored",
	}
}

// settle gives files their modes and moves everything to its place, the database last.
func settle(dir string, m Manifest) error {
	work := filepath.Join(dir, staging)
	for _, e := range m.Files {
		if err := os.Chmod(filepath.Join(work, filepath.FromSlash(e.Name)), e.Mode); err != nil {
			return fmt.Errorf("restore: %w", err)
		}
	}
	if err := syncTree(work); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	entries, err := os.ReadDir(work)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	database := top(m.Database)
	slices.SortStableFunc(entries, func(a, b fs.DirEntry) int {
		return rank(a.Name() == database) - rank(b.Name() == database)
	})
	for i, e := range entries {
		if err := os.Rename(filepath.Join(work, e.Name()), filepath.Join(dir, e.Name())); err != nil {
			for _, moved := range entries[:i] { // as it was: dir was empty
				err = errors.Join(err, os.RemoveAll(filepath.Join(dir, moved.Name())))
			}
			return fmt.Errorf("restore: %w", err)
		}
	}
	if err := os.Remove(work); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return syncDir(dir)
}

func rank(last bool) int {
	if last {
		return 1
	}
	return 0
}

// syncTree syncs every directory below dir; files were synced when they were written.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return syncDir(path)
	})
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}
