package spool

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"slices"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of what [Spool.Next] returns at once.
const (
	MaxBatch      = 4096    // events
	maxBatchBytes = 1 << 20 // of their JSON; at least one event is returned
)

// position is where reading ended: behind the frame of seq, in the segment that begins with first.
type position struct {
	first  uint64
	offset int64
	seq    uint64
}

// Next returns the events after the sequence number given (0: after what is acknowledged), in order, at most limit (0 or
// more than [MaxBatch]: that many). It waits for the first one. An event is returned again until it is acknowledged.
//
// Errors: those of ctx and of the disk. Durability: what is returned is on disk.
func (s *Spool) Next(ctx context.Context, after uint64, limit int) ([]Numbered, error) {
	if limit <= 0 || limit > MaxBatch {
		limit = MaxBatch
	}
	for {
		s.mu.Lock()
		after = max(after, s.state.Acked)
		last, arrived := s.last, s.arrived
		if after < last {
			_ = s.sync() // a failure is logged and counted; the events are better told than kept
		}
		segments := slices.Clone(s.segments)
		s.mu.Unlock()
		if after < last {
			out, err := s.read(segments, after, last, limit)
			if err != nil {
				return nil, fmt.Errorf("read event spool: %w", err)
			}
			if len(out) > 0 {
				return out, nil
			}
			after = last // all of it was damaged, which was counted; a note of it will arrive
			continue
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-arrived:
		}
	}
}

// read returns events after `after`, up to last, and counts the gaps between them.
func (s *Spool) read(segments []segment, after, last uint64, limit int) ([]Numbered, error) {
	s.readMu.Lock()
	defer s.readMu.Unlock()
	var (
		out      []Numbered
		bytes    int
		expected = after + 1
	)
	// The segment that holds `expected` is the last one that begins at or before it.
	at := 0
	for i, seg := range segments {
		if seg.first <= expected {
			at = i
		}
	}
	for i, seg := range segments[at:] {
		var offset int64
		if i == 0 && s.where.first == seg.first && s.where.seq < expected {
			offset = s.where.offset
		}
		f, err := os.Open(seg.path)
		if os.IsNotExist(err) {
			continue // acknowledged meanwhile, or taken away by somebody: then it is a gap
		}
		if err != nil {
			return out, err
		}
		_, err = scan(f, offset, seg.size, func(fr frame, end int64) bool {
			if fr.seq > last {
				return false
			}
			if fr.seq >= expected {
				s.gap(expected, fr.seq-1)
				expected = fr.seq + 1
				var e event.Event
				if json.Unmarshal(fr.payload, &e) != nil {
					s.gap(fr.seq, fr.seq) // whole, but no event
				} else {
					out = append(out, Numbered{Seq: fr.seq, Event: e})
					bytes += len(fr.payload)
				}
			}
			s.where = position{first: seg.first, offset: end, seq: fr.seq}
			return len(out) < limit && bytes < maxBatchBytes
		})
		_ = f.Close()
		if err != nil {
			return out, err
		}
		if len(out) >= limit || bytes >= maxBatchBytes {
			return out, nil
		}
	}
	s.gap(expected, last)
	return out, nil
}

// gap counts the numbers from..to, which are not on disk any more, unless they were counted or acknowledged before.
func (s *Spool) gap(from, to uint64) {
	if from > to {
		return
	}
	s.mu.Lock()
	from = max(from, s.state.Examined+1, s.state.Acked+1)
	if from <= to {
		s.state.Examined = to
	}
	s.mu.Unlock()
	if from <= to {
		s.log.Error("event spool: events are damaged on disk", slog.Uint64("from", from), slog.Uint64("to", to))
		s.lose(LostCorrupt, to-from+1, 0)
	}
}

// Ack says that every event up to seq has arrived where it was to go; segments without others are removed. An older or
// equal number changes nothing. Errors: a number that is not on disk; the disk's, when Ack is remembered in memory only.
// Durability: survives kill -9 when it returns nil; after a power cut a few events may be handed out again.
func (s *Spool) Ack(seq uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seq > s.last {
		return &refusal.Error{
			Kind: refusal.Invalid, Code: "ack-ahead", What: fmt.Sprintf("acknowledgement of event %d", seq),
			Why: fmt.Sprintf("the last event is %d", s.last), Do: "acknowledge only what was handed out",
		}
	}
	if seq <= s.state.Acked {
		return nil
	}
	s.meter.Count("spool_acked", int64(seq-s.state.Acked))
	s.state.Acked = seq
	s.removeAcked()
	if err := s.saveState(false); err != nil {
		return fmt.Errorf("acknowledge events: %w", err)
	}
	return nil
}

// removeAcked removes the segments before the last one whose events are all acknowledged.
func (s *Spool) removeAcked() {
	for len(s.segments) > 1 && s.segments[1].first <= s.state.Acked+1 {
		if err := os.Remove(s.segments[0].path); err != nil && !os.IsNotExist(err) {
			s.log.Warn("event spool: cannot remove a segment", slog.String("path", s.segments[0].path), slog.Any("error", err))
			return
		}
		s.bytes -= s.segments[0].size
		s.segments = s.segments[1:]
		s.speak()
	}
}

// recover takes up what the last process left: it finds the end of the last segment, cuts off what was written by halves,
// and counts what a kill may have lost.
func (s *Spool) recover(fresh bool) error {
	segments, err := listSegments(s.dir)
	if err != nil {
		return err
	}
	s.last = s.state.Acked
	for len(segments) > 0 {
		tail := &segments[len(segments)-1]
		f, err := os.OpenFile(tail.path, os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		end, last, err := endOf(f, tail.size)
		if err != nil {
			_ = f.Close()
			return err
		}
		if end < tail.size {
			s.log.Warn("event spool: cut off a torn end", slog.String("path", tail.path), slog.Int64("bytes", tail.size-end))
			s.lose(LostTorn, 1, 0)
			if err := f.Truncate(end); err != nil {
				_ = f.Close()
				return err
			}
			tail.size = end
		}
		if end > 0 {
			s.active = f
			s.last = max(s.last, last)
			break
		}
		_ = f.Close()
		if err := os.Remove(tail.path); err != nil {
			return err
		}
		s.last = max(s.last, tail.first-1)
		segments = segments[:len(segments)-1]
	}
	s.segments, s.synced = segments, s.last
	for _, seg := range segments {
		s.bytes += seg.size
	}
	s.removeAcked()
	if !fresh && !s.state.Clean {
		s.lose(LostUnclean, 0, 2*MaxPending) // a channel full, and a batch on its way to the disk
	}
	s.state.Clean = false
	return s.saveState(true)
}

// endOf returns the offset behind the last whole frame and its number.
func endOf(f *os.File, size int64) (end int64, last uint64, err error) {
	end, err = scan(f, 0, size, func(fr frame, _ int64) bool {
		last = fr.seq
		return true
	})
	return end, last, err
}
