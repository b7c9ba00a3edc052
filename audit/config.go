package audit

import (
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// The defaults of [Config] and the bounds of this room.
const (
	DefaultBatch      = 5 * time.Millisecond
	DefaultCheckpoint = 100 * time.Millisecond // also the least: Tessera's POSIX storage allows no shorter one
	DefaultMaxWait    = 10 * time.Second

	// MaxWaiters bounds the callers that wait for an index at one time.
	MaxWaiters = 4096
	// MaxBacklog is how many leaves may wait in the outbox before [Log.Ready] refuses more work.
	MaxBacklog = 16384

	maxBatch        = 256         // leaves in flight at one time; one full bundle
	reconcilePage   = 4096        // outbox rows compared with the log at one time; more than maxBatch
	pollEvery       = time.Second // how soon a row is found that nobody gave notice of
	backoffLeast    = 50 * time.Millisecond
	backoffMost     = 2 * time.Second
	shutdownTimeout = 2 * time.Second // for the last checkpoint, and again for Tessera's goroutines
	maxOriginBytes  = 255
)

// Config is what a [Log] is made of.
type Config struct {
	// Dir is the audit directory; made 0700 if it is missing. One process at a time may have it open (sqlite.LockDir of
	// the data directory sees to that).
	Dir string
	// Origin names the log in checkpoints and keys: a schema-less URL such as "example.org/audit"; no blanks, no plus.
	Origin string
	// Key is the note signer ("PRIVATE+KEY+…", Ed25519) if it is kept elsewhere; empty: Dir/signer.key, made if missing.
	Key string
	// Outbox holds the leaves.
	Outbox Outbox
	// Batch is how long the log waits for more leaves before it writes. Default [DefaultBatch].
	Batch time.Duration
	// Checkpoint is how often a grown log is signed and published. Default and least [DefaultCheckpoint].
	Checkpoint time.Duration
	// MaxWait bounds [Log.Wait]. Default [DefaultMaxWait].
	MaxWait time.Duration

	Meter  event.Meter
	Logger *slog.Logger
}

func (c *Config) fill() error {
	bad := func(why, do string) error {
		return &refusal.Error{Kind: refusal.Invalid, Code: "audit-config", What: "audit log", Why: why, Do: do}
	}
	switch {
	case c.Dir == "":
		return bad("no directory is given", "set the audit directory")
	case c.Outbox == nil:
		return bad("no outbox is given", "wire the store's outbox")
	case c.Origin == "" || len(c.Origin) > maxOriginBytes || strings.ContainsAny(c.Origin, " \t\r\n+"):
		return bad("the origin is empty, longer than 255 bytes, or has a blank or a plus", "name it like example.org/audit")
	case c.Batch < 0 || c.Batch > time.Minute:
		return bad("the batch interval is not between 0 and 1m", "leave it out for 5ms")
	case c.Checkpoint != 0 && (c.Checkpoint < DefaultCheckpoint || c.Checkpoint > time.Hour):
		return bad("the checkpoint interval is not between 100ms and 1h", "leave it out for 100ms")
	case c.MaxWait < 0:
		return bad("the longest wait is negative", "leave it out for 10s")
	}
	if c.Batch == 0 {
		c.Batch = DefaultBatch
	}
	if c.Checkpoint == 0 {
		c.Checkpoint = DefaultCheckpoint
	}
	if c.MaxWait == 0 {
		c.MaxWait = DefaultMaxWait
	}
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// The refusals that callers match on.
var (
	// ErrDiskFull: the log cannot be written for want of space.
	ErrDiskFull = &refusal.Error{Code: "disk-full"}
	// ErrNotLogged: the record was not indexed within the bound on waiting.
	ErrNotLogged = &refusal.Error{Code: "audit-not-logged"}
	// ErrWaiters: [MaxWaiters] callers wait already.
	ErrWaiters = &refusal.Error{Code: "audit-waiters"}
	// ErrBacklog: [MaxBacklog] leaves wait already.
	ErrBacklog = &refusal.Error{Code: "audit-backlog"}
	// ErrBehind: the log is shorter than the outbox remembers.
	ErrBehind = &refusal.Error{Code: "audit-log-behind"}
	// ErrForeign: the log in the directory was signed by another key or has another origin.
	ErrForeign = &refusal.Error{Code: "audit-log-foreign"}
	// ErrKey: the signing key is malformed, or readable by others.
	ErrKey = &refusal.Error{Code: "audit-key"}
)

// isFull reports whether err is about space. Tessera flattens some causes to text, hence the second look.
func isFull(err error) bool {
	if err == nil {
		return false
	}
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		strings.Contains(err.Error(), syscall.ENOSPC.Error()) || strings.Contains(err.Error(), syscall.EDQUOT.Error())
}

func diskFull(what string, err error) error {
	return &refusal.Error{
		Kind: refusal.Unavailable, Code: ErrDiskFull.Code, What: what,
		Why: "the disk of the audit log is full", Do: "free space; the log goes on by itself, nothing accepted is lost", Err: err,
	}
}
