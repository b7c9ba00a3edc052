package sqlite_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// BenchmarkWrite measures one change with its record, on disk.
func BenchmarkWrite(b *testing.B) {
	s := fresh(b)
	for b.Loop() {
		if err := s.Overrides().PutOverride(b.Context(), set.Override{ID: "o-1"}, rec("write")); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkManagementWrite measures what a management answer waits for: the transaction and the index of its record.
func BenchmarkManagementWrite(b *testing.B) {
	dir := b.TempDir()
	s := open(b, filepath.Join(dir, sqlite.FileName))
	l, err := audit.Open(b.Context(), audit.Config{Dir: filepath.Join(dir, "audit"), Origin: "example.org/audit", Outbox: s.Outbox()})
	if err != nil {
		b.Fatal(err)
	}
	s.OnRecord(l.Notify)
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	for b.Loop() {
		r := rec("write")
		if err := s.Overrides().PutOverride(ctx, set.Override{ID: "o-1"}, r); err != nil {
			b.Fatal(err)
		}
		if _, err := l.Wait(ctx, r.ID); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		b.Error(err)
	}
}

// BenchmarkRead measures one view that reads one machine.
func BenchmarkRead(b *testing.B) {
	s := fresh(b)
	ctx := b.Context()
	if err := s.Fleet().Update(ctx, func(tx fleet.Tx) error { return tx.Machines.PutMachine(ctx, fleet.Machine{ID: "m1"}) }); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := s.Fleet().View(ctx, func(tx fleet.Tx) error { _, err := tx.Machines.Machine(ctx, "m1"); return err }); err != nil {
			b.Fatal(err)
		}
	}
}
