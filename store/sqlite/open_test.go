package sqlite_test

import (
	"bytes"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

func isCode(err error, want *refusal.Error) bool { return errors.Is(err, want) }

// filled makes a database with something in it, closes it, and returns its bytes.
func filled(t *testing.T, path string) []byte {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		r := rec("fill")
		if err := s.Overrides().PutOverride(t.Context(), set.Override{ID: r.ID, Note: string(bytes.Repeat([]byte("x"), 500))}, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestOpenMakesAPrivateFileAndOpensItAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "with space%3f#.db")
	old := syscall.Umask(0)
	s := open(t, path)
	syscall.Umask(old)
	r := rec("x")
	if err := s.Overrides().PutOverride(t.Context(), set.Override{ID: "o-1"}, r); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + suffix)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%q: mode %v, %v; want 0600", suffix, info.Mode(), err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	again := open(t, path)
	if got := pending(t, again); len(got) != 1 || got[0] != r.ID {
		t.Errorf("after reopening: pending %v", got)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("a database that others could read stays so: %v", info.Mode())
	}
}

func TestOpenRefusesWhatIsNotItsDatabaseAndLeavesItAlone(t *testing.T) {
	foreign := func(t *testing.T, path, extra string) {
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if _, err := db.Exec("CREATE TABLE customers (name TEXT);" + extra); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string)
		want *refusal.Error
	}{
		{"text", func(t *testing.T, path string) { write(t, path, []byte("name: redoubt\n")) }, sqlite.ErrNotSQLite},
		{"short", func(t *testing.T, path string) { write(t, path, []byte("SQLite format 3\x00")) }, sqlite.ErrNotSQLite},
		{"directory", func(t *testing.T, path string) { _ = os.Mkdir(path, 0o700) }, sqlite.ErrNotSQLite},
		{"another program's", func(t *testing.T, path string) { foreign(t, path, "") }, sqlite.ErrForeign},
		{"another program's with an id", func(t *testing.T, path string) { foreign(t, path, "PRAGMA application_id = 77") }, sqlite.ErrForeign},
		{"damaged pages", func(t *testing.T, path string) {
			raw := filled(t, path)
			for i := 4096; i < len(raw); i += 512 {
				copy(raw[i:], bytes.Repeat([]byte{0xa5}, 64))
			}
			write(t, path, raw)
		}, sqlite.ErrCorrupt},
		{"one damaged page", func(t *testing.T, path string) {
			raw := filled(t, path)
			copy(raw[len(raw)-4096+8:], bytes.Repeat([]byte{0xff}, 6)) // the first cell pointers of the last page
			write(t, path, raw)
		}, sqlite.ErrCorrupt},
		{"cut short", func(t *testing.T, path string) { raw := filled(t, path); write(t, path, raw[:len(raw)/2]) }, sqlite.ErrCorrupt},
		{"destroyed beginning", func(t *testing.T, path string) {
			raw := filled(t, path)
			copy(raw, make([]byte, 100))
			write(t, path, raw)
		}, sqlite.ErrNotSQLite},
		{"a later version's", func(t *testing.T, path string) {
			filled(t, path)
			db, err := sql.Open("sqlite", path)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, 1)"); err != nil {
				t.Fatal(err)
			}
		}, sqlite.ErrNewer},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), sqlite.FileName)
			c.make(t, path)
			before, _ := os.ReadFile(path)
			s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
			if err == nil {
				s.Close()
			}
			if !isCode(err, c.want) {
				t.Fatalf("got %v, want code %s", err, c.want.Code)
			}
			if r := refusal.As(err); r.What == "" || r.Why == "" || r.Do == "" {
				t.Errorf("the refusal says too little: %+v", r)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("the file was altered")
			}
		})
	}
}

func TestOpenRefusesToBeginAnewWhereADatabaseVanished(t *testing.T) {
	path := filepath.Join(t.TempDir(), sqlite.FileName)
	s := open(t, path)
	if err := s.Overrides().PutOverride(t.Context(), set.Override{ID: "o-1"}, rec("x")); err != nil {
		t.Fatal(err)
	}
	wal, err := os.ReadFile(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), sqlite.FileName)
	write(t, other+"-wal", wal)
	if _, err := sqlite.Open(t.Context(), sqlite.Config{Path: other}); !isCode(err, sqlite.ErrMissing) {
		t.Errorf("got %v, want code %s", err, sqlite.ErrMissing.Code)
	}
}

func TestASecondProcessIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	lock, err := sqlite.LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = sqlite.LockDir(dir) // flock is by open file: within one process it stands for another
	if !isCode(err, sqlite.ErrLocked) {
		t.Fatalf("got %v, want code %s", err, sqlite.ErrLocked.Code)
	}
	if want := "pid "; !bytes.Contains([]byte(err.Error()), []byte(want)) {
		t.Errorf("%q does not name the other process", err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	again, err := sqlite.LockDir(dir)
	if err != nil {
		t.Fatalf("after it was given back: %v", err)
	}
	_ = again.Unlock()
}

func TestABusyDatabaseIsRefusedClearly(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the busy timeout of 5 s")
	}
	path := filepath.Join(t.TempDir(), sqlite.FileName)
	s := open(t, path)
	db, err := sql.Open("sqlite", path+"?_txlock=immediate")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := s.Overrides().PutOverride(t.Context(), set.Override{ID: "o-1"}, rec("x")); !isCode(err, sqlite.ErrBusy) {
		t.Errorf("got %v, want code %s", err, sqlite.ErrBusy.Code)
	}
}

func TestRecordsMustSayWhoAndWhat(t *testing.T) {
	s := fresh(t)
	for _, r := range []event.Record{{}, {ID: "r-1"}, func() event.Record { r := rec(""); return r }()} {
		if err := s.Overrides().PutOverride(t.Context(), set.Override{ID: "o-1"}, r); !isCode(err, sqlite.ErrRecord) {
			t.Errorf("record %+v: got %v, want code %s", r, err, sqlite.ErrRecord.Code)
		}
	}
}

func write(t testing.TB, path string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}
