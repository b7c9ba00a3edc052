//go:build linux

package spool_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/event/spool"
)

// childDir is the environment variable that makes the test binary a process that only emits, until it is killed.
const childDir = "REDOUBT_TEST_SPOOL"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		emitForever(dir)
	}
	os.Exit(m.Run())
}

// emitForever says on standard output which event is the last on disk.
func emitForever(dir string) {
	s, err := spool.Open(dir, spool.Config{SegmentBytes: 1, SyncEvery: time.Hour})
	if err != nil {
		panic(err)
	}
	go func() { _ = s.Run(context.Background()) }()
	for i := 0; ; i++ {
		s.Emit(numbered(i))
		if i%64 == 0 {
			fmt.Println(s.Status().Last)
		}
		if i%1024 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

func TestKilledWhileWritingLosesNothingThatWasWritten(t *testing.T) {
	dir := t.TempDir()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), childDir+"="+dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(400*time.Millisecond, func() { _ = child.Process.Signal(unix.SIGKILL) })
	var said uint64
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if v, err := strconv.ParseUint(lines.Text(), 10, 64); err == nil {
			said = max(said, v)
		}
	}
	_ = child.Wait()
	if said < 1000 {
		t.Fatalf("the child wrote %d events before it was killed: too few to tell", said)
	}

	meter := &tally{}
	s, _ := start(t, dir, spool.Config{Meter: meter})
	last := s.Status().Last
	if last < said {
		t.Fatalf("the child had written %d events, %d are left", said, last)
	}
	if meter.get("spool_lost reason unclean") != 1 {
		t.Error("the kill was not counted")
	}
	got := take(t, s, 0, int(said))
	for i, g := range got {
		if g.Seq != uint64(i+1) {
			t.Fatalf("event %d has number %d: something is missing", i+1, g.Seq)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for after := last; ; {
		rest, err := s.Next(ctx, after, 1)
		if err != nil {
			t.Fatalf("the reader is not told of the kill: %v", err)
		}
		if e := rest[0].Event; e.Kind == spool.KindLost && e.Attrs["reason"] == "unclean" {
			if most, _ := e.Attrs["at_most"].(float64); most != 2*spool.MaxPending {
				t.Errorf("at most %v, want the size of what is in memory", e.Attrs["at_most"])
			}
			return
		}
		after = rest[0].Seq
	}
}

// tmpfs mounts a file system of that size, as a disk that gets full for real.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a tmpfs here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestAFullDiskLosesTheNewKeepsTheOldAndRecovers(t *testing.T) {
	dir := filepath.Join(tmpfs(t, "1m"), "spool")
	meter := &tally{}
	s, stop := start(t, dir, spool.Config{SegmentBytes: 1, SyncEvery: 10 * time.Millisecond, Meter: meter})
	fill(t, s, 60) // 1.9 MiB
	lost := meter.get("spool_lost reason disk")
	if lost < 20 {
		t.Fatalf("lost %d on a full disk, want about half of 60", lost)
	}
	kept := int(s.Status().Last)
	if kept+int(lost) != 60 {
		t.Errorf("kept %d and lost %d, want 60 in sum", kept, lost)
	}
	wantNumbers(t, take(t, s, 0, kept), 0)

	stop() // the state is kept although the disk is full: also what is to be told
	s, _ = start(t, dir, spool.Config{SegmentBytes: 1, SyncEvery: 10 * time.Millisecond, Meter: meter})
	wantNumbers(t, take(t, s, 0, kept), 0)
	if err := s.Ack(uint64(kept)); err != nil {
		t.Fatalf("acknowledging on a full disk: %v", err)
	}
	note := take(t, s, uint64(kept), 1)
	wantNote(t, note[0].Event, spool.LostDisk, lost)
	s.Emit(numbered(77))
	wantNumbers(t, take(t, s, note[0].Seq, 1), 77)
	if meter.get("spool_lost reason torn") != 0 || meter.get("spool_lost reason corrupt") != 0 || meter.get("spool_lost reason unclean") != 0 {
		t.Error("a full disk left damage behind")
	}
}

func TestADiskThatIsFullFromTheStartIsAClearError(t *testing.T) {
	dir := tmpfs(t, "64k")
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 64<<10), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := spool.Open(filepath.Join(dir, "spool"), spool.Config{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Open: %v, want no space left", err)
	}
}
