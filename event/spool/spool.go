package spool

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"sync/atomic"
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

// Spool is a queue of events on disk.
//
// Concurrency: Emit, Next, Ack and Status are safe; Run is called once; Close after Run has returned.
type Spool struct {
	dir    string
	config Config
	meter  event.Meter
	log    *slog.Logger

	in           chan []byte  // JSON of events; never closed
	pendingBytes atomic.Int64 // of what is in the channel
	wake         chan struct{}
	closed       atomic.Bool

	lossMu    sync.Mutex // never held while waiting for a disk: Emit takes it
	losses    map[Reason]*loss
	lostTotal uint64

	mu       sync.Mutex // guards what follows
	file     *os.File   // the state, locked
	state    state      // but for Losses, which are taken from losses when it is written
	segments []segment  // in order; the last one is appended to
	active   *os.File   // the last segment, or nil before the first event
	fresh    bool       // the next event begins a segment: the active one is broken
	bytes    int64      // of all segments
	last     uint64     // sequence number on disk
	synced   uint64     // … and safe from a power cut
	arrived  chan struct{}
	failing  bool      // the disk refuses events; logged once
	mute     time.Time // until then losses are not told

	readMu sync.Mutex // guards where
	where  position
}

var _ event.Sink = (*Spool)(nil)

// Open opens the spool in dir, which it makes if needed (0700), and repairs what a crash left. It starts nothing.
// Errors: matches [ErrInUse]; the disk's.
func Open(dir string, c Config) (*Spool, error) {
	c = c.withDefaults()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open event spool: %w", err)
	}
	file, st, fresh, err := openState(dir)
	if err != nil {
		return nil, fmt.Errorf("open event spool: %w", err)
	}
	s := &Spool{
		dir: dir, config: c, meter: c.Meter, log: c.Logger,
		in: make(chan []byte, MaxPending), wake: make(chan struct{}, 1), arrived: make(chan struct{}),
		file: file, state: st, losses: maps.Clone(st.Losses),
	}
	if err := s.recover(fresh); err != nil {
		_ = s.closeFiles()
		return nil, fmt.Errorf("open event spool: %w", err)
	}
	return s, nil
}

func (c Config) withDefaults() Config {
	if c.SegmentBytes <= 0 {
		c.SegmentBytes = DefaultSegmentBytes
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = DefaultMaxBytes
	}
	c.SegmentBytes = max(c.SegmentBytes, 2*event.MaxBytes)
	c.MaxBytes = max(c.MaxBytes, 2*c.SegmentBytes)
	if c.SyncEvery <= 0 {
		c.SyncEvery = DefaultSyncEvery
	}
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Emit takes an event for the disk. It never waits: what finds no room in memory is lost and counted.
// Durability: see the package documentation.
func (s *Spool) Emit(e event.Event) {
	payload, ok := encode(e)
	switch {
	case !ok:
		s.lose(LostOversize, 1, 0)
	case s.closed.Load():
		s.lose(LostMemory, 1, 0)
	case s.pendingBytes.Add(int64(len(payload))) > maxPendingBytes:
		s.pendingBytes.Add(-int64(len(payload)))
		s.lose(LostMemory, 1, 0)
	default:
		select {
		case s.in <- payload:
		default:
			s.pendingBytes.Add(-int64(len(payload)))
			s.lose(LostMemory, 1, 0)
		}
	}
}

// encode renders an event within its bound; one that is too large loses its detail and says so.
func encode(e event.Event) ([]byte, bool) {
	b, err := json.Marshal(e)
	if err == nil && len(b) <= event.MaxBytes {
		return b, true
	}
	if len(e.Detail) == 0 {
		return nil, false
	}
	attrs := map[string]any{"detail.dropped": len(e.Detail)}
	maps.Copy(attrs, e.Attrs)
	e.Detail, e.Attrs = nil, attrs
	b, err = json.Marshal(e)
	return b, err == nil && len(b) <= event.MaxBytes
}

// lose counts a loss, to be told to the reader.
func (s *Spool) lose(reason Reason, n, atMost uint64) {
	s.meter.Count("spool_lost", int64(max(n, 1)), "reason", string(reason))
	s.lossMu.Lock()
	defer s.lossMu.Unlock()
	l := s.losses[reason]
	if l == nil {
		l = &loss{Since: time.Now().UTC()}
		s.losses[reason] = l
	}
	l.Count += n
	l.AtMost += atMost
	s.lostTotal += n
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Status returns what the spool holds now.
func (s *Spool) Status() Status {
	s.lossMu.Lock()
	lost := s.lostTotal
	s.lossMu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return Status{
		Acked: s.state.Acked, Last: s.last, Bytes: s.bytes, Segments: len(s.segments), Pending: int64(len(s.in)), Lost: lost,
	}
}

// Close writes what is in memory, syncs, and lets go of the directory. Call it when [Spool.Run] has returned.
// Durability: everything emitted before is on disk when it returns nil.
func (s *Spool) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	s.drain()
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.sync()
	s.state.Clean = len(s.in) == 0
	if serr := s.saveState(true); err == nil {
		err = serr
	}
	if cerr := s.closeFiles(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("close event spool: %w", err)
	}
	return nil
}

func (s *Spool) closeFiles() error {
	var err error
	if s.active != nil {
		err = s.active.Close()
		s.active = nil
	}
	if cerr := s.file.Close(); err == nil {
		err = cerr
	}
	return err
}
