package sandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sandbox"
)

func benchCgroup(b *testing.B) *sandbox.Cgroup {
	b.Helper()
	data, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, " - cgroup2 ") {
			c, err := sandbox.MakeCgroup(strings.Fields(line)[4], identity.Unique("redoubt-bench"))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = c.Remove(context.Background()) })
			return c
		}
	}
	b.Skip("no unified hierarchy is mounted")
	return nil
}

func TestCgroupIsMadeKilledAndRemoved(t *testing.T) {
	needRoot(t)
	parent := filepath.Join(unified(t), identity.Unique("redoubt-test"))
	c, err := sandbox.MakeCgroup(parent, "w-1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // also when the test fails half way
		end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = c.Kill()
		_ = c.Remove(end)
		_ = os.Remove(parent)
	})
	info, err := os.Stat(c.Path)
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Ino != c.ID {
		t.Errorf("id %d is not the inode", c.ID)
	}
	if _, err := sandbox.MakeCgroup(parent, "w-1"); !errors.Is(err, sandbox.ErrCgroup) || refusal.As(err).Kind != refusal.Conflict {
		t.Errorf("made twice: %v", err)
	}
	p := started(t, sandbox.Spec{Argv: []string{programPath(t), workload, "sleep"}, CgroupFD: c.FD(), UID: testUser, GID: testUser})
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Remove(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("removed under a running workload: %v", err)
	}
	if err := os.Mkdir(filepath.Join(c.Path, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Signal != syscall.SIGKILL {
		t.Errorf("got %+v, %v", exit, err)
	}
	for range 2 { // the second time it is gone already
		if err := c.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(c.Path); err == nil {
		t.Error("it is still there")
	}
}

func TestCgroupNamesAndPlaces(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"", ".", "..", "a/b", "cgroup.procs", "a\nb", strings.Repeat("x", 300)} {
		if _, err := sandbox.MakeCgroup(unified(t), name); !errors.Is(err, sandbox.ErrCgroup) {
			t.Errorf("%q: got %v", name, err)
		}
	}
	dir := t.TempDir()
	for _, parent := range []string{dir, filepath.Join(dir, "x"), "relative", ""} {
		if _, err := sandbox.MakeCgroup(parent, "w"); !errors.Is(err, sandbox.ErrCgroup) {
			t.Errorf("%q: got %v", parent, err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Error("plain directories were made")
	}
}
