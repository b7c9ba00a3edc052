package sandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/sandbox"
)

// What a killed proof left is removed; what only looks like it, is not.
func TestStaleBaitsAreSwept(t *testing.T) {
	needRoot(t)
	dir, outside := t.TempDir(), t.TempDir()
	old := time.Now().Add(-time.Hour)
	bait := func(dir, name, file string, uid int, when time.Time) {
		t.Helper()
		path := filepath.Join(dir, name)
		err := os.Mkdir(path, 0o711)
		if err == nil && file != "" {
			err = os.WriteFile(filepath.Join(path, file), sandbox.RootTester(), 0o755|os.ModeSetuid)
		}
		if err = errors.Join(err, os.Chown(path, uid, uid), os.Chtimes(path, when, when)); err != nil {
			t.Fatal(err)
		}
	}
	bait(dir, "redoubt-probe-1", "am-i-root", 0, old)
	bait(dir, "redoubt-probe-2", "", 0, old)
	bait(dir, "redoubt-probe-3", "am-i-root", 0, time.Now()) // of a proof in progress
	bait(dir, "redoubt-probe-4", "am-i-root", testUser, old) // another's
	bait(dir, "redoubt-probe-5", "something-else", 0, old)   // not what we make
	bait(dir, "redoubt-probe-x1", "am-i-root", 0, old)       // not how we call it
	bait(dir, "redoubt-probe-", "am-i-root", 0, old)         // nor this
	bait(outside, "redoubt-probe-6", "am-i-root", 0, old)    // elsewhere, where a link leads
	if err := os.Symlink(filepath.Join(outside, "redoubt-probe-6"), filepath.Join(dir, "redoubt-probe-7")); err != nil {
		t.Fatal(err)
	}
	sandbox.SweepBaits(dir, time.Now())
	var left []string
	for _, d := range []string{dir, outside} {
		entries, err := os.ReadDir(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			left = append(left, strings.TrimPrefix(e.Name(), "redoubt-probe-"))
		}
	}
	if want := []string{"", "3", "4", "5", "7", "x1", "6"}; !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
	for _, d := range []string{filepath.Join(dir, "redoubt-probe-4"), filepath.Join(outside, "redoubt-probe-6")} {
		if _, err := os.Stat(filepath.Join(d, "am-i-root")); err != nil {
			t.Errorf("what is not ours was emptied: %v", err)
		}
	}
}

// A proof begins with the sweep.
func TestAProofSweeps(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	stale, old := filepath.Join(dir, "redoubt-probe-1"), time.Now().Add(-time.Hour)
	if err := errors.Join(os.Mkdir(stale, 0o711), os.Chtimes(stale, old, old)); err != nil {
		t.Fatal(err)
	}
	if _, err := sandbox.Prove(context.Background(), sandbox.ProveConfig{CgroupRoot: unified(t)}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}
