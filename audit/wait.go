package audit

import (
	"context"
	"fmt"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// waiter is what the callers that wait for one record share.
type waiter struct {
	done  chan struct{} // closed when index or err is set
	index uint64        // written once, before done is closed
	err   error         // likewise
	users int           // guarded by Log.mu
}

// Notify tells the sequencer that the outbox has something new. It never blocks.
func (l *Log) Notify() {
	select {
	case l.wake <- struct{}{}:
	default: // a notice waits already
	}
}

// Wait returns the index of a record once it is durably in the log (integrated; its checkpoint follows soon). The
// management API answers a change only after that.
//
// Errors: ctx's; [ErrDiskFull] at once when the log cannot be written; [ErrWaiters] beyond [MaxWaiters]; [ErrNotLogged]
// after Config.MaxWait or when the log stops. In every case the change stands, and its leaf is logged when that is
// possible again.
func (l *Log) Wait(ctx context.Context, recordID string) (uint64, error) {
	w, err := l.join(recordID)
	if err != nil {
		return 0, err
	}
	defer l.leave(recordID, w)
	// The order matters: a record marked before join is found here, one marked after it wakes w.
	switch index, ok, err := l.cfg.Outbox.Placed(ctx, recordID); {
	case err != nil:
		return 0, fmt.Errorf("audit outbox: %w", err)
	case ok:
		return index, nil
	}
	l.Notify()
	timer := time.NewTimer(l.cfg.MaxWait)
	defer timer.Stop()
	select {
	case <-w.done:
		return w.index, w.err
	case <-ctx.Done():
		l.cfg.Meter.Count("audit_wait_refused", 1, "reason", "cancelled")
		return 0, ctx.Err()
	case <-timer.C:
		return 0, l.notLogged(fmt.Sprintf("it was not in the log after %s", l.cfg.MaxWait))
	case <-l.stopped:
		return 0, l.notLogged("the log has stopped")
	}
}

func (l *Log) notLogged(why string) error {
	l.cfg.Meter.Count("audit_wait_refused", 1, "reason", ErrNotLogged.Code)
	l.mu.Lock()
	cause := l.failing
	l.mu.Unlock()
	return &refusal.Error{
		Kind: refusal.Unavailable, Code: ErrNotLogged.Code, What: "audit record of the change", Why: why,
		Do: "the change stands and its record will follow; look at the server's log before you repeat it", Err: cause,
	}
}

func (l *Log) join(recordID string) (*waiter, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.waiters[recordID]
	if w == nil {
		if len(l.waiters) >= MaxWaiters {
			l.cfg.Meter.Count("audit_wait_refused", 1, "reason", ErrWaiters.Code)
			return nil, &refusal.Error{
				Kind: refusal.Exhausted, Code: ErrWaiters.Code, What: "audit record of the change",
				Why: fmt.Sprintf("%d changes wait for the audit log already", MaxWaiters),
				Do:  "the change stands and its record will follow; send fewer changes at one time",
			}
		}
		w = &waiter{done: make(chan struct{})}
		l.waiters[recordID] = w
	}
	w.users++
	return w, nil
}

func (l *Log) leave(recordID string, w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.users--
	if w.users == 0 && l.waiters[recordID] == w {
		delete(l.waiters, recordID)
	}
}

// placed wakes those who wait for these entries. It is called once they are integrated and again once they are marked:
// whoever joined in between saw no mark.
func (l *Log) placed(entries []Entry, indexes []uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range entries {
		if w := l.waiters[e.RecordID]; w != nil {
			w.index = indexes[i]
			close(w.done)
			delete(l.waiters, e.RecordID)
		}
	}
}

// setFailing keeps why rounds fail, and sends those who wait away when waiting is of no use.
func (l *Log) setFailing(err error) (changed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	changed = (err == nil) != (l.failing == nil) || isFull(err) != isFull(l.failing)
	l.failing = err
	if isFull(err) {
		for id, w := range l.waiters {
			w.err = diskFull("audit record of the change", err)
			close(w.done)
			delete(l.waiters, id)
			l.cfg.Meter.Count("audit_wait_refused", 1, "reason", ErrDiskFull.Code)
		}
	}
	return changed
}

func (l *Log) setBacklog(n int) {
	l.mu.Lock()
	l.backlog = n
	l.mu.Unlock()
}
