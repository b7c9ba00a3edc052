package sqlite_test

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

func TestNewHistoryLeavesTheStateAndForgetsTheWayThere(t *testing.T) {
	ctx := t.Context()
	s, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(t.TempDir(), "db")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	add := func(key string) (c fleet.Change) {
		t.Helper()
		if err := s.Fleet().Update(ctx, func(tx fleet.Tx) (err error) {
			c, err = tx.Changes.Append(ctx, fleet.Change{Kind: fleet.KindIdentity, Key: key, Payload: []byte(`{}`)})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := add("w-1")
	if err := s.NewHistory(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Fleet().View(ctx, func(tx fleet.Tx) error {
		if _, err := tx.Changes.Changes(ctx, before.Revision+5, 10); !errors.Is(err, fleet.ErrCompacted) {
			t.Errorf("an agent ahead of the copy must take everything anew: %v", err)
		}
		live, err := tx.Changes.Live(ctx, fleet.Position{}, 10)
		if len(live) != 1 || live[0].Key != "w-1" {
			t.Errorf("the state is lost: %v", live)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	after := add("w-2")
	if after.Revision < before.Revision+1<<32 {
		t.Errorf("revision %d after %d", after.Revision, before.Revision)
	}
	if err := s.Fleet().View(ctx, func(tx fleet.Tx) error {
		got, err := tx.Changes.Changes(ctx, after.Revision-1, 10)
		if len(got) != 1 || got[0].Key != "w-2" {
			t.Errorf("got %v", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
