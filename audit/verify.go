package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of findings.
const (
	FoundNoCheckpoint  = "checkpoint-missing"   // there is no published checkpoint
	FoundBadCheckpoint = "checkpoint-unproven"  // it is malformed, of another origin, or not signed by the key
	FoundShrunk        = "log-shrunk"           // it covers fewer leaves than the remembered one
	FoundFork          = "log-forked"           // it does not extend the remembered one
	FoundTile          = "tile-damaged"         // a hash tile is missing or does not hash up to the root
	FoundBundle        = "bundle-damaged"       // an entry bundle is missing, or has too few, too many or torn leaves
	FoundLeaf          = "leaf-altered"         // a leaf is not the one that the tree commits to
	FoundRecord        = "record-malformed"     // a leaf is no event.Record
	FoundDuplicate     = "record-duplicated"    // two leaves have one record id
	FoundTail          = "tail-damaged"         // the unpublished tail does not extend the checkpoint
	FoundBehind        = "log-behind-outbox"    // the outbox has marks above the log's end
	FoundMismatch      = "outbox-mismatch"      // the outbox says another index of a record
	NotedOrder         = "time-goes-back"       // a note: a record is older than one before it
	NotedUnmarked      = "record-not-in-outbox" // a note: a leaf of which the outbox knows nothing (a restored back-up)
)

// MaxFindings bounds what a [Report] lists; the rest is counted.
const MaxFindings = 100

// orderTolerance is how much older a record may be than one before it: concurrent changes commit in any order.
const orderTolerance = time.Minute

// maxLogSize bounds the size that a checkpoint may claim: with more leaves than that a log is not plausible.
const maxLogSize = 1 << 40

// Options is what [Verify] may know beside the files.
type Options struct {
	// Since is a remembered checkpoint of the same log: a signed note, as [Report.Checkpoint] has it.
	Since []byte
	// Outbox, if given, is compared with the log.
	Outbox Outbox
}

// Finding is one thing that is wrong with a log. Index is of the leaf, or of the first leaf concerned, and -1 of none.
type Finding struct {
	Code   string `json:"code"`
	Index  int64  `json:"index"`
	Detail string `json:"detail"`
}

// Report is what [Verify] found. The log is proven if [Report.OK].
type Report struct {
	Origin     string `json:"origin"`
	Size       uint64 `json:"size"` // leaves under the published checkpoint
	Root       string `json:"root"` // base64
	Checkpoint string `json:"checkpoint"`
	// OwnKey says that the verifier key was read beside the log: then the log proves nothing against who owns both.
	OwnKey bool `json:"own_key,omitempty"`
	// Since is the size of the remembered checkpoint, if one was given.
	Since uint64 `json:"since,omitempty"`
	// Integrated is how many leaves the log has in all; those above Size are the unpublished tail: in the tree, but under
	// no signature yet.
	Integrated  uint64    `json:"integrated"`
	Unpublished uint64    `json:"unpublished"`
	Pending     int       `json:"pending,omitempty"` // rows of the outbox that are not in the log yet
	Checked     uint64    `json:"checked"`           // leaves whose inclusion was proven, the tail's included
	First       time.Time `json:"first,omitzero"`    // time of the first record
	Last        time.Time `json:"last,omitzero"`
	Findings    []Finding `json:"findings,omitempty"`
	Notes       []Finding `json:"notes,omitempty"` // worth a look; no proof of tampering
	Unlisted    int       `json:"unlisted,omitempty"`
}

// OK reports whether nothing was found.
func (r *Report) OK() bool { return len(r.Findings) == 0 && r.Unlisted == 0 }

func (r *Report) find(code string, index int64, format string, args ...any) {
	if len(r.Findings) >= MaxFindings {
		r.Unlisted++
		return
	}
	r.Findings = append(r.Findings, Finding{Code: code, Index: index, Detail: fmt.Sprintf(format, args...)})
}

func (r *Report) note(code string, index int64, format string, args ...any) {
	if len(r.Notes) < MaxFindings {
		r.Notes = append(r.Notes, Finding{Code: code, Index: index, Detail: fmt.Sprintf(format, args...)})
	}
}

// The refusals of [Verify]'s own input.
var (
	// ErrVerifier: the verifier key is malformed or not given.
	ErrVerifier = &refusal.Error{Code: "audit-verifier"}
	// ErrSince: the remembered checkpoint is not one of this log.
	ErrSince = &refusal.Error{Code: "audit-since"}
	// ErrNoLog: there is no log in the directory.
	ErrNoLog = &refusal.Error{Code: "audit-no-log"}
)

// Verify checks the log in dir (an audit directory, or a bare C2SP log) from its files alone: the signature of the
// checkpoint by vkey, the inclusion of every leaf, consistency with a remembered checkpoint, that leaves are records,
// each once, and the unpublished tail. With vkey "" it takes the key published beside the log, and says so.
//
// What is wrong with the log is in the report; an error says that it could not be looked at. A log that is being
// written may be verified. Memory grows by about 40 bytes a leaf. Trust: every byte in dir is attacker-controlled.
// Source: C2SP tlog-tiles v1, tlog-checkpoint v1; RFC 6962, sections 2.1.1 and 2.1.2.
func Verify(ctx context.Context, dir, vkey string, opts Options) (Report, error) {
	var r Report
	verifier, err := r.verifier(dir, vkey)
	if err != nil {
		return r, err
	}
	files, err := openFiles(dir)
	if err != nil {
		return r, err
	}
	defer files.close()
	r.Origin = verifier.Name()

	// The outbox first, then the checkpoint, then the state: of a log at work each is then no further than the next.
	var tail Tail
	if opts.Outbox != nil {
		if tail, err = opts.Outbox.Tail(ctx); err != nil {
			return r, fmt.Errorf("audit outbox: %w", err)
		}
		r.Pending = tail.Pending
	}
	published, ok, err := r.published(files, verifier)
	if err != nil || !ok {
		return r, err
	}
	state, err := r.state(files, published)
	if err != nil {
		return r, err
	}
	if opts.Outbox != nil && tail.Next > r.Integrated {
		r.find(FoundBehind, int64(r.Integrated), "the outbox has leaves up to %d, the log ends at %d", tail.Next, r.Integrated)
	}
	w := &walk{report: &r, tiles: files, outbox: opts.Outbox, seen: map[[16]byte]uint64{}}
	if opts.Since != nil {
		if err := w.since(ctx, opts.Since, verifier, published); err != nil {
			return r, err
		}
	}
	if err := w.leaves(ctx, published, 0); err != nil {
		return r, err
	}
	if state.N > published.N {
		if !w.extends(ctx, published, state) {
			r.find(FoundTail, published.N, "the unpublished tail does not extend the checkpoint")
			return r, nil
		}
		if err := w.leaves(ctx, state, published.N); err != nil {
			return r, err
		}
	}
	return r, ctx.Err()
}

func (r *Report) verifier(dir, vkey string) (note.Verifier, error) {
	if vkey == "" {
		raw, err := os.ReadFile(filepath.Join(dir, VerifierFile))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, &refusal.Error{
				Kind: refusal.Invalid, Code: ErrVerifier.Code, What: "verifier key", Why: "none is given, and the directory has no " + VerifierFile,
				Do: "give the verifier key of the log",
			}
		}
		if err != nil {
			return nil, fmt.Errorf("audit verifier key: %w", err)
		}
		vkey, r.OwnKey = string(raw), true
	}
	v, err := note.NewVerifier(strings.TrimSpace(vkey))
	if err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrVerifier.Code, What: "verifier key", Why: "it is no note verifier of the form origin+hash+key",
			Do: "take it from " + VerifierFile + " of the audit directory", Err: err,
		}
	}
	return v, nil
}

// published reads and opens the checkpoint, and says whether there is one to go on with.
func (r *Report) published(files *files, verifier note.Verifier) (tlog.Tree, bool, error) {
	raw, err := files.read(checkpointFile, maxCheckpointBytes)
	if errors.Is(err, fs.ErrNotExist) {
		r.find(FoundNoCheckpoint, -1, "the log has no checkpoint")
		return tlog.Tree{}, false, nil
	}
	if err != nil && !errors.Is(err, errDamaged) {
		return tlog.Tree{}, false, fmt.Errorf("audit checkpoint: %w", err)
	}
	c, err := openCheckpoint(raw, verifier)
	if err != nil || c.N > maxLogSize {
		r.find(FoundBadCheckpoint, -1, "the checkpoint is not one that the key of %s signed", verifier.Name())
		return tlog.Tree{}, false, nil
	}
	r.Size, r.Root, r.Checkpoint = uint64(c.N), c.Hash.String(), string(raw)
	return c.Tree, true, nil
}

// state reads how far the tree reaches in all. A bare log has no such file and ends at its checkpoint.
func (r *Report) state(files *files, published tlog.Tree) (tlog.Tree, error) {
	r.Integrated = r.Size
	state, err := files.state()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return published, nil
	case errors.Is(err, errDamaged):
		r.find(FoundTail, published.N, "the state file is damaged")
		return published, nil
	case err != nil:
		return tlog.Tree{}, fmt.Errorf("audit log state: %w", err)
	}
	// Of a log at work the checkpoint was read before the state: it cannot be ahead of it.
	if state.N < published.N || state.N == published.N && state.Hash != published.Hash && state.N > 0 {
		r.find(FoundTail, state.N, "the state file ends at %d and does not hold the checkpoint's %d leaves", state.N, published.N)
		return published, nil
	}
	r.Integrated = uint64(state.N)
	r.Unpublished = r.Integrated - r.Size
	return state, nil
}

// since compares with a remembered checkpoint.
func (w *walk) since(ctx context.Context, raw []byte, verifier note.Verifier, published tlog.Tree) error {
	old, err := openCheckpoint(raw, verifier)
	if err != nil {
		return &refusal.Error{
			Kind: refusal.Invalid, Code: ErrSince.Code, What: "remembered checkpoint",
			Why: "it is no checkpoint that the key of " + verifier.Name() + " signed", Do: "give one that this log published before", Err: err,
		}
	}
	w.report.Since = uint64(old.N)
	switch {
	case old.N > published.N:
		w.report.find(FoundShrunk, published.N, "the log had %d leaves when the checkpoint was remembered, now %d", old.N, published.N)
	case !w.extends(ctx, old.Tree, published):
		w.report.find(FoundFork, 0, "the first %d leaves are not those of the remembered checkpoint", old.N)
	}
	return nil
}

// extends reports whether the tree new begins with the tree old. RFC 6962, section 2.1.2.
func (w *walk) extends(ctx context.Context, old, next tlog.Tree) bool {
	switch old.N {
	case 0:
		return true
	case next.N:
		return old.Hash == next.Hash
	}
	hashes := torchwood.TileHashReaderWithContext(ctx, next, w.tiles)
	proof, err := tlog.ProveTree(next.N, old.N, hashes)
	return err == nil && tlog.CheckTree(proof, next.N, next.Hash, old.N, old.Hash) == nil
}
