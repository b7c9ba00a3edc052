package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of files read.
const (
	maxCheckpointBytes = 64 << 10
	maxStateBytes      = 4 << 10
	maxBundleBytes     = torchwood.TileWidth * (2 + 1<<16)
	maxTilesKept       = 64
)

// errDamaged says that a file is there, but cannot be what it should be.
var errDamaged = errors.New("damaged file")

// files reads a log's files, and nothing else: no symlink leads out of the directory, nothing but regular files is
// opened for long, nothing is read beyond a bound. It is the torchwood.TileReader of the verifier and the back-up.
type files struct {
	root *os.Root
	kept map[tlog.Tile][]byte // hash tiles: a walk asks for the same few again and again
}

func openFiles(dir string) (*files, error) {
	// An audit directory has the log one below; what a mirror fetched is the log itself.
	logDir := filepath.Join(dir, LogDir)
	if info, err := os.Stat(logDir); err != nil || !info.IsDir() {
		logDir = dir
	}
	root, err := os.OpenRoot(logDir)
	if err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Unknown, Code: ErrNoLog.Code, What: "audit log", Why: "its directory cannot be opened", Do: "give the audit directory", Err: err,
		}
	}
	return &files{root: root, kept: map[tlog.Tile][]byte{}}, nil
}

func (f *files) close() { _ = f.root.Close() }

// read returns a regular file of at most limit bytes. Errors: wraps fs.ErrNotExist; [errDamaged] of any other kind of
// file and of a longer one.
func (f *files) read(name string, limit int64) ([]byte, error) {
	// Not to hang on a pipe that somebody put there.
	file, err := f.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %s: %w", errDamaged, name, err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%w: %s", errDamaged, name)
	}
	return io.ReadAll(io.LimitReader(file, limit))
}

// state reads Tessera's state of the tree. Errors: wraps fs.ErrNotExist or [errDamaged].
func (f *files) state() (tlog.Tree, error) {
	raw, err := f.read(stateFile, maxStateBytes)
	if err != nil {
		return tlog.Tree{}, err
	}
	return parseState(raw)
}

func parseState(raw []byte) (tlog.Tree, error) {
	var s treeState
	if json.Unmarshal(raw, &s) != nil || len(s.Root) != tlog.HashSize || s.Size > maxLogSize {
		return tlog.Tree{}, errDamaged
	}
	return tlog.Tree{N: int64(s.Size), Hash: tlog.Hash(s.Root)}, nil
}

// ReadTiles implements [torchwood.TileReader].
func (f *files) ReadTiles(ctx context.Context, tiles []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(tiles))
	for i, t := range tiles {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if raw, ok := f.kept[t]; ok {
			out[i] = raw
			continue
		}
		raw, err := f.tile(t)
		if err != nil {
			return nil, err
		}
		out[i] = raw
	}
	return out, nil
}

// tile reads a tile. A partial tile may be gone once the full one is there (C2SP tlog-tiles, "Partial tiles"): then it
// is cut from that one.
func (f *files) tile(t tlog.Tile) ([]byte, error) {
	limit := int64(maxBundleBytes)
	if t.L >= 0 {
		limit = int64(t.W) * tlog.HashSize
	}
	raw, err := f.read(torchwood.TilePath(t), limit)
	if !errors.Is(err, fs.ErrNotExist) || t.W == torchwood.TileWidth {
		return raw, err
	}
	full := t
	full.W = torchwood.TileWidth
	raw, fullErr := f.read(torchwood.TilePath(full), maxBundleBytes)
	if fullErr != nil {
		return nil, err
	}
	return cut(raw, t)
}

// cut returns the first t.W elements of a wider tile.
func cut(raw []byte, t tlog.Tile) ([]byte, error) {
	if t.L >= 0 {
		if len(raw) < t.W*tlog.HashSize {
			return nil, errDamaged
		}
		return raw[:t.W*tlog.HashSize], nil
	}
	rest := raw
	for range t.W {
		var err error
		if _, rest, err = torchwood.ReadTileEntry(rest); err != nil {
			return nil, fmt.Errorf("%w: %w", errDamaged, err)
		}
	}
	return raw[:len(raw)-len(rest)], nil
}

// SaveTiles implements [torchwood.TileReader]: it keeps hash tiles that were proven.
func (f *files) SaveTiles(tiles []tlog.Tile, data [][]byte) {
	for i, t := range tiles {
		if t.L < 0 {
			continue
		}
		if len(f.kept) >= maxTilesKept {
			clear(f.kept)
		}
		f.kept[t] = data[i]
	}
}

// ReadEndpoint implements [torchwood.TileReader].
func (f *files) ReadEndpoint(_ context.Context, path string) ([]byte, error) {
	return f.read(path, maxCheckpointBytes)
}
