package backup_test

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
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/backup"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

const (
	passphrase = "correct horse battery"
	origin     = "example.org/audit"
	quick      = 10 // scrypt's work factor in tests
)

// server is the part of one that has state.
type server struct {
	dir   string
	store *sqlite.Store
	log   *audit.Log
	stop  func()
}

func start(t testing.TB, dir string) *server {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(dir, sqlite.FileName)})
	if err != nil {
		t.Fatalf("open store: %v", err)
	}
	l, err := audit.Open(t.Context(), audit.Config{Dir: filepath.Join(dir, "audit"), Origin: origin, Outbox: s.Outbox(), Batch: time.Millisecond})
	if err != nil {
		t.Fatalf("open log: %v", err)
	}
	s.OnRecord(l.Notify)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	t.Cleanup(stop)
	return &server{dir: dir, store: s, log: l, stop: stop}
}

func (s *server) change(ctx context.Context) (string, error) {
	r := event.NewRecord(`User::"op"`, "machine.join", "m")
	err := s.store.Fleet().Update(ctx, func(tx fleet.Tx) error {
		if err := tx.Machines.PutMachine(ctx, fleet.Machine{ID: r.ID}); err != nil {
			return err
		}
		return tx.Audit.PutRecord(ctx, r)
	})
	if err == nil {
		_, err = s.log.Wait(ctx, r.ID)
	}
	return r.ID, err
}

func (s *server) source(t testing.TB) backup.Source {
	t.Helper()
	kek := filepath.Join(s.dir, "kek")
	if err := os.WriteFile(kek, bytes.Repeat([]byte{7}, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	return backup.Source{
		Database: s.store, DatabaseName: sqlite.FileName, AuditDir: filepath.Join(s.dir, "audit"), AuditName: "audit",
		Files: []backup.File{{Name: "kek", Path: kek}}, WorkFactor: quick,
	}
}

// fits is the check that the roof gives: the database opens, and the log has every leaf that it marks.
func fits(ctx context.Context, dir string) error {
	s, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, sqlite.FileName)})
	if err != nil {
		return err
	}
	r, err := audit.Verify(ctx, filepath.Join(dir, "audit"), "", audit.Options{Outbox: s.Outbox()})
	if err == nil && !r.OK() {
		err = fmt.Errorf("findings: %+v", r.Findings)
	}
	return errors.Join(err, s.Close())
}

func TestABackupUnderWritesRestoresToOneState(t *testing.T) {
	s := start(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var acknowledged []string
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				id, err := s.change(context.WithoutCancel(ctx))
				if err != nil {
					t.Errorf("change: %v", err)
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, id)
				mu.Unlock()
			}
		})
	}
	for round := range 4 {
		time.Sleep(100 * time.Millisecond)
		mu.Lock()
		before := append([]string(nil), acknowledged...)
		mu.Unlock()
		var out bytes.Buffer
		m, err := backup.Backup(t.Context(), s.source(t), &out, passphrase)
		if err != nil {
			t.Fatalf("backup: %v", err)
		}
		if len(before) == 0 || m.Leaves < uint64(len(before)) {
			t.Fatalf("round %d: %d leaves backed up, %d were acknowledged before", round, m.Leaves, len(before))
		}
		dir := filepath.Join(t.TempDir(), "restored")
		if _, err := backup.Restore(t.Context(), &out, dir, passphrase, fits); err != nil {
			t.Fatalf("restore: %v", err)
		}
		if kek, err := os.ReadFile(filepath.Join(dir, "kek")); err != nil || len(kek) != 32 {
			t.Errorf("kek: %d bytes, %v", len(kek), err)
		}
		r := start(t, dir) // the restored server works on, with every change that was acknowledged
		if _, err := r.change(t.Context()); err != nil {
			t.Fatalf("a change after the restore: %v", err)
		}
		if err := r.store.Fleet().View(t.Context(), func(tx fleet.Tx) error {
			for _, id := range before {
				if _, err := tx.Machines.Machine(t.Context(), id); err != nil {
					return fmt.Errorf("%s was acknowledged before the back-up: %w", id, err)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		r.stop()
		report, err := audit.Verify(t.Context(), filepath.Join(dir, "audit"), s.log.Verifier(), audit.Options{})
		if err != nil || !report.OK() || report.Size < m.Leaves+1 {
			t.Errorf("the restored log: %+v, %v", report, err)
		}
	}
	cancel()
	wg.Wait()
	if left, _ := filepath.Glob(filepath.Join(s.dir, ".backup-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestRestoreKeepsModesAndLeavesNothingElse(t *testing.T) {
	_, archive := made(t)
	dir := t.TempDir() // empty, and there already
	m, err := backup.Restore(t.Context(), bytes.NewReader(archive), dir, passphrase, fits)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, e := range m.Files {
		want[e.Name] = true
		info, err := os.Stat(filepath.Join(dir, filepath.FromSlash(e.Name)))
		if err != nil || info.Mode().Perm() != e.Mode {
			t.Errorf("%s: %v, %v; want %v", e.Name, info.Mode(), err, e.Mode)
		}
	}
	for _, secret := range []string{"kek", sqlite.FileName, "audit/signer.key"} {
		if info, err := os.Stat(filepath.Join(dir, secret)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", secret, info, err)
		}
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, _ error) error {
		if rel, _ := filepath.Rel(dir, path); !d.IsDir() && !want[filepath.ToSlash(rel)] {
			t.Errorf("%s is there", rel)
		}
		return nil
	})
}

// made returns a server at rest and an archive of it.
func made(t testing.TB) (*server, []byte) {
	t.Helper()
	s := start(t, t.TempDir())
	for range 3 {
		if _, err := s.change(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if _, err := backup.Backup(t.Context(), s.source(t), &out, passphrase); err != nil {
		t.Fatal(err)
	}
	return s, out.Bytes()
}

func TestAnArchiveShowsNothingWithoutItsPassphrase(t *testing.T) {
	s, archive := made(t)
	for _, secret := range [][]byte{bytes.Repeat([]byte{7}, 32), []byte("PRIVATE+KEY"), []byte("machine.join"), []byte("SQLite format 3")} {
		if bytes.Contains(archive, secret) {
			t.Errorf("the archive shows %q", secret)
		}
	}
	_, err := backup.Restore(t.Context(), bytes.NewReader(archive), filepath.Join(t.TempDir(), "x"), "another passphrase", nil)
	if !errors.Is(err, backup.ErrPassphrase) {
		t.Errorf("another passphrase: %v", err)
	}
	if strings.Contains(err.Error(), "another") {
		t.Errorf("the error shows the passphrase: %v", err)
	}
	if _, err := backup.Backup(t.Context(), s.source(t), io.Discard, "short"); !errors.Is(err, backup.ErrPassphrase) {
		t.Errorf("a short passphrase: %v", err)
	}
}

func TestRestoreTakesAnEmptyDirectoryOnly(t *testing.T) {
	_, archive := made(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Restore(t.Context(), bytes.NewReader(archive), dir, passphrase, nil); !errors.Is(err, backup.ErrNotEmpty) {
		t.Errorf("got %v, want code %s", err, backup.ErrNotEmpty.Code)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("the directory was altered: %v", entries)
	}
}

func TestADamagedArchiveRestoresNothing(t *testing.T) {
	_, archive := made(t)
	for name, raw := range map[string][]byte{
		"empty":       nil,
		"text":        []byte("hello"),
		"cut to half": archive[:len(archive)/2],
		"cut by one":  archive[:len(archive)-1],
		"a bit flipped": func() []byte {
			b := bytes.Clone(archive)
			b[len(b)/2] ^= 1
			return b
		}(),
	} {
		dir := filepath.Join(t.TempDir(), "x")
		if _, err := backup.Restore(t.Context(), bytes.NewReader(raw), dir, passphrase, nil); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("%s: got %v, want code %s", name, err, backup.ErrDamaged.Code)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s: the directory was made and left", name)
		}
	}
}

func TestACheckThatFailsRestoresNothing(t *testing.T) {
	_, archive := made(t)
	dir := t.TempDir()
	no := errors.New("no")
	if _, err := backup.Restore(t.Context(), bytes.NewReader(archive), dir, passphrase, func(context.Context, string) error { return no }); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}

// item is one entry of a hostile archive.
type item struct {
	header tar.Header
	data   string
}

func plain(name, data string) item {
	return item{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data))}, data}
}

// tarOf writes items, and a manifest that lists those that are listed.
func tarOf(t testing.TB, items []item, listed ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	m := backup.Manifest{Format: "redoubt-backup", Version: 1, Database: "redoubt.db", Audit: "audit"}
	for _, it := range items {
		if err := w.WriteHeader(&it.header); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(w, it.data) // fails of those that claim a size of 0
		sum := sha256.Sum256([]byte(it.data))
		for _, name := range listed {
			if name == it.header.Name {
				m.Files = append(m.Files, backup.Entry{Name: name, Size: int64(len(it.data)), Mode: 0o600, SHA256: hex.EncodeToString(sum[:])})
			}
		}
	}
	raw, _ := json.Marshal(m)
	end := plain("manifest.json", string(raw))
	if err := w.WriteHeader(&end.header); err == nil { // fails where an item claims more than it has
		_, _ = io.WriteString(w, end.data)
		_ = w.Close()
	}
	return out.Bytes()
}

func seal(t testing.TB, raw []byte) io.Reader {
	t.Helper()
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	recipient.SetWorkFactor(quick)
	var out bytes.Buffer
	w, err := age.Encrypt(&out, recipient)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(raw)
	_ = w.Close()
	return &out
}

func TestAHostileArchiveIsRefusedAndStaysInItsDirectory(t *testing.T) {
	db := plain("redoubt.db", "x")
	special := func(flag byte, name, link string) item {
		return item{tar.Header{Typeflag: flag, Name: name, Linkname: link, Mode: 0o600}, ""}
	}
	for _, c := range []struct {
		name string
		raw  []byte
		want *refusal.Error
	}{
		{"a path that leads up", tarOf(t, []item{db, plain("../evil", "x")}, "redoubt.db", "../evil"), backup.ErrHostile},
		{"a path that leads up from below", tarOf(t, []item{db, plain("audit/../../evil", "x")}, "redoubt.db"), backup.ErrHostile},
		{"an absolute path", tarOf(t, []item{db, plain("/tmp/evil", "x")}, "redoubt.db"), backup.ErrHostile},
		{"a backslash", tarOf(t, []item{db, plain(`a\b`, "x")}, "redoubt.db"), backup.ErrHostile},
		{"a control character", tarOf(t, []item{db, plain("a\nb", "x")}, "redoubt.db"), backup.ErrHostile},
		{"a name beyond the bound", tarOf(t, []item{db, plain(strings.Repeat("a", 241), "x")}, "redoubt.db"), backup.ErrHostile},
		{"the staging directory", tarOf(t, []item{db, plain(".restoring/x", "x")}, "redoubt.db"), backup.ErrHostile},
		{"a symbolic link", tarOf(t, []item{special(tar.TypeSymlink, "audit", "/tmp"), db}, "redoubt.db", "audit"), backup.ErrHostile},
		{"a hard link", tarOf(t, []item{special(tar.TypeLink, "audit", "/etc/passwd"), db}, "redoubt.db", "audit"), backup.ErrHostile},
		{"a device", tarOf(t, []item{special(tar.TypeBlock, "audit", ""), db}, "redoubt.db", "audit"), backup.ErrHostile},
		{"a directory", tarOf(t, []item{special(tar.TypeDir, "audit/", ""), db}, "redoubt.db"), backup.ErrHostile},
		{"one file twice", tarOf(t, []item{db, db}, "redoubt.db"), backup.ErrHostile},
		{"a file that is a directory, too", tarOf(t, []item{db, plain("a", "x"), plain("a/b", "x")}, "redoubt.db"), backup.ErrHostile},
		{"a file that is not listed", tarOf(t, []item{db, plain("cron", "x")}, "redoubt.db"), backup.ErrHostile},
		{"no database", tarOf(t, []item{plain("kek", "x")}, "kek"), backup.ErrDamaged},
		{"a file missing", bytes.Replace(tarOf(t, []item{db}, "redoubt.db"), []byte(`"files":[{"name":"redoubt.db"`), []byte(`"files":[{"name":"redoubt.dc"`), 1), backup.ErrDamaged},
		{"a file altered", bytes.Replace(tarOf(t, []item{plain("redoubt.db", "honest")}, "redoubt.db"), []byte("honest"), []byte("forged"), 1), backup.ErrDamaged},
		{"a file larger than its bound", tarOf(t, []item{{tar.Header{Typeflag: tar.TypeReg, Name: "audit/x", Size: backup.MaxFile + 1}, ""}}), backup.ErrHostile},
		{"a database larger than its bound", tarOf(t, []item{{tar.Header{Typeflag: tar.TypeReg, Name: "redoubt.db", Size: backup.MaxDatabase + 1}, ""}}), backup.ErrHostile},
		{"extended attributes", tarOf(t, []item{db, {tar.Header{Typeflag: tar.TypeReg, Name: "x", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}, ""}}, "redoubt.db", "x"), backup.ErrHostile},
		{"no manifest", func() []byte { b := tarOf(t, []item{db}); return append(b[:1024:1024], make([]byte, 1024)...) }(), backup.ErrDamaged},
		{"something after its end", append(tarOf(t, []item{db}, "redoubt.db"), "more"...), backup.ErrHostile},
		{"a later version", bytes.Replace(tarOf(t, []item{db}, "redoubt.db"), []byte(`"version":1`), []byte(`"version":2`), 1), backup.ErrNewer},
		{"a mode for everybody", bytes.Replace(tarOf(t, []item{db}, "redoubt.db"), []byte(`"mode":384`), []byte(`"mode":511`), 1), backup.ErrHostile},
	} {
		t.Run(c.name, func(t *testing.T) {
			top := t.TempDir()
			dir := filepath.Join(top, "a", "b")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := backup.Restore(t.Context(), seal(t, c.raw), dir, passphrase, nil); !errors.Is(err, c.want) {
				t.Errorf("got %v, want code %s", err, c.want.Code)
			}
			n := 0
			_ = filepath.WalkDir(top, func(string, fs.DirEntry, error) error { n++; return nil })
			if n != 3 {
				t.Errorf("%d things below the directory, want a and b only", n)
			}
		})
	}
}

func TestAnArchiveWithAnAlteredAuditLogIsRefused(t *testing.T) {
	s := start(t, t.TempDir())
	if _, err := s.change(t.Context()); err != nil {
		t.Fatal(err)
	}
	src := s.source(t)
	s.stop()
	bundle := filepath.Join(s.dir, "audit", "log", "tile/entries/000.p/1")
	raw, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundle, bytes.Replace(raw, []byte("join"), []byte("gone"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	again, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(s.dir, sqlite.FileName)})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	src.Database = again
	var out bytes.Buffer
	if _, err := backup.Backup(t.Context(), src, &out, passphrase); err != nil {
		t.Fatal(err)
	}
	if _, err := backup.Restore(t.Context(), &out, filepath.Join(t.TempDir(), "x"), passphrase, nil); !errors.Is(err, backup.ErrAudit) {
		t.Errorf("got %v, want code %s", err, backup.ErrAudit.Code)
	}
}

func TestBackupRefusesASourceThatIsNotThere(t *testing.T) {
	s := start(t, t.TempDir())
	for name, alter := range map[string]func(*backup.Source){
		"no database":        func(src *backup.Source) { src.Database = nil },
		"a missing file":     func(src *backup.Source) { src.Files[0].Path += "x" },
		"a directory":        func(src *backup.Source) { src.Files[0].Path = s.dir },
		"a name twice":       func(src *backup.Source) { src.Files = append(src.Files, src.Files[0]) },
		"a name below audit": func(src *backup.Source) { src.Files[0].Name = "audit/kek" },
		"a name that is no":  func(src *backup.Source) { src.Files[0].Name = "../kek" },
		"the manifest":       func(src *backup.Source) { src.Files[0].Name = "manifest.json" },
	} {
		src := s.source(t)
		alter(&src)
		if _, err := backup.Backup(t.Context(), src, io.Discard, passphrase); !errors.Is(err, backup.ErrSource) {
			t.Errorf("%s: got %v, want code %s", name, err, backup.ErrSource.Code)
		}
	}
	pipe := filepath.Join(s.dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	src := s.source(t)
	src.Files[0].Path = pipe
	if _, err := backup.Backup(t.Context(), src, io.Discard, passphrase); !errors.Is(err, backup.ErrSource) {
		t.Errorf("a pipe: %v", err)
	}
}

// FuzzUnpack feeds tar streams to the parser behind the decryption: whatever they hold, nothing appears outside the
// directory, and what is accepted is what the manifest says.
func FuzzUnpack(f *testing.F) {
	db := plain("redoubt.db", "x")
	f.Add(tarOf(f, []item{db, plain("audit/log/checkpoint", "y")}, "redoubt.db", "audit/log/checkpoint"))
	f.Add(tarOf(f, []item{db, plain("../evil", "x")}, "redoubt.db", "../evil"))
	f.Add(tarOf(f, []item{{tar.Header{Typeflag: tar.TypeSymlink, Name: "audit", Linkname: ".."}, ""}, plain("audit/evil", "x")}))
	f.Add(tarOf(f, []item{{tar.Header{Typeflag: tar.TypeReg, Name: "x", Size: 1 << 40, Format: tar.FormatGNU}, ""}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := backup.Unpack(t.Context(), bytes.NewReader(raw), dir)
		if entries, _ := os.ReadDir(top); len(entries) != 1 {
			t.Fatalf("outside the directory: %v", entries)
		}
		if err != nil {
			return
		}
		files := 0
		_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, _ error) error {
			if !d.IsDir() {
				files++
				if !d.Type().IsRegular() {
					t.Errorf("%s is a %v", d.Name(), d.Type())
				}
			}
			return nil
		})
		if files != len(m.Files) {
			t.Errorf("%d files, %d in the manifest", files, len(m.Files))
		}
	})
}
