package audit_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/event"
)

// forge writes a log of these leaves as C2SP tlog-tiles lays it out, signed by skey: what somebody could make who has
// the key. It shares no code with the writer.
func forge(t testing.TB, dir, skey string, leaves [][]byte) {
	t.Helper()
	log := filepath.Join(dir, audit.LogDir)
	if err := os.RemoveAll(log); err != nil {
		t.Fatal(err)
	}
	file := func(name string, data []byte) {
		path := filepath.Join(log, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			out = append(out, stored[i])
		}
		return out, nil
	})
	for i, leaf := range leaves {
		hashes, err := tlog.StoredHashes(int64(i), leaf, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
	}
	n := int64(len(leaves))
	for _, tile := range tlog.NewTiles(torchwood.TileHeight, 0, n) {
		data, err := tlog.ReadTileData(tile, reader)
		if err != nil {
			t.Fatal(err)
		}
		file(torchwood.TilePath(tile), data)
	}
	for bundle := range slices.Chunk(leaves, torchwood.TileWidth) {
		var data []byte
		for _, leaf := range bundle {
			data, _ = torchwood.AppendTileEntry(data, leaf)
		}
		first := int64(0)
		for ; !bytes.Equal(leaves[first], bundle[0]); first++ {
		}
		file(torchwood.TilePath(tlog.Tile{H: 8, L: -1, N: first / 256, W: len(bundle)}), data)
	}
	root, err := tlog.TreeHash(n, reader)
	if err != nil {
		t.Fatal(err)
	}
	file("checkpoint", sign(t, skey, n, root))
}

func sign(t testing.TB, skey string, n int64, root tlog.Hash) []byte {
	t.Helper()
	signer, err := note.NewSigner(strings.TrimSpace(skey))
	if err != nil {
		t.Fatal(err)
	}
	c := torchwood.Checkpoint{Origin: signer.Name(), Tree: tlog.Tree{N: n, Hash: root}}
	raw, err := note.Sign(&note.Note{Text: c.String()}, signer)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// leavesOf reads the leaves of a log.
func leavesOf(t testing.TB, dir string) [][]byte {
	t.Helper()
	fs, err := torchwood.NewTileFS(os.DirFS(filepath.Join(dir, audit.LogDir)))
	if err != nil {
		t.Fatal(err)
	}
	client, err := torchwood.NewClient(fs)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := fs.ReadEndpoint(t.Context(), "checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	text, _, _ := strings.Cut(string(raw), "\n\n")
	c, err := torchwood.ParseCheckpoint(text + "\n")
	if err != nil {
		t.Fatal(err)
	}
	var out [][]byte
	for _, leaf := range client.AllEntries(t.Context(), c.Tree, 0) { // torchwood's own client reads what we write
		out = append(out, bytes.Clone(leaf))
	}
	if err := client.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

func read(t testing.TB, parts ...string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func edit(t testing.TB, path string, change func([]byte) []byte) {
	t.Helper()
	if err := os.WriteFile(path, change(read(t, path)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func copyOf(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestEachKindOfTamperingIsFound(t *testing.T) {
	const leaves = 300 // a full bundle and a partial one
	pristine, vkey, store := made(t, leaves)
	skey := string(read(t, pristine, audit.SignerFile))
	all := leavesOf(t, pristine)
	if len(all) != leaves {
		t.Fatalf("torchwood reads %d leaves, want %d", len(all), leaves)
	}
	remembered := read(t, pristine, audit.LogDir, "checkpoint")
	const full, partial = "tile/entries/000", "tile/entries/001.p/44"

	for _, c := range []struct {
		name   string
		tamper func(t *testing.T, dir, log string)
		opts   audit.Options
		want   string // a code and index that must be among the findings
	}{
		{"nothing", func(*testing.T, string, string) {}, audit.Options{Since: remembered, Outbox: store.Outbox()}, ""},
		{"a flipped bit in a leaf", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, full), func(b []byte) []byte { b[bytes.Index(b, []byte("thing"))] ^= 1; return b })
		}, audit.Options{}, "leaf-altered@0"},
		{"a flipped bit in the last leaf", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, partial), func(b []byte) []byte { b[len(b)-3] ^= 1; return b })
		}, audit.Options{}, "leaf-altered@299"},
		{"a leaf dropped from a bundle", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, full), func(b []byte) []byte { return b[2+len(all[0]):] })
		}, audit.Options{}, "leaf-altered@0"},
		{"the last leaf dropped from a bundle", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, partial), func(b []byte) []byte { return b[:len(b)-2-len(all[299])] })
		}, audit.Options{}, "bundle-damaged@299"},
		{"a leaf added to a bundle", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, partial), func(b []byte) []byte { b, _ = torchwood.AppendTileEntry(b, all[0]); return b })
		}, audit.Options{}, "bundle-damaged@299"},
		{"two leaves exchanged", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, full), func(b []byte) []byte {
				return slices.Concat(b[2+len(all[0]):][:2+len(all[1])], b[:2+len(all[0])], b[4+len(all[0])+len(all[1]):])
			})
		}, audit.Options{}, "leaf-altered@0"},
		{"a bundle removed", func(t *testing.T, _, log string) { rm(t, filepath.Join(log, full)) }, audit.Options{}, "bundle-damaged@0"},
		{"a bundle replaced by a link", func(t *testing.T, dir, log string) {
			rm(t, filepath.Join(log, full))
			if err := os.Symlink(filepath.Join(pristine, audit.LogDir, full), filepath.Join(log, full)); err != nil {
				t.Fatal(err)
			}
		}, audit.Options{}, "bundle-damaged@0"},
		{"a bundle replaced by a pipe", func(t *testing.T, _, log string) {
			rm(t, filepath.Join(log, full))
			if err := syscall.Mkfifo(filepath.Join(log, full), 0o600); err != nil {
				t.Fatal(err)
			}
		}, audit.Options{}, "bundle-damaged@0"},
		{"a bundle replaced by a directory", func(t *testing.T, _, log string) {
			rm(t, filepath.Join(log, full))
			if err := os.Mkdir(filepath.Join(log, full), 0o700); err != nil {
				t.Fatal(err)
			}
		}, audit.Options{}, "bundle-damaged@0"},
		{"a hash tile altered", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, "tile/0/000"), func(b []byte) []byte { b[40] ^= 1; return b })
		}, audit.Options{}, "tile-damaged@0"},
		{"a hash tile removed", func(t *testing.T, _, log string) { rm(t, filepath.Join(log, "tile/0/001.p/44")) }, audit.Options{}, "tile-damaged@256"},
		{"leaf and hash tile altered alike", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, full), func(b []byte) []byte { b[bytes.Index(b, []byte("thing"))] ^= 1; return b })
			leaf, _, _ := torchwood.ReadTileEntry(read(t, log, full))
			edit(t, filepath.Join(log, "tile/0/000"), func(b []byte) []byte { h := tlog.RecordHash(leaf); copy(b, h[:]); return b })
		}, audit.Options{}, "tile-damaged@0"},
		{"the checkpoint's size altered", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, "checkpoint"), func(b []byte) []byte { return bytes.Replace(b, []byte("\n300\n"), []byte("\n299\n"), 1) })
		}, audit.Options{}, "checkpoint-unproven@-1"},
		{"the checkpoint signed by another key", func(t *testing.T, _, log string) {
			other, _, err := note.GenerateKey(rand.Reader, origin)
			if err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(log, "checkpoint"), func([]byte) []byte { return sign(t, other, 300, tlog.Hash{}) })
		}, audit.Options{}, "checkpoint-unproven@-1"},
		{"the checkpoint of another origin, by the key", func(t *testing.T, _, log string) {
			signer, _ := note.NewSigner(strings.TrimSpace(skey))
			raw, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: "example.org/other", Tree: tlog.Tree{N: 300}}.String()}, signer)
			if err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(log, "checkpoint"), func([]byte) []byte { return raw })
		}, audit.Options{}, "checkpoint-unproven@-1"},
		{"the checkpoint rewritten with the key, to another root", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, "checkpoint"), func([]byte) []byte { return sign(t, skey, 300, tlog.Hash{1}) })
		}, audit.Options{}, "tile-damaged@0"},
		{"the checkpoint removed", func(t *testing.T, _, log string) { rm(t, filepath.Join(log, "checkpoint")) }, audit.Options{}, "checkpoint-missing@-1"},
		{"the whole log rewritten with the key", func(t *testing.T, dir, _ string) {
			other := slices.Clone(all)
			other[7] = bytes.Replace(other[7], []byte("thing"), []byte("thong"), 1)
			forge(t, dir, skey, other)
		}, audit.Options{Since: remembered}, "log-forked@0"},
		{"rewritten and longer", func(t *testing.T, dir, _ string) {
			other := slices.Clone(all)
			other[7] = bytes.Replace(other[7], []byte("thing"), []byte("thong"), 1)
			forge(t, dir, skey, append(other, leaf(t), leaf(t)))
		}, audit.Options{Since: remembered}, "log-forked@0"},
		{
			"cut short with the key", func(t *testing.T, dir, _ string) { forge(t, dir, skey, all[:299]) },
			audit.Options{Since: remembered},
			"log-shrunk@299",
		},
		{
			"cut short with the key, nothing remembered but the outbox", func(t *testing.T, dir, _ string) { forge(t, dir, skey, all[:299]) },
			audit.Options{Outbox: store.Outbox()},
			"log-behind-outbox@299",
		},
		{"two leaves exchanged with the key", func(t *testing.T, dir, _ string) {
			other := slices.Clone(all)
			other[3], other[4] = other[4], other[3]
			forge(t, dir, skey, other)
		}, audit.Options{Outbox: store.Outbox()}, "outbox-mismatch@3"},
		{
			"a record logged twice", func(t *testing.T, dir, _ string) { forge(t, dir, skey, append(slices.Clone(all), all[5])) },
			audit.Options{Since: remembered},
			"record-duplicated@300",
		},
		{"a leaf that is no record", func(t *testing.T, dir, _ string) {
			forge(t, dir, skey, append(slices.Clone(all), []byte(`{"id":"r-1"}`), []byte("x")))
		}, audit.Options{}, "record-malformed@301"},
		{"the state cut back", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, ".state/treeState"), func(b []byte) []byte { return bytes.Replace(b, []byte("300"), []byte("200"), 1) })
		}, audit.Options{}, "tail-damaged@200"},
		{"a tail that is not there", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, ".state/treeState"), func(b []byte) []byte { return bytes.Replace(b, []byte("300"), []byte("400"), 1) })
		}, audit.Options{}, "tail-damaged@300"},
		{"a state that is none", func(t *testing.T, _, log string) {
			edit(t, filepath.Join(log, ".state/treeState"), func([]byte) []byte { return []byte("{") })
		}, audit.Options{}, "tail-damaged@300"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := copyOf(t, pristine)
			c.tamper(t, dir, filepath.Join(dir, audit.LogDir))
			r := verify(t, dir, vkey, c.opts)
			found := codes(r)
			switch {
			case c.want == "" && !r.OK():
				t.Errorf("an honest log: found %s", found)
			case c.want != "" && (r.OK() || !slices.Contains(strings.Fields(found), c.want)):
				t.Errorf("found %q, want %s among it", found, c.want)
			}
			for _, f := range r.Findings {
				if f.Detail == "" {
					t.Errorf("a finding says nothing: %+v", f)
				}
			}
		})
	}
}

func TestFindingsAreBounded(t *testing.T) {
	dir, vkey, _ := made(t, 300)
	edit(t, filepath.Join(dir, audit.LogDir, "tile/entries/000"), func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("thing"), []byte("thong")) })
	r := verify(t, dir, vkey, audit.Options{})
	if len(r.Findings) != audit.MaxFindings || r.Unlisted != 156 || r.OK() {
		t.Errorf("%d findings, %d unlisted; want %d and 156", len(r.Findings), r.Unlisted, audit.MaxFindings)
	}
}

func TestARememberedCheckpointProvesThatNothingBeforeItChanged(t *testing.T) {
	dir, vkey, s := made(t, 5)
	old := verify(t, dir, vkey, audit.Options{})
	fill(t, s, 600)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	if r := verify(t, dir, vkey, audit.Options{Since: []byte(old.Checkpoint)}); !r.OK() || r.Since != 5 || r.Size != 605 {
		t.Errorf("since an honest checkpoint: %s %+v", codes(r), r)
	}
	if _, err := audit.Verify(t.Context(), dir, vkey, audit.Options{Since: []byte("x")}); !errors.Is(err, audit.ErrSince) {
		t.Errorf("since something else: %v", err)
	}
}

func TestTheUnpublishedTailIsCheckedAndReported(t *testing.T) {
	dir, vkey, s := made(t, 5)
	was := read(t, dir, audit.LogDir, "checkpoint")
	fill(t, s, 300)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	// As if the power had gone before the last checkpoint.
	edit(t, filepath.Join(dir, audit.LogDir, "checkpoint"), func([]byte) []byte { return was })
	put(t, s)
	r := verify(t, dir, vkey, audit.Options{Outbox: s.Outbox()})
	if !r.OK() || r.Size != 5 || r.Integrated != 305 || r.Unpublished != 300 || r.Pending != 1 || r.Checked != 305 {
		t.Errorf("report: %s %+v", codes(r), r)
	}
	edit(t, filepath.Join(dir, audit.LogDir, "tile/entries/001.p/49"), func(b []byte) []byte { b[len(b)-3] ^= 1; return b })
	if r := verify(t, dir, vkey, audit.Options{}); codes(r) != "leaf-altered@304" {
		t.Errorf("an altered tail: found %q", codes(r))
	}
}

func TestTheLogIsVerifiedWhileItIsWritten(t *testing.T) {
	top := t.TempDir()
	dir, s := filepath.Join(top, "audit"), openStore(t, top)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox(), Batch: 1e6})
	s.OnRecord(l.Notify)
	if _, err := l.Wait(t.Context(), put(t, s)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_ = commit(context.Background(), s, event.NewRecord(`User::"op"`, "test.change", "thing"))
		}
	}()
	for i := range 15 {
		if r := verify(t, dir, l.Verifier(), audit.Options{Outbox: s.Outbox()}); !r.OK() || len(r.Notes) > 0 {
			t.Fatalf("round %d: %s %+v", i, codes(r), r.Notes)
		}
		to := t.TempDir()
		if _, err := audit.Copy(t.Context(), dir, keep(to)); err != nil {
			t.Fatal(err)
		}
		if r := verify(t, to, l.Verifier(), audit.Options{}); !r.OK() {
			t.Fatalf("copy %d: %s", i, codes(r))
		}
	}
	cancel()
	<-done
	stop()
}

// keep writes copied files below dir.
func keep(dir string) func(audit.CopiedFile) error {
	return func(f audit.CopiedFile) error {
		path := filepath.Join(dir, filepath.FromSlash(f.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		return os.WriteFile(path, f.Data, f.Mode)
	}
}

func TestACopyCanBeGoneOnWith(t *testing.T) {
	dir, vkey, s := made(t, 700)
	to := t.TempDir()
	n, err := audit.Copy(t.Context(), dir, keep(to))
	if err != nil || n != 700 {
		t.Fatalf("copy: %d, %v", n, err)
	}
	put(t, s)
	l, stop := run(t, audit.Config{Dir: to, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	proven(t, to, vkey, s.Outbox(), 701)
}

func TestAPartialTileIsCutFromTheFullOneThatReplacedIt(t *testing.T) {
	dir, vkey, s := made(t, 200)
	was := read(t, dir, audit.LogDir, "checkpoint")
	fill(t, s, 100)
	l, stop := run(t, audit.Config{Dir: dir, Outbox: s.Outbox()})
	drained(t, l)
	stop()
	log := filepath.Join(dir, audit.LogDir)
	// What Tessera's collector does once a minute; here while somebody still holds the old checkpoint.
	for _, p := range []string{"tile/entries/000.p", "tile/0/000.p"} {
		if err := os.RemoveAll(filepath.Join(log, p)); err != nil {
			t.Fatal(err)
		}
	}
	edit(t, filepath.Join(log, "checkpoint"), func([]byte) []byte { return was })
	if r := verify(t, dir, vkey, audit.Options{}); !r.OK() || r.Size != 200 || r.Unpublished != 100 {
		t.Errorf("report: %s %+v", codes(r), r)
	}
}

func TestVerifyRefusesWhatItCannotLookAt(t *testing.T) {
	dir, vkey, _ := made(t, 1)
	for _, c := range []struct {
		name, dir, vkey string
		want            error
	}{
		{"no directory", filepath.Join(dir, "nowhere"), vkey, audit.ErrNoLog},
		{"a broken key", dir, "example.org/audit+x", audit.ErrVerifier},
		{"no key", t.TempDir(), "", audit.ErrVerifier},
	} {
		if _, err := audit.Verify(t.Context(), c.dir, c.vkey, audit.Options{}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if r := verify(t, filepath.Join(dir, audit.LogDir), vkey, audit.Options{}); !r.OK() || r.Checked != 1 {
		t.Errorf("the bare log: %+v", r)
	}
	if r := verify(t, t.TempDir(), vkey, audit.Options{}); codes(r) != "checkpoint-missing@-1" {
		t.Errorf("an empty directory: %s", codes(r))
	}
}

func leaf(t testing.TB) []byte {
	t.Helper()
	raw, err := event.NewRecord(`User::"op"`, "test.change", "thing").Leaf()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func rm(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// FuzzVerify replaces one file of a log: Verify neither panics nor hangs, and only the file's own bytes are proven.
func FuzzVerify(f *testing.F) {
	dir, vkey, _ := made(f, 3)
	log := filepath.Join(dir, audit.LogDir)
	names := []string{"checkpoint", "tile/entries/000.p/3", "tile/0/000.p/3", ".state/treeState"}
	for i, name := range names {
		raw := read(f, log, name)
		f.Add(uint8(i), raw)
		f.Add(uint8(i), raw[:len(raw)/2])
		f.Add(uint8(i), append(bytes.Clone(raw), 0))
		f.Add(uint8(i), []byte{})
	}
	f.Add(uint8(0), []byte("example.org/audit\n99999999999999999999\n\n"))
	f.Add(uint8(3), []byte(`{"size":18446744073709551615,"root":"AAAA"}`))
	f.Fuzz(func(t *testing.T, which uint8, data []byte) {
		name := names[int(which)%len(names)]
		honest := read(t, log, name)
		to := copyOf(t, dir)
		edit(t, filepath.Join(to, audit.LogDir, name), func([]byte) []byte { return data })
		r, err := audit.Verify(t.Context(), to, vkey, audit.Options{})
		if err != nil {
			t.Fatalf("verify: %v", err)
		}
		if r.OK() && !bytes.Equal(data, honest) && !sameMeaning(name, data, honest) {
			t.Errorf("%s was replaced by %q, and nothing was found", name, data)
		}
	})
}

// sameMeaning reports whether two files may differ and still say the same: JSON in its spaces, a note in signatures of
// others.
func sameMeaning(name string, a, b []byte) bool {
	switch name {
	case ".state/treeState":
		var x, y struct {
			Size uint64
			Root []byte
		}
		return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && fmt.Sprint(x) == fmt.Sprint(y)
	case "checkpoint":
		x, _, _ := strings.Cut(string(a), "\n\n")
		y, _, _ := strings.Cut(string(b), "\n\n")
		return x == y
	}
	return false
}
