package catest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/ca"
)

// TestStore checks that an implementation of [ca.Store] keeps its contract. open returns an empty store, a new one at
// every call.
func TestStore(t *testing.T, open func() ca.Store) {
	t.Run("empty", func(t *testing.T) {
		expect(t, open())
	})
	t.Run("keeps every field", func(t *testing.T) {
		s := open()
		keys := []ca.KeyRecord{record("k-1", ca.Root, ca.Active), record("k-2", ca.X509, ca.Published), record("k-3", ca.JWT, ca.Retired)}
		put(t, s, audit("create"), keys...)
		expect(t, s, keys...)
	})
	t.Run("keeps bytes that are no text", func(t *testing.T) {
		s := open()
		k := record("k-1", ca.JWT, ca.Active)
		k.Sealed = make([]byte, 256)
		for i := range k.Sealed {
			k.Sealed[i] = byte(i)
		}
		put(t, s, audit("create"), k)
		expect(t, s, k)
	})
	t.Run("replaces by id", func(t *testing.T) {
		s := open()
		a, b := record("k-1", ca.X509, ca.Active), record("k-2", ca.JWT, ca.Active)
		put(t, s, audit("create"), a, b)
		a.State, a.Sealed = ca.Retired, nil
		a.NotAfter = a.NotAfter.Add(-time.Hour)
		c := record("k-3", ca.X509, ca.Active)
		put(t, s, audit("rotate"), a, c)
		expect(t, s, a, b, c)
	})
	t.Run("a record that is there already changes nothing", func(t *testing.T) {
		s := open()
		a, rec := record("k-1", ca.X509, ca.Prepared), audit("prepare")
		put(t, s, rec, a)
		b := a
		b.State = ca.Published
		if err := s.PutKeys(t.Context(), []ca.KeyRecord{b, record("k-2", ca.JWT, ca.Active)}, rec); err == nil {
			t.Error("PutKeys took the same audit record twice")
		}
		expect(t, s, a)
	})
	t.Run("a context that has ended changes nothing", func(t *testing.T) {
		s := open()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.PutKeys(ctx, []ca.KeyRecord{record("k-1", ca.X509, ca.Active)}, audit("create")); err == nil {
			t.Error("PutKeys worked with a context that had ended")
		}
		expect(t, s)
	})
	t.Run("callers own what they gave and got", func(t *testing.T) {
		s := open()
		k := record("k-1", ca.X509, ca.Active)
		put(t, s, audit("create"), k)
		want := record("k-1", ca.X509, ca.Active)
		k.Sealed[0] ^= 0xff
		got, err := s.Keys(t.Context())
		if err != nil || len(got) != 1 {
			t.Fatalf("Keys: %d, %v", len(got), err)
		}
		got[0].Certificate[0] ^= 0xff
		expect(t, s, want)
	})
	t.Run("many at once", func(t *testing.T) {
		s := open()
		var keys []ca.KeyRecord
		var all sync.WaitGroup
		for i := range 16 {
			k := record(fmt.Sprintf("k-%02d", i), ca.JWT, ca.Prepared)
			keys = append(keys, k)
			all.Go(func() { put(t, s, audit("create"), k) })
		}
		all.Wait()
		expect(t, s, keys...)
	})
}

func record(id string, use ca.Use, state ca.State) ca.KeyRecord {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	k := ca.KeyRecord{
		ID: id, Use: use, State: state, Created: at, NotBefore: at.Add(-time.Minute), NotAfter: at.AddDate(10, 0, 0),
		Certificate: []byte("certificate of " + id), Sealed: []byte("sealed key of " + id),
	}
	if state == ca.Retired {
		k.Sealed = nil
	}
	return k
}

func audit(action string) event.Record {
	return event.NewRecord(`Service::"redoubt"`, "ca."+action, "test")
}

func put(t *testing.T, s ca.Store, rec event.Record, keys ...ca.KeyRecord) {
	t.Helper()
	if err := s.PutKeys(t.Context(), keys, rec); err != nil {
		t.Errorf("PutKeys: %v", err)
	}
}

func expect(t *testing.T, s ca.Store, want ...ca.KeyRecord) {
	t.Helper()
	got, err := s.Keys(t.Context())
	if err != nil {
		t.Fatalf("Keys: %v", err)
	}
	byID := func(a, b ca.KeyRecord) int { return cmp.Compare(a.ID, b.ID) }
	slices.SortFunc(got, byID)
	slices.SortFunc(want, byID)
	if d := gocmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("keys (-want +got):\n%s", d)
	}
	for _, k := range got {
		if k.Created.Location() != time.UTC || k.NotBefore.Location() != time.UTC || k.NotAfter.Location() != time.UTC {
			t.Errorf("key %s: its times are not UTC", k.ID)
		}
	}
}
