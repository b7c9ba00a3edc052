package spool_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/event/spool"
	"github.com/redoubtsec/redoubt/refusal"
)

// tally is a Meter that remembers.
type tally struct {
	mu sync.Mutex
	n  map[string]int64
}

func (t *tally) Count(name string, n int64, labels ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n == nil {
		t.n = map[string]int64{}
	}
	t.n[strings.Join(append([]string{name}, labels...), " ")] += n
}

func (t *tally) get(key string) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n[key]
}

func numbered(i int) event.Event {
	e := event.New(event.Runtime, "test")
	e.Attrs = map[string]any{"n": i}
	return e
}

// start opens a spool and runs it; stop ends it as an agent does.
func start(t *testing.T, dir string, c spool.Config) (s *spool.Spool, stop func()) {
	t.Helper()
	s, err := spool.Open(dir, c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// take reads until it has n events, failing after a while.
func take(t *testing.T, s *spool.Spool, after uint64, n int) []spool.Numbered {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var out []spool.Numbered
	for len(out) < n {
		got, err := s.Next(ctx, after, n-len(out))
		if err != nil {
			t.Fatalf("after %d of %d events: %v", len(out), n, err)
		}
		out = append(out, got...)
		after = got[len(got)-1].Seq
	}
	return out
}

// n returns what numbered put in.
func n(e event.Event) int {
	f, ok := e.Attrs["n"].(float64)
	if !ok {
		return -1
	}
	return int(f)
}

func wantNumbers(t *testing.T, got []spool.Numbered, from int) {
	t.Helper()
	for i, g := range got {
		if n(g.Event) != from+i {
			t.Fatalf("event at %d is %s %v, want number %d", g.Seq, g.Event.Kind, g.Event.Attrs, from+i)
		}
	}
}

// settle waits until what was emitted is on disk.
func settle(t *testing.T, s *spool.Spool, last uint64) {
	t.Helper()
	for range 500 {
		if s.Status().Last >= last {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still %+v, want %d on disk", s.Status(), last)
}

func TestEventsComeInOrderAndAgainUntilAcknowledged(t *testing.T) {
	dir := t.TempDir()
	s, stop := start(t, dir, spool.Config{})
	for i := range 1000 {
		s.Emit(numbered(i))
	}
	wantNumbers(t, take(t, s, 0, 1000), 0)
	wantNumbers(t, take(t, s, 0, 10), 0)
	if err := s.Ack(400); err != nil {
		t.Fatal(err)
	}
	wantNumbers(t, take(t, s, 0, 10), 400)
	stop()

	s, _ = start(t, dir, spool.Config{})
	s.Emit(numbered(1000))
	got := take(t, s, 0, 601)
	wantNumbers(t, got, 400)
	if first, last := got[0].Seq, got[600].Seq; first != 401 || last != 1001 {
		t.Errorf("numbers are %d to %d, want 401 to 1001", first, last)
	}
}

func TestNextWaitsForAnEvent(t *testing.T) {
	s, _ := start(t, t.TempDir(), spool.Config{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Next(ctx, 0, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next of an empty spool: %v, want it to wait", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { s.Emit(numbered(7)) })
	wantNumbers(t, take(t, s, 0, 1), 7)
}

func TestAcknowledgedSegmentsAreRemoved(t *testing.T) {
	dir := t.TempDir()
	s, _ := start(t, dir, spool.Config{SegmentBytes: 1}) // the least: two of the largest events
	fill(t, s, 40)
	st := s.Status()
	if st.Segments < 5 {
		t.Fatalf("%d segments, want several", st.Segments)
	}
	if err := s.Ack(st.Last); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.seg")); len(left) != 1 {
		t.Errorf("%d segment files are left, want the one that is written to", len(left))
	}
	if err := s.Ack(st.Last + 1); !errors.Is(err, &refusal.Error{Code: "ack-ahead"}) {
		t.Errorf("acknowledging the future: %v", err)
	}
	if err := s.Ack(1); err != nil || s.Status().Acked != st.Last {
		t.Errorf("acknowledging the past: %v, acked %d", err, s.Status().Acked)
	}
}

// big is an event of about 32 KiB.
func big(i int) event.Event {
	e := numbered(i)
	e.Message = strings.Repeat("x", 32<<10)
	return e
}

// fill emits k large events, one by one, so that memory is not what bounds them.
func fill(t *testing.T, s *spool.Spool, k int) {
	t.Helper()
	for i := range k {
		before := s.Status()
		s.Emit(big(i))
		for range 1000 {
			if now := s.Status(); now.Last > before.Last || now.Lost > before.Lost {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func TestAFullSpoolKeepsWhatItHasAndCountsTheNew(t *testing.T) {
	meter := &tally{}
	s, _ := start(t, t.TempDir(), spool.Config{SegmentBytes: 1, MaxBytes: 1, SyncEvery: 10 * time.Millisecond, Meter: meter})
	fill(t, s, 20) // four fit a segment of 128 KiB, two segments
	st := s.Status()
	if st.Bytes > 256<<10 {
		t.Errorf("%d bytes on disk, above the bound", st.Bytes)
	}
	lost := meter.get("spool_lost reason full")
	if kept := int64(st.Last); kept < 6 || kept+lost != 20 {
		t.Fatalf("kept %d and lost %d, want 20 in sum", kept, lost)
	}
	got := take(t, s, 0, int(st.Last))
	wantNumbers(t, got, 0)
	if err := s.Ack(st.Last); err != nil {
		t.Fatal(err)
	}
	note := take(t, s, st.Last, 1)[0].Event
	wantNote(t, note, spool.LostFull, lost)
	s.Emit(numbered(99))
	wantNumbers(t, take(t, s, st.Last+1, 1), 99)
}

func wantNote(t *testing.T, e event.Event, reason spool.Reason, count int64) {
	t.Helper()
	if e.Kind != spool.KindLost || e.Attrs["reason"] != string(reason) || e.Attrs["count"] != float64(count) {
		t.Errorf("got %s %v, want a note of %d lost for %s", e.Kind, e.Attrs, count, reason)
	}
}

func TestMemoryIsBoundedAndTheLossIsTold(t *testing.T) {
	meter := &tally{}
	s, err := spool.Open(t.TempDir(), spool.Config{Meter: meter})
	if err != nil {
		t.Fatal(err)
	}
	for i := range spool.MaxPending + 100 { // nobody writes
		s.Emit(numbered(i))
	}
	if got := meter.get("spool_lost reason memory"); got != 100 {
		t.Errorf("lost %d beyond the bound on events, want 100", got)
	}
	if err := s.Close(); err != nil { // writes what is in memory
		t.Fatal(err)
	}
	if st := s.Status(); st.Last != spool.MaxPending+1 {
		t.Errorf("last is %d, want every event and one note", st.Last)
	}

	s, err = spool.Open(t.TempDir(), spool.Config{Meter: meter})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	before := meter.get("spool_lost reason memory")
	for i := range 300 { // 9.6 MiB
		s.Emit(big(i))
	}
	if got := meter.get("spool_lost reason memory") - before; got < 30 || got > 70 {
		t.Errorf("lost %d beyond the bound on bytes, want about 45", got)
	}
}

func TestALargeEventLosesItsDetail(t *testing.T) {
	meter := &tally{}
	s, _ := start(t, t.TempDir(), spool.Config{Meter: meter})
	e := numbered(1)
	e.Detail = json.RawMessage(`"` + strings.Repeat("d", event.MaxBytes) + `"`)
	s.Emit(e)
	got := take(t, s, 0, 1)[0].Event
	if len(got.Detail) != 0 || got.Attrs["detail.dropped"] != float64(event.MaxBytes+2) || n(got) != 1 {
		t.Errorf("got detail of %d bytes, attributes %v", len(got.Detail), got.Attrs)
	}
	if _, touched := e.Attrs["detail.dropped"]; touched {
		t.Error("the emitter's own attributes were changed")
	}
	e.Detail, e.Message = nil, strings.Repeat("m", event.MaxBytes)
	s.Emit(e)
	e.Message, e.Attrs = "", map[string]any{"x": func() {}}
	s.Emit(e)
	total := int64(0)
	for _, g := range take(t, s, 1, 1) {
		total += int64(g.Event.Attrs["count"].(float64))
	}
	if meter.get("spool_lost reason oversize") != 2 || total < 1 {
		t.Errorf("counted %d, told %d", meter.get("spool_lost reason oversize"), total)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	_, stop := start(t, dir, spool.Config{})
	if _, err := spool.Open(dir, spool.Config{}); !errors.Is(err, spool.ErrInUse) {
		t.Errorf("second Open: %v, want ErrInUse", err)
	}
	stop()
	s, err := spool.Open(dir, spool.Config{})
	if err != nil {
		t.Fatalf("Open after Close: %v", err)
	}
	_ = s.Close()
}

// written returns the directory of a closed spool with k events in one segment, and that segment's path.
func written(t *testing.T, k int) (dir, segment string) {
	t.Helper()
	dir = t.TempDir()
	s, stop := start(t, dir, spool.Config{})
	for i := range k {
		s.Emit(numbered(i))
	}
	settle(t, s, uint64(k))
	stop()
	segs, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	if err != nil || len(segs) != 1 {
		t.Fatalf("segments %v, %v", segs, err)
	}
	return dir, segs[0]
}

func TestATornEndIsCutWhereverItTore(t *testing.T) {
	_, seg := written(t, 3)
	whole, err := os.ReadFile(seg)
	if err != nil {
		t.Fatal(err)
	}
	lastFrame := bytes.LastIndexByte(whole, 0xF7)
	for cut := lastFrame + 1; cut < len(whole); cut++ {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(seg)), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		meter := &tally{}
		s, err := spool.Open(dir, spool.Config{Meter: meter})
		if err != nil {
			t.Fatalf("torn at %d: %v", cut, err)
		}
		if st := s.Status(); st.Last != 2 || meter.get("spool_lost reason torn") != 1 {
			t.Fatalf("torn at %d: last %d, counted %d", cut, st.Last, meter.get("spool_lost reason torn"))
		}
		s.Emit(numbered(2))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if cut%29 != 0 {
			continue // reading back the events of some is enough
		}
		s, _ = start(t, dir, spool.Config{})
		got := take(t, s, 0, 4)
		wantNumbers(t, got[:2], 0)
		wantNote(t, got[2].Event, spool.LostTorn, 1)
		if n(got[3].Event) != 2 {
			t.Errorf("torn at %d: the event after it is %v", cut, got[3].Event.Attrs)
		}
	}
}

func TestADamagedMiddleCostsWhatItHoldsAndIsCountedOnce(t *testing.T) {
	dir, seg := written(t, 50)
	text, err := os.ReadFile(seg)
	if err != nil {
		t.Fatal(err)
	}
	frame := len(text) / 50 // all of about one size
	for _, damage := range []struct {
		name  string
		spoil func([]byte)
	}{
		{"a flipped bit", func(b []byte) { b[20*frame+frame/2] ^= 1 }},
		{"a flipped bit within a word", func(b []byte) { i := nthFrame(b, 20); b[i+bytes.Index(b[i:], []byte(`"test"`))+2] ^= 1 }},
		{"a length that is too long", func(b []byte) { i := nthFrame(b, 20); b[i+6] ^= 0x7f }},
		{"zeros", func(b []byte) { i := nthFrame(b, 20); clear(b[i+3 : i+frame/2]) }},
		{"a lost magic", func(b []byte) { b[nthFrame(b, 20)] = 0 }},
	} {
		t.Run(damage.name, func(t *testing.T) {
			spoiled := bytes.Clone(text)
			damage.spoil(spoiled)
			if err := os.WriteFile(seg, spoiled, 0o600); err != nil {
				t.Fatal(err)
			}
			_ = os.Remove(filepath.Join(dir, "state")) // forget what was counted before
			meter := &tally{}
			s, stop := start(t, dir, spool.Config{Meter: meter})
			got := take(t, s, 0, 49)
			if first, last := n(got[0].Event), n(got[48].Event); first != 0 || last != 49 {
				t.Errorf("read from %d to %d, want all but one of 0 to 49", first, last)
			}
			note := take(t, s, got[48].Seq, 1)
			wantNote(t, note[0].Event, spool.LostCorrupt, 1)
			take(t, s, 0, 49) // again
			stop()
			s, _ = start(t, dir, spool.Config{Meter: meter})
			take(t, s, 0, 50)
			if c := meter.get("spool_lost reason corrupt"); c != 1 {
				t.Errorf("counted %d, want 1 however often it is read", c)
			}
		})
	}
}

func nthFrame(b []byte, k int) int {
	at := 0
	for range k {
		at += 1 + bytes.IndexByte(b[at+1:], 0xF7)
	}
	return at
}

func TestAMissingSegmentIsCounted(t *testing.T) {
	dir := t.TempDir()
	meter := &tally{}
	s, stop := start(t, dir, spool.Config{SegmentBytes: 1, Meter: meter})
	fill(t, s, 20)
	stop()
	segs, _ := filepath.Glob(filepath.Join(dir, "*.seg"))
	var first, next uint64
	_, _ = fmt.Sscanf(filepath.Base(segs[1]), "%d.seg", &first)
	_, _ = fmt.Sscanf(filepath.Base(segs[2]), "%d.seg", &next)
	if err := os.Remove(segs[1]); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, dir, spool.Config{SegmentBytes: 1, Meter: meter})
	take(t, s, 0, 20-int(next-first))
	if got := meter.get("spool_lost reason corrupt"); got != int64(next-first) {
		t.Errorf("counted %d, want %d", got, next-first)
	}
}

func TestADamagedStateDeliversAgainRatherThanLose(t *testing.T) {
	dir, _ := written(t, 5)
	s, stop := start(t, dir, spool.Config{})
	if err := s.Ack(4); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := os.WriteFile(filepath.Join(dir, "state"), bytes.Repeat([]byte("garbage "), 256), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, dir, spool.Config{})
	wantNumbers(t, take(t, s, 0, 5), 0)
}
