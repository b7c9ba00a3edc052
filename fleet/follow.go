package fleet

import (
	"context"
	"crypto/sha256"
)

// tail is the newest changes, in memory.
type tail struct {
	changes       []Change
	bytes         int
	floor, latest uint64 // every change above floor, up to latest, is here
}

func (t *tail) add(changes []Change) {
	for _, c := range changes {
		t.changes = append(t.changes, c)
		t.bytes += len(c.Payload)
		t.latest = c.Revision
	}
	drop := 0
	for len(t.changes)-drop > tailChanges || t.bytes > tailBytes && len(t.changes)-drop > 1 {
		t.bytes -= len(t.changes[drop].Payload)
		t.floor = t.changes[drop].Revision
		drop++
	}
	if drop > 0 {
		t.changes = append([]Change(nil), t.changes[drop:]...)
	}
}

// after returns at most limit changes above a revision that is not below the floor.
func (t *tail) after(revision uint64, limit int) []Change {
	lo, hi := 0, len(t.changes)
	for lo < hi {
		mid := (lo + hi) / 2
		if t.changes[mid].Revision <= revision {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return t.changes[lo:min(len(t.changes), lo+limit):min(len(t.changes), lo+limit)]
}

// Revision returns the latest revision.
func (f *Fleet) Revision() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tail.latest
}

// Changed returns a channel that is closed when the domain next changes: take it before [Fleet.Changes] or
// [Fleet.Authenticate], and no change is missed.
func (f *Fleet) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Changes returns at most limit changes above a revision, in order; none if there are none yet. The caller must not change
// them. Errors: ErrCompacted if the log does not reach back so far, or if the revision is one that it has not reached: the
// follower has seen another history (a server restored from a back-up). It then needs a [Fleet.Snapshot].
func (f *Fleet) Changes(ctx context.Context, after uint64, limit int) ([]Change, error) {
	limit = page(limit)
	f.mu.Lock()
	if after > f.tail.latest {
		f.mu.Unlock()
		return nil, ErrCompacted
	}
	if after >= f.tail.floor {
		out := f.tail.after(after, limit)
		f.mu.Unlock()
		return out, nil
	}
	f.mu.Unlock()
	var out []Change
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Changes.Changes(ctx, after, limit)
		return err
	})
	return out, err
}

// Snapshot is the live state at a revision: the last change of every key, but for deleted ones.
type Snapshot struct {
	Revision uint64
	Changes  []Change
}

// snapshotAge is how many revisions old a snapshot may be and still be handed out again: what came since follows as changes.
const snapshotAge = 1_024

// Snapshot returns the live state, from which a follower goes on with [Fleet.Changes]. It may be shared and must not be
// changed. Agents are all sent everything: any machine may call, or be called by, any other.
func (f *Fleet) Snapshot(ctx context.Context) (*Snapshot, error) {
	f.shoot.Lock()
	defer f.shoot.Unlock()
	f.mu.Lock()
	last, latest := f.shot, f.tail.latest
	f.mu.Unlock()
	if last != nil && latest-last.Revision <= min(snapshotAge, uint64(f.cfg.KeepChanges)/2) {
		return last, nil
	}
	next := &Snapshot{}
	err := f.view(ctx, func(tx Tx) error {
		_, revision, err := tx.Changes.Bounds(ctx)
		if err != nil {
			return err
		}
		next.Revision = revision
		at := Position{}
		for {
			page, err := tx.Changes.Live(ctx, at, MaxPage)
			if err != nil {
				return err
			}
			next.Changes = append(next.Changes, page...)
			if len(page) < MaxPage {
				return nil
			}
			at = Position{Kind: page[len(page)-1].Kind, Key: page[len(page)-1].Key}
		}
	})
	if err != nil {
		return nil, err
	}
	f.meter.Count("fleet_snapshots", 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	if next.Revision <= f.tail.latest { // else a commit is just being made known, and Changes would not know the revision yet
		f.shot = next
	}
	return next, nil
}

func hashOf(payload []byte) [32]byte { return sha256.Sum256(payload) }
