package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/redoubtsec/redoubt/refusal"
)

// Log is the audit log of one server: it signs, sequences and publishes. Make one with [Open]; [Log.Run] does the work.
//
// Concurrency: safe; Run is called once.
type Log struct {
	cfg    Config
	key    keyPair
	logDir string

	running atomic.Bool
	wake    chan struct{} // holds one notice
	stopped chan struct{} // closed when Run has returned

	// Owned by the goroutine of Run.
	unsure bool // a former attempt may have reached the log without its marks

	mu      sync.Mutex
	waiters map[string]*waiter // guarded by mu
	failing error              // guarded by mu: why the last round failed; nil if it did not
	backlog int                // guarded by mu: rows that waited when last counted
}

// Status is how the log stands.
type Status struct {
	Origin    string `json:"origin"`
	Size      uint64 `json:"size"`      // leaves integrated
	Published uint64 `json:"published"` // leaves under the published checkpoint
	Pending   int    `json:"pending"`   // leaves that wait in the outbox
	Failing   string `json:"failing,omitempty"`
}

// Open makes ready the log in cfg.Dir, with a new key and an empty log if there is none; it starts nothing.
//
// Errors: *refusal.Error of an unusable configuration; [ErrKey]; [ErrForeign] if the checkpoint there is not signed by
// the key; [ErrBehind] if the outbox has marks that the log cannot have given (it was cut, or replaced by an older copy).
func Open(ctx context.Context, cfg Config) (*Log, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	logDir := filepath.Join(cfg.Dir, LogDir)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit directory: %w", fullOr("audit directory", err))
	}
	if err := os.MkdirAll(logDir, 0o755); err != nil {
		return nil, fmt.Errorf("audit directory: %w", fullOr("audit directory", err))
	}
	size, err := integratedSize(logDir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, SignerFile)); cfg.Key == "" && size > 0 && errors.Is(err, fs.ErrNotExist) {
		// A new key for an old log would look like a forged one to everybody who has the verifier.
		return nil, keyRefusal("the log has leaves, but its signing key is gone", "restore signer.key from a back-up")
	}
	key, err := loadKey(cfg.Dir, cfg.Origin, cfg.Key)
	if err != nil {
		return nil, err
	}
	l := &Log{
		cfg: cfg, key: key, logDir: logDir, unsure: true,
		wake: make(chan struct{}, 1), stopped: make(chan struct{}), waiters: map[string]*waiter{},
	}
	published, err := l.publishedSize()
	if err != nil {
		return nil, err
	}
	if published > size {
		return nil, behind(fmt.Sprintf("its checkpoint covers %d leaves, its state %d", published, size))
	}
	tail, err := cfg.Outbox.Tail(ctx)
	if err != nil {
		return nil, fmt.Errorf("audit outbox: %w", err)
	}
	if tail.Next > size {
		return nil, behind(fmt.Sprintf("the database remembers %d leaves, the log has %d", tail.Next, size))
	}
	l.backlog = tail.Pending
	return l, nil
}

func behind(why string) error {
	return &refusal.Error{
		Kind: refusal.Conflict, Code: ErrBehind.Code, What: "audit log", Why: "leaves are missing: " + why,
		Do: "restore the audit directory; if it cannot be found again, treat the log as tampered with",
	}
}

// Verifier returns the encoded note verifier, "<origin>+<hash>+<key>": what [Verify] asks for.
func (l *Log) Verifier() string { return l.key.vkey }

// Checkpoint returns the published checkpoint, a signed note. Errors: wraps fs.ErrNotExist before the first.
func (l *Log) Checkpoint() ([]byte, error) {
	return os.ReadFile(filepath.Join(l.logDir, checkpointFile))
}

// Status tells how the log stands.
func (l *Log) Status(ctx context.Context) (Status, error) {
	published, err := l.publishedSize() // before the size, which is then not behind it
	if err != nil {
		return Status{}, err
	}
	size, err := integratedSize(l.logDir)
	if err != nil {
		return Status{}, err
	}
	tail, err := l.cfg.Outbox.Tail(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("audit outbox: %w", err)
	}
	s := Status{Origin: l.cfg.Origin, Size: size, Published: published, Pending: tail.Pending}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.failing == nil:
	case isFull(l.failing):
		s.Failing = "the disk is full"
	default:
		s.Failing = "the log or the outbox cannot be written; see the server's log"
	}
	return s, nil
}

// Ready says whether a change that must be recorded should be begun now: nil, or the refusal to answer with
// ([ErrDiskFull], [ErrBacklog]). It does no I/O.
func (l *Log) Ready() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case isFull(l.failing):
		l.cfg.Meter.Count("audit_refused", 1, "reason", ErrDiskFull.Code)
		return diskFull("change", l.failing)
	case l.backlog >= MaxBacklog:
		l.cfg.Meter.Count("audit_refused", 1, "reason", ErrBacklog.Code)
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: ErrBacklog.Code, What: "change",
			Why: fmt.Sprintf("%d changes wait for the audit log", l.backlog), Do: "try again later; look at the server's log if it lasts",
			Err: l.failing,
		}
	}
	return nil
}

// The files of Tessera's POSIX storage that are read here.
const (
	checkpointFile = "checkpoint"
	stateFile      = ".state/treeState"
	versionFile    = ".state/version"
)

// treeState is what Tessera keeps of the integrated tree; it is not signed.
type treeState struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"`
}

// integratedSize returns the size of the integrated tree, 0 if the log was never run.
func integratedSize(logDir string) (uint64, error) {
	raw, err := os.ReadFile(filepath.Join(logDir, stateFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Join(logDir, checkpointFile)); err == nil {
			return 0, behind("it has a checkpoint, but its state is gone")
		}
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("audit log state: %w", err)
	}
	var s treeState
	if err := json.Unmarshal(raw, &s); err != nil {
		return 0, behind("its state file is damaged")
	}
	return s.Size, nil
}

// publishedSize returns the size under the published checkpoint, 0 if there is none. The checkpoint must be ours.
func (l *Log) publishedSize() (uint64, error) {
	raw, err := l.Checkpoint()
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("audit checkpoint: %w", err)
	}
	c, err := openCheckpoint(raw, l.key.verifier)
	if err != nil {
		return 0, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrForeign.Code, What: "audit log", Why: "its checkpoint is not signed by this server's key",
			Do: "restore log and signer.key from the same back-up", Err: err,
		}
	}
	return uint64(c.N), nil
}
