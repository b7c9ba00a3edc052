package spool

import (
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// The default bounds.
const (
	DefaultMaxBytes     = 256 << 20
	DefaultSegmentBytes = 4 << 20
	DefaultSyncEvery    = time.Second
)

// The bounds of what is in memory, before it is on disk.
const (
	MaxPending      = 4096    // events
	maxPendingBytes = 8 << 20 // of their JSON
)

// KindLost is the kind of the events with which the spool tells its reader what was lost. Its attributes: `reason` (one
// of the Reasons), `count` (events lost for sure), `at_most` where the number is not known, and `since`.
const KindLost = "spool.lost"

// Reason is why events were lost; a stable word, and the label of the counter spool_lost.
type Reason string

// The reasons.
const (
	LostMemory   Reason = "memory"   // more events at once than the disk took
	LostFull     Reason = "full"     // MaxBytes of events are not acknowledged
	LostDisk     Reason = "disk"     // the disk refused them: full, or broken
	LostOversize Reason = "oversize" // one event exceeds event.MaxBytes even without its detail, or is no JSON
	LostCorrupt  Reason = "corrupt"  // damaged on disk
	LostTorn     Reason = "torn"     // written by halves when the machine stopped
	LostUnclean  Reason = "unclean"  // in memory when the process was killed: the number is not known
)

// ErrInUse is the code of the refusal to open a spool that another process has open.
var ErrInUse = &refusal.Error{Code: "spool-in-use"}

// Config is what a [Spool] is made of. Zero values mean the defaults.
type Config struct {
	MaxBytes     int64         // of all segments; at least two segments
	SegmentBytes int64         // of one file; at least twice event.MaxBytes
	SyncEvery    time.Duration // the longest that a written event may wait to be safe from a power cut
	Meter        event.Meter
	Logger       *slog.Logger
}

// Numbered is an event and its place in the queue.
type Numbered struct {
	Seq   uint64 // from 1, rising; a gap is explained by an event of kind [KindLost]
	Event event.Event
}

// Status is what a spool holds.
type Status struct {
	Acked    uint64 `json:"acked"`    // the last sequence number acknowledged
	Last     uint64 `json:"last"`     // the last sequence number on disk
	Bytes    int64  `json:"bytes"`    // of all segments
	Segments int    `json:"segments"` // files
	Pending  int64  `json:"pending"`  // events in memory
	Lost     uint64 `json:"lost"`     // since Open
}
