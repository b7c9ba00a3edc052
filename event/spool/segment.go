package spool

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// segment is one file of frames. Frames are only ever appended, and only to the last segment.
type segment struct {
	path  string
	first uint64 // sequence number of its first frame, and its name
	size  int64  // bytes that are whole
}

const segmentSuffix = ".seg"

func segmentPath(dir string, first uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%020d%s", first, segmentSuffix))
}

// listSegments returns the segments of dir in order. Other files are left alone.
func listSegments(dir string) ([]segment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var segs []segment
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), segmentSuffix)
		first, err := strconv.ParseUint(name, 10, 64)
		if !ok || err != nil || first == 0 || len(name) != 20 || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		segs = append(segs, segment{path: segmentPath(dir, first), first: first, size: info.Size()})
	}
	slices.SortFunc(segs, func(a, b segment) int { return cmp.Compare(a.first, b.first) })
	return segs, nil
}

// window is how much of a segment is read at once; it holds at least one frame.
const window = 4 * maxFrame

// scan calls visit for each whole frame of r from offset to size, in order of sequence number, until visit returns false.
// Damage is stepped over. It returns the offset behind the last frame visited. The payload is visit's until it returns.
func scan(r io.ReaderAt, offset, size int64, visit func(f frame, end int64) bool) (int64, error) {
	buf := make([]byte, min(window, max(size-offset, 0)))
	last := offset
	var seq uint64
	for at := offset; at < size; {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return last, err
		}
		if n == 0 {
			return last, nil // the file is shorter than it was: what is missing is a gap to whoever counts
		}
		b, atEnd := buf[:n], at+int64(n) >= size
		used := 0
		for used < n {
			f, length, v := parseFrame(b[used:])
			switch {
			case v == whole && f.seq > seq:
				seq = f.seq
				used += length
				last = at + int64(used)
				if !visit(f, last) {
					return last, nil
				}
				continue
			case v == whole:
				used += length // a number that went back: not ours to hand out twice
				continue
			case v == short && !atEnd && used > 0:
				// read on from here
			default:
				used += resync(b[used:])
				continue
			}
			break
		}
		at += int64(used)
	}
	return last, nil
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}
