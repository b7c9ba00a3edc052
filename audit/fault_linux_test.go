package audit_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// TestMain lets this binary be the server that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("REDOUBT_TEST_AUDITED"); dir != "" {
		audited(dir)
	}
	os.Exit(m.Run())
}

// audited commits records for ever, waits for their indexes, and says both on standard output.
func audited(top string) {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(top, sqlite.FileName)})
	must(err)
	l, err := audit.Open(ctx, audit.Config{Dir: filepath.Join(top, "audit"), Origin: origin, Outbox: s.Outbox(), Batch: time.Millisecond})
	must(err)
	go func() { must(l.Run(ctx)) }()
	for range 4 {
		go func() {
			for {
				r := event.NewRecord(`User::"op"`, "test.change", "thing")
				must(commit(ctx, s, r))
				index, err := l.Wait(ctx, r.ID)
				must(err)
				fmt.Printf("%s %d\n", r.ID, index) // one write: lines do not mix
			}
		}()
	}
	select {}
}

func TestACrashNeitherLosesNorDoublesALeaf(t *testing.T) {
	top := t.TempDir()
	acknowledged := map[string]uint64{}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for round := range 8 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), "REDOUBT_TEST_AUDITED="+top)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		first, err := lines.ReadString('\n') // it works now; from here on any moment may be the last
		if err != nil {
			t.Fatalf("round %d: the server ended: %v", round, err)
		}
		time.AfterFunc(time.Duration(random.IntN(200_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		rest, _ := io.ReadAll(lines)
		_ = cmd.Wait()
		for line := range strings.Lines(first + string(rest)) {
			var id string
			var index uint64
			if _, err := fmt.Sscanf(line, "%s %d\n", &id, &index); err == nil && strings.HasSuffix(line, "\n") {
				acknowledged[id] = index
			}
		}
	}
	s := openStore(t, top)
	dir := filepath.Join(top, "audit")
	var m meter
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox(), Meter: &m})
	drained(t, l)
	stop()
	r := verify(t, dir, l.Verifier(), audit.Options{Outbox: s.Outbox()})
	if !r.OK() || r.Pending != 0 || r.Unpublished != 0 || len(r.Notes) != 0 {
		t.Errorf("report: %s, %+v", codes(r), r)
	}
	for id, index := range acknowledged {
		if got, ok, err := s.Outbox().Placed(t.Context(), id); err != nil || !ok || got != index {
			t.Errorf("%s was acknowledged at %d, is at %d, %v, %v", id, index, got, ok, err)
		}
	}
	t.Logf("%d leaves, %d acknowledged", r.Size, len(acknowledged))
	if len(acknowledged) < 20 {
		t.Errorf("only %d were tried", len(acknowledged))
	}
}

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
	disk, top := tmpfs(t, 1<<20), t.TempDir()
	s := openStore(t, top) // the database is elsewhere: its own full disk is its own test
	dir := filepath.Join(disk, "audit")
	var m meter
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox(), Meter: &m, MaxWait: 5 * time.Second})
	s.OnRecord(l.Notify)
	n := 0
	one := func() error {
		n++
		_, err := l.Wait(t.Context(), put(t, s))
		return err
	}
	if err := one(); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	begun := time.Now()
	err := one()
	r := refusal.As(err)
	if r == nil || r.Code != audit.ErrDiskFull.Code || r.Kind != refusal.Unavailable {
		t.Fatalf("on the full disk: %v, want code %s", err, audit.ErrDiskFull.Code)
	}
	if time.Since(begun) > 4*time.Second {
		t.Error("it was left to the bound on waiting")
	}
	if err := l.Ready(); !errors.Is(err, audit.ErrDiskFull) {
		t.Errorf("ready: %v, want code %s", err, audit.ErrDiskFull.Code)
	}
	if st, err := l.Status(t.Context()); err != nil || st.Failing == "" || st.Pending != 1 {
		t.Errorf("status: %+v, %v", st, err)
	}
	if r := verify(t, dir, l.Verifier(), audit.Options{Outbox: s.Outbox()}); !r.OK() || r.Pending != 1 {
		t.Errorf("verify on the full disk: %s %+v", codes(r), r)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	drained(t, l)
	if err := one(); err != nil {
		t.Errorf("after space was freed: %v", err)
	}
	if err := l.Ready(); err != nil {
		t.Errorf("ready after space was freed: %v", err)
	}
	stop()
	proven(t, dir, l.Verifier(), s.Outbox(), n)
	if m.of("audit_failures reason disk-full") == 0 {
		t.Errorf("counted: %v", m.n)
	}
}

func TestALogBegunOnAFullDiskBeginsWhenThereIsSpace(t *testing.T) {
	disk, top := tmpfs(t, 1<<20), t.TempDir()
	s := openStore(t, top)
	dir := filepath.Join(disk, "audit")
	cfg := audit.Config{Dir: dir, Origin: origin, Outbox: s.Outbox()}
	ballast := filepath.Join(disk, "ballast")
	fillUp := func() {
		if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	fillUp()
	if _, err := audit.Open(t.Context(), cfg); !errors.Is(err, audit.ErrDiskFull) {
		t.Errorf("open: %v, want code %s", err, audit.ErrDiskFull.Code)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Open(t.Context(), cfg); err != nil { // makes the key
		t.Fatal(err)
	}
	fillUp()
	l, stop := run(t, cfg)
	put(t, s)
	time.Sleep(100 * time.Millisecond)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	drained(t, l)
	stop()
	proven(t, dir, l.Verifier(), s.Outbox(), 1)
}
