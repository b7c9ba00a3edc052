package audit

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
)

// walk goes through the leaves of a log once.
type walk struct {
	report *Report
	tiles  *files
	outbox Outbox
	seen   map[[16]byte]uint64 // truncated hash of a record id → index
	latest time.Time
}

// leaves proves that the leaves of tree from the index given on are those that its root commits to, and reads them.
// The proof of inclusion is the tiles': every hash read is checked up to the root of the tree.
func (w *walk) leaves(ctx context.Context, tree tlog.Tree, from int64) error {
	hashes := torchwood.TileHashReaderWithContext(ctx, tree, w.tiles)
	for bundle := from / torchwood.TileWidth; bundle*torchwood.TileWidth < tree.N; bundle++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		first := bundle * torchwood.TileWidth
		width := min(tree.N-first, torchwood.TileWidth)
		indexes := make([]int64, width)
		for i := range indexes {
			indexes[i] = tlog.StoredHashIndex(0, first+int64(i))
		}
		want, err := hashes.ReadHashes(indexes)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			w.report.find(FoundTile, first, "hash tile %d, or one above it, is missing or does not fit the root", bundle)
			want = nil
		}
		data, err := w.tiles.ReadTiles(ctx, []tlog.Tile{{H: torchwood.TileHeight, L: -1, N: bundle, W: int(width)}})
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, errDamaged):
			w.report.find(FoundBundle, first, "entry bundle %d is missing or damaged", bundle)
			continue
		case err != nil:
			return err
		}
		if err := w.bundle(ctx, data[0], want, first, width, from); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) bundle(ctx context.Context, data []byte, want []tlog.Hash, first, width, from int64) error {
	for i := range width {
		leaf, rest, err := torchwood.ReadTileEntry(data)
		if err != nil {
			w.report.find(FoundBundle, first+i, "the bundle ends within leaf %d", first+i)
			return nil
		}
		data = rest
		index := first + i
		if index < from {
			continue
		}
		if want == nil {
			continue // reported: nothing says what the leaf should be
		}
		if tlog.RecordHash(leaf) != want[i] {
			w.report.find(FoundLeaf, index, "leaf %d is not the one that the tree commits to", index)
			continue
		}
		w.report.Checked++
		if err := w.record(ctx, index, leaf); err != nil {
			return err
		}
	}
	if len(data) > 0 {
		w.report.find(FoundBundle, first+width-1, "the bundle has more leaves than the tree")
	}
	return nil
}

// record checks one leaf that is proven to be in the tree.
func (w *walk) record(ctx context.Context, index int64, leaf []byte) error {
	rec, err := parseRecord(leaf)
	if err != nil {
		w.report.find(FoundRecord, index, "leaf %d: %v", index, err)
		return nil
	}
	sum := sha256.Sum256([]byte(rec.ID))
	key := [16]byte(sum[:16])
	if before, ok := w.seen[key]; ok {
		w.report.find(FoundDuplicate, index, "leaf %d has the record id of leaf %d", index, before)
	} else {
		w.seen[key] = uint64(index)
	}
	if w.report.First.IsZero() {
		w.report.First = rec.Time
	}
	if rec.Time.Before(w.latest.Add(-orderTolerance)) {
		w.report.note(NotedOrder, index, "leaf %d is of %s, one before it of %s", index, rec.Time.UTC().Format(time.RFC3339), w.latest.UTC().Format(time.RFC3339))
	}
	if rec.Time.After(w.latest) {
		w.latest, w.report.Last = rec.Time, rec.Time
	}
	if w.outbox == nil {
		return nil
	}
	placed, ok, err := w.outbox.Placed(ctx, rec.ID)
	switch {
	case err != nil:
		return fmt.Errorf("audit outbox: %w", err)
	case !ok && index < int64(w.report.Integrated)-maxBatch:
		// Of a log at work the last batch may be in the log and not marked yet.
		w.report.note(NotedUnmarked, index, "leaf %d is not marked in the outbox", index)
	case ok && placed != uint64(index):
		w.report.find(FoundMismatch, index, "leaf %d is marked at %d in the outbox", index, placed)
	}
	return nil
}

// parseRecord reads a leaf as the record that it must be. Trust: leaf is attacker-controlled.
func parseRecord(leaf []byte) (event.Record, error) {
	var rec event.Record
	if len(leaf) > MaxLeafBytes {
		return rec, fmt.Errorf("it is longer than %d bytes", MaxLeafBytes)
	}
	if err := json.Unmarshal(leaf, &rec); err != nil {
		return rec, errors.New("it is not the JSON of a record")
	}
	if !identity.IsUnique("r", rec.ID) || rec.Time.IsZero() || rec.Actor == "" || rec.Action == "" {
		return rec, errors.New("it lacks an id, a time, an actor or an action")
	}
	return rec, nil
}
