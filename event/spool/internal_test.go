package spool

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
)

// What Next returns must not be taken back by a power cut: it is synced before it is handed out.
func TestWhatIsHandedOutIsSynced(t *testing.T) {
	s, err := Open(t.TempDir(), Config{SyncEvery: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	defer func() { cancel(); <-done; _ = s.Close() }()
	s.Emit(event.New(event.Runtime, "test"))
	got, err := s.Next(ctx, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.synced < got[0].Seq {
		t.Errorf("event %d was handed out, synced is %d", got[0].Seq, s.synced)
	}
}

func FuzzScan(f *testing.F) {
	three := appendFrame(appendFrame(appendFrame(nil, 1, []byte(`{}`)), 2, []byte(`{"id":"e"}`)), 3, nil)
	f.Add([]byte{})
	f.Add(three)
	f.Add(three[:len(three)-1])
	f.Add(append([]byte("junk"), three...))
	f.Add(append(bytes.Clone(three), three...)) // numbers that go back
	huge := bytes.Clone(three)
	binary.BigEndian.PutUint32(huge[4:], 1<<31)
	f.Add(huge)
	f.Fuzz(func(t *testing.T, b []byte) {
		var last uint64
		var at int64
		end, err := scan(bytes.NewReader(b), 0, int64(len(b)), func(fr frame, end int64) bool {
			if fr.seq <= last || end <= at || end > int64(len(b)) || len(fr.payload) > maxPayload {
				t.Fatalf("frame %d after %d, ends at %d after %d", fr.seq, last, end, at)
			}
			if again := appendFrame(nil, fr.seq, fr.payload); !bytes.Equal(again, b[end-int64(len(again)):end]) {
				t.Fatal("a frame does not render to what it was read from")
			}
			last, at = fr.seq, end
			return true
		})
		if err != nil || end != at {
			t.Fatalf("end %d, want %d; %v", end, at, err)
		}
	})
}

// A window's worth of damage between frames must not hide what follows.
func TestScanFindsWhatFollowsALongDamage(t *testing.T) {
	for _, gap := range []int{1, frameHeader, maxFrame, window - 7, window, 2*window + 3} {
		t.Run(fmt.Sprint(gap), func(t *testing.T) {
			b := appendFrame(nil, 1, []byte(`1`))
			b = append(b, bytes.Repeat([]byte{0xF7}, gap)...)
			b = appendFrame(b, 2, bytes.Repeat([]byte{'x'}, maxPayload))
			var seqs []uint64
			if _, err := scan(bytes.NewReader(b), 0, int64(len(b)), func(f frame, _ int64) bool { seqs = append(seqs, f.seq); return true }); err != nil {
				t.Fatal(err)
			}
			if len(seqs) != 2 || seqs[1] != 2 {
				t.Errorf("found %v", seqs)
			}
		})
	}
}

func FuzzSlot(f *testing.F) {
	slot, err := renderSlot(state{Generation: 3, Acked: 7, Losses: map[Reason]*loss{LostFull: {Count: 2}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(slot)
	f.Add(slot[:20])
	f.Add([]byte("00000000 {}"))
	f.Add([]byte(`e53a9bcf {"losses":{"full":null}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, ok := parseSlot(b)
		if !ok {
			return
		}
		for _, l := range st.Losses {
			if l == nil {
				t.Fatal("a nil loss")
			}
		}
	})
}

func BenchmarkEmit(b *testing.B) {
	s, err := Open(b.TempDir(), Config{MaxBytes: 8 << 30, SegmentBytes: 64 << 20})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	e := event.New(event.Runtime, "workload.started")
	e.Attrs = map[string]any{"unix.uid": 1000, "executable.path": "/usr/bin/orders"}
	b.ReportAllocs()
	for b.Loop() {
		s.Emit(e)
	}
	b.StopTimer()
	cancel()
	<-done
	st := s.Status()
	b.ReportMetric(float64(st.Lost)/float64(b.N), "lost/op")
	_ = s.Close()
}
