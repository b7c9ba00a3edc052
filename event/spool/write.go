package spool

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/event"
)

// noteRetry is how long notes of losses are held back once there was no room for an event: notes are small, and would
// fill the last of it.
const noteRetry = 10 * time.Second

// Run writes what is emitted until ctx ends, and then what is left in memory. It returns nil; what the disk refuses is
// lost and counted, as there is nobody to stop for it.
func (s *Spool) Run(ctx context.Context) error {
	tick := time.NewTicker(s.config.SyncEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.drain()
			s.mu.Lock()
			defer s.mu.Unlock()
			_ = s.sync() // logged; Close reports it
			return nil
		case payload := <-s.in:
			s.write(s.batch(payload))
		case <-s.wake:
			s.write(nil)
		case <-tick.C:
			s.write(nil) // losses that could not be told yet
			s.mu.Lock()
			_ = s.sync()           // logged
			_ = s.saveState(false) // logged
			s.mu.Unlock()
		}
	}
}

// batch returns first and what else is in memory now.
func (s *Spool) batch(first []byte) [][]byte {
	s.pendingBytes.Add(-int64(len(first)))
	batch := [][]byte{first}
	for len(batch) < MaxPending {
		select {
		case p := <-s.in:
			s.pendingBytes.Add(-int64(len(p)))
			batch = append(batch, p)
		default:
			return batch
		}
	}
	return batch
}

// drain writes what is in memory now.
func (s *Spool) drain() {
	for {
		select {
		case p := <-s.in:
			s.write(s.batch(p))
		default:
			s.write(nil)
			return
		}
	}
}

// write appends the losses that are to be told, and the events.
func (s *Spool) write(batch [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var told map[Reason]*loss
	if time.Now().After(s.mute) {
		told = s.takeLosses()
	}
	rows := make([][]byte, 0, len(told)+len(batch))
	for _, reason := range slices.Sorted(maps.Keys(told)) {
		rows = append(rows, lossNote(reason, told[reason]))
	}
	notes := len(rows)
	rows = append(rows, batch...)
	done, reason := s.append(rows)
	if done > 0 {
		s.meter.Count("spool_events", int64(done))
		close(s.arrived)
		s.arrived = make(chan struct{})
		s.speak()
	}
	if notes > 0 && done >= notes {
		_ = s.saveState(false) // logged; without it a killed process would tell them twice
	}
	if done == len(rows) {
		return
	}
	// Notes that were not written are told later, when there is room for more than them; events that were not are lost.
	s.mute = time.Now().Add(noteRetry)
	for i, r := range slices.Sorted(maps.Keys(told)) {
		if i >= done {
			s.returnLoss(r, told[r])
		}
	}
	if n := len(rows) - max(done, notes); n > 0 {
		s.lose(reason, uint64(n), 0)
	}
}

// append writes rows as frames, from s.last+1 on, and returns how many are on disk and why not all.
func (s *Spool) append(rows [][]byte) (done int, reason Reason) {
	for done < len(rows) {
		if s.active == nil || s.fresh || s.tail().size+int64(frameHeader+len(rows[done])) > s.config.SegmentBytes {
			if s.bytes >= s.config.MaxBytes {
				return done, LostFull
			}
			if err := s.rotate(); err != nil {
				s.refusedBy("begin a segment", err)
				return done, LostDisk
			}
		}
		var buf []byte
		n := 0
		for _, row := range rows[done:] {
			size := int64(len(buf) + frameHeader + len(row))
			if n > 0 && s.tail().size+size > s.config.SegmentBytes {
				break
			}
			if s.bytes+size > s.config.MaxBytes {
				reason = LostFull
				break
			}
			buf = appendFrame(buf, s.last+uint64(n)+1, row)
			n++
		}
		if n == 0 {
			return done, reason
		}
		if _, err := s.active.WriteAt(buf, s.tail().size); err != nil {
			s.refusedBy("write", err)
			if terr := s.active.Truncate(s.tail().size); terr != nil {
				s.fresh = true // half a frame stays behind; the reader steps over it
			}
			return done, LostDisk
		}
		s.failing = false
		s.tail().size += int64(len(buf))
		s.bytes += int64(len(buf))
		s.last += uint64(n)
		done += n
	}
	return done, ""
}

// speak lets losses be told again: there is room.
func (s *Spool) speak() {
	s.mute = time.Time{}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *Spool) tail() *segment { return &s.segments[len(s.segments)-1] }

// rotate syncs the active segment and begins the next. On an error the active one stays.
func (s *Spool) rotate() error {
	if err := s.sync(); err != nil {
		return err
	}
	next := segment{path: segmentPath(s.dir, s.last+1), first: s.last + 1}
	if len(s.segments) > 0 && s.tail().first == next.first {
		if err := s.active.Truncate(0); err != nil { // its first write failed by halves, and could not be undone then
			return err
		}
		s.fresh = false
		return nil
	}
	f, err := os.OpenFile(next.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := syncDir(s.dir); err != nil {
		_ = f.Close()
		_ = os.Remove(next.path)
		return err
	}
	if s.active != nil {
		_ = s.active.Close() // synced above
	}
	s.active, s.fresh = f, false
	s.segments = append(s.segments, next)
	return nil
}

// sync makes what is written safe from a power cut.
func (s *Spool) sync() error {
	if s.active == nil || s.synced == s.last {
		return nil
	}
	if err := s.active.Sync(); err != nil {
		// What the kernel could not write it has given up: it is handed out from memory while that lasts, and never
		// written behind.
		s.meter.Count("spool_sync_failed", 1)
		s.refusedBy("sync", err)
		s.synced, s.fresh = s.last, true
		return err
	}
	s.synced = s.last
	return nil
}

func (s *Spool) refusedBy(doing string, err error) {
	if !s.failing {
		s.log.Error("event spool: the disk refuses events; they are lost and counted until it takes them",
			slog.String("doing", doing), slog.String("dir", s.dir), slog.Any("error", err))
	}
	s.failing = true
}

// takeLosses returns what is to be told and forgets it.
func (s *Spool) takeLosses() map[Reason]*loss {
	s.lossMu.Lock()
	defer s.lossMu.Unlock()
	if len(s.losses) == 0 {
		return nil
	}
	told := s.losses
	s.losses = map[Reason]*loss{}
	return told
}

func (s *Spool) returnLoss(reason Reason, l *loss) {
	s.lossMu.Lock()
	defer s.lossMu.Unlock()
	if newer := s.losses[reason]; newer != nil {
		l.Count += newer.Count
		l.AtMost += newer.AtMost
	}
	s.losses[reason] = l
}

// lossNote renders the event that tells of a loss.
func lossNote(reason Reason, l *loss) []byte {
	e := event.New(event.Control, KindLost)
	e.Attrs = map[string]any{"reason": string(reason), "count": l.Count, "since": l.Since.Format(time.RFC3339)}
	e.Message = fmt.Sprintf("%d events were lost: %s", l.Count, reason)
	if l.AtMost > 0 {
		e.Attrs["at_most"] = l.Count + l.AtMost
		e.Message = fmt.Sprintf("events were lost, at most %d: %s", l.Count+l.AtMost, reason)
	}
	b, err := json.Marshal(e)
	if err != nil {
		return []byte("{}") // unreachable: strings and numbers
	}
	return b
}

// saveState writes what the spool remembers, losses not yet told included.
func (s *Spool) saveState(durable bool) error {
	s.lossMu.Lock()
	s.state.Losses = make(map[Reason]*loss, len(s.losses))
	for reason, l := range s.losses {
		copied := *l
		s.state.Losses[reason] = &copied
	}
	s.lossMu.Unlock()
	s.state.Generation++
	err := writeState(s.file, s.state)
	if err == nil && durable {
		err = s.file.Sync()
	}
	if err != nil {
		s.refusedBy("write its state", err)
	}
	return err
}
