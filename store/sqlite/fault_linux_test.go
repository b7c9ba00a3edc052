package sqlite_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// TestMain lets this binary be the server that is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv("REDOUBT_TEST_WRITER"); path != "" {
		writer(path)
	}
	os.Exit(m.Run())
}

// writer commits for ever, and says on standard output what was acknowledged.
func writer(path string) {
	dir, err := sqlite.LockDir(filepath.Dir(path))
	if err != nil {
		panic(err)
	}
	defer dir.Unlock()
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Config{Path: path})
	if err != nil {
		panic(err)
	}
	for {
		r := rec("write")
		if err := s.Overrides().PutOverride(ctx, set.Override{ID: r.ID, Note: strings.Repeat("x", 1000)}, r); err != nil {
			panic(err)
		}
		fmt.Println(r.ID)
	}
}

func TestWhatWasAcknowledgedSurvivesKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), sqlite.FileName)
	acknowledged := map[string]bool{}
	for round := range 4 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), "REDOUBT_TEST_WRITER="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n < 20+37*round && lines.Scan(); n++ {
			acknowledged[lines.Text()] = true
		}
		// While it works, nobody else may begin to.
		if _, err := sqlite.LockDir(filepath.Dir(path)); !isCode(err, sqlite.ErrLocked) {
			t.Errorf("locking the directory of a live server: %v", err)
		}
		_ = cmd.Process.Kill()
		rest, _ := io.ReadAll(out) // what it said before it died counts, whole lines only
		for line := range strings.Lines(string(rest)) {
			if id, ok := strings.CutSuffix(line, "\n"); ok {
				acknowledged[id] = true
			}
		}
		_ = cmd.Wait()

		s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		kept := map[string]bool{}
		for _, id := range pending(t, s) {
			kept[id] = true
		}
		overrides, err := s.Overrides().Overrides(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for id := range acknowledged {
			if !kept[id] {
				t.Errorf("round %d: %s was acknowledged and is gone", round, id)
			}
		}
		if len(overrides) != len(kept) {
			t.Errorf("round %d: %d changes, %d records", round, len(overrides), len(kept))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(acknowledged) < 100 {
		t.Errorf("only %d commits were tried", len(acknowledged))
	}
}

// tmpfs mounts a file system of this many bytes.
func tmpfs(t *testing.T, size int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs takes root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func TestAFullDiskRefusesAndRecovers(t *testing.T) {
	dir := tmpfs(t, 4<<20)
	path := filepath.Join(dir, sqlite.FileName)
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{}
	put := func() error {
		r := rec("write")
		err := s.Overrides().PutOverride(t.Context(), set.Override{ID: r.ID, Note: strings.Repeat("x", 8000)}, r)
		if err == nil {
			want = append(want, r.ID)
		}
		return err
	}
	var full error
	for deadline := time.Now().Add(8 * time.Second); full == nil && time.Now().Before(deadline); {
		full = put()
	}
	r := refusal.As(full)
	if r == nil || r.Code != sqlite.ErrDiskFull.Code || r.Kind != refusal.Unavailable {
		t.Fatalf("on the full disk: %v, want code %s", full, sqlite.ErrDiskFull.Code)
	}
	check := func(when string) {
		t.Helper()
		if got := pending(t, s); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Fatalf("%s: %d records are kept, %d were acknowledged", when, len(got), len(want))
		}
	}
	check("on the full disk")
	for range 3 { // it goes on refusing, and reading
		if err := put(); !isCode(err, sqlite.ErrDiskFull) {
			if err != nil {
				t.Fatalf("on the full disk: %v", err)
			}
		}
	}
	check("after more refusals")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := put(); err != nil {
			t.Fatalf("after space was freed: %v", err)
		}
	}
	check("after space was freed")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	check("after reopening")
}

func TestAFullDiskRefusesAnOpenAndASnapshot(t *testing.T) {
	dir := tmpfs(t, 1<<20)
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 1<<20), 0o600); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: filepath.Join(dir, sqlite.FileName)})
	if err == nil {
		s.Close()
	}
	if !isCode(err, sqlite.ErrDiskFull) {
		t.Errorf("open: %v, want code %s", err, sqlite.ErrDiskFull.Code)
	}
	src := fresh(t)
	to := filepath.Join(dir, "copy.db")
	if err := src.Snapshot(t.Context(), to); !isCode(err, sqlite.ErrDiskFull) {
		t.Errorf("snapshot: %v, want code %s", err, sqlite.ErrDiskFull.Code)
	}
	if _, err := os.Stat(to); err == nil {
		t.Error("a failed snapshot left its file behind")
	}
}
