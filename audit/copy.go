package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
)

// CopiedFile is one file of a copy, with its path below the audit directory.
type CopiedFile struct {
	Name string // slash-separated
	Mode fs.FileMode
	Data []byte
}

// Copy hands out the files of a consistent copy of the audit directory dir, which may be in use, and returns how many
// leaves it holds: the keys, checkpoint and state as they are now, and the tiles and bundles that these two speak of.
// What is written meanwhile is left out. An empty or missing log has no files but the keys.
//
// It stops at the first error of emit. Files that would hold other than the tree commits to are not looked for here:
// [Verify] the copy.
func Copy(ctx context.Context, dir string, emit func(CopiedFile) error) (uint64, error) {
	for _, key := range []struct {
		name string
		mode fs.FileMode
	}{{SignerFile, 0o600}, {VerifierFile, 0o644}} {
		raw, err := os.ReadFile(filepath.Join(dir, key.name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // kept elsewhere, or not made yet
		}
		if err != nil {
			return 0, fmt.Errorf("copy audit log: %w", err)
		}
		if err := emit(CopiedFile{key.name, key.mode, raw}); err != nil {
			return 0, err
		}
	}
	files, err := openFiles(dir)
	if err != nil {
		return 0, err
	}
	defer files.close()
	// The checkpoint before the state: then it is not ahead of it. Both before the tiles: those that they speak of were
	// written before them, are never altered, and are removed only for a full one that replaces them.
	var sizes []int64
	for _, name := range []string{checkpointFile, versionFile, stateFile} {
		raw, err := files.read(name, maxCheckpointBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("copy audit log: %w", err)
		}
		if size, ok := sizeOf(name, raw); ok {
			sizes = append(sizes, size)
		}
		if err := emit(CopiedFile{path.Join(LogDir, name), 0o644, raw}); err != nil {
			return 0, err
		}
	}
	sent := map[string]bool{}
	var largest int64
	for _, size := range sizes {
		if err := copyTiles(ctx, files, size, sent, emit); err != nil {
			return 0, fmt.Errorf("copy audit log: %w", err)
		}
		largest = max(largest, size)
	}
	return uint64(largest), nil
}

// sizeOf returns the size of the tree that a checkpoint or state speaks of; neither is verified here.
func sizeOf(name string, raw []byte) (int64, bool) {
	switch name {
	case checkpointFile:
		if c, err := torchwood.ParseCheckpoint(noteText(raw)); err == nil {
			return c.N, c.N <= maxLogSize
		}
	case stateFile:
		if s, err := parseState(raw); err == nil {
			return s.N, true
		}
	}
	return 0, false
}

// copyTiles hands out every tile and bundle of a tree of this size that was not sent yet.
func copyTiles(ctx context.Context, files *files, size int64, sent map[string]bool, emit func(CopiedFile) error) error {
	for level, n := -1, size; n > 0; level++ {
		for first := int64(0); first < n; first += torchwood.TileWidth {
			if err := ctx.Err(); err != nil {
				return err
			}
			t := tlog.Tile{H: torchwood.TileHeight, L: level, N: first / torchwood.TileWidth, W: int(min(n-first, torchwood.TileWidth))}
			name := torchwood.TilePath(t)
			if sent[name] {
				continue
			}
			raw, err := files.tile(t)
			if err != nil {
				return err
			}
			if err := emit(CopiedFile{path.Join(LogDir, name), 0o644, raw}); err != nil {
				return err
			}
			sent[name] = true
		}
		if level >= 0 {
			n /= torchwood.TileWidth // a level up there is one hash for each full tile
		}
	}
	return nil
}
