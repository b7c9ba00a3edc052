package audit_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/audit"
)

// BenchmarkIndex measures from a committed record to its index: what a management answer waits for beside its own
// transaction.
func BenchmarkIndex(b *testing.B) {
	for name, batch := range map[string]time.Duration{"batch=5ms": audit.DefaultBatch, "batch=1ms": time.Millisecond} {
		b.Run(name, func(b *testing.B) {
			top := b.TempDir()
			s := openStore(b, top)
			l, stop := run(b, audit.Config{Dir: filepath.Join(top, "audit"), Outbox: s.Outbox(), Batch: batch})
			if _, err := l.Wait(b.Context(), put(b, s)); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				id := put(b, s)
				b.StartTimer()
				if _, err := l.Wait(b.Context(), id); err != nil {
					b.Fatal(err)
				}
			}
			stop()
		})
	}
}

// BenchmarkDrain measures the sequencer with a full outbox, by leaf.
func BenchmarkDrain(b *testing.B) {
	top := b.TempDir()
	s := openStore(b, top)
	ids := fill(b, s, b.N)
	b.ResetTimer()
	l, stop := run(b, audit.Config{Dir: filepath.Join(top, "audit"), Outbox: s.Outbox(), MaxWait: time.Hour})
	if _, err := l.Wait(b.Context(), ids[len(ids)-1]); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	stop()
}

// BenchmarkVerify measures the verifier, by leaf.
func BenchmarkVerify(b *testing.B) {
	const leaves = 2000
	dir, vkey, _ := made(b, leaves)
	b.ResetTimer()
	for range b.N {
		if r := verify(b, dir, vkey, audit.Options{}); !r.OK() {
			b.Fatal(r.Findings)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/leaves, "ns/leaf")
}
