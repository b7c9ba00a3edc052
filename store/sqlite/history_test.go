package sqlite_test

import (
	"database/sql"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
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
	if err := s.Fleet().Update(ctx, func(tx fleet.Tx) error {
		return tx.Tokens.PutToken(ctx, fleet.JoinToken{ID: "t-1", Machine: "m1", Created: time.Now(), Expires: time.Now().Add(time.Hour)})
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.NewHistory(ctx, event.NewRecord(`User::"root@server"`, "server.restore", "test")); err != nil {
		t.Fatal(err)
	}
	if tail, err := s.Outbox().Tail(ctx); err != nil || tail.Pending != 1 {
		t.Errorf("a restore is recorded: %+v, %v", tail, err)
	}
	if err := s.Fleet().View(ctx, func(tx fleet.Tx) error {
		if left, err := tx.Tokens.Tokens(ctx, "", 10); err != nil || len(left) != 0 {
			t.Errorf("a token that may have been used since must not be redeemable again: %v, %v", left, err)
		}
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

// Who only looks must not change the schema under a server that may be running.
func TestAsIsDoesNotMigrate(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "db")
	s, err := sqlite.Open(ctx, sqlite.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	same, err := sqlite.Open(ctx, sqlite.Config{Path: path, AsIs: true})
	if err != nil {
		t.Fatalf("a database of the present schema opens: %v", err)
	}
	if err := same.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(ctx, "DELETE FROM goose_db_version WHERE version_id > 0"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.Open(ctx, sqlite.Config{Path: path, AsIs: true}); !errors.Is(err, sqlite.ErrOlder) {
		t.Errorf("got %v", err)
	}
}
