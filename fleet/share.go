package fleet

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// Share is how many events of one machine are kept.
type Share struct {
	Machine           string
	Decisions, Others int
}

// The terms on which machines share the events that are kept, and the store's time.
const (
	// EventRate and EventBurst bound how many events a second are taken from one agent, in the long run and at once.
	EventRate  = 2_000
	EventBurst = 20_000

	serverShare = 8 // one of so many of the events kept is the server's, whatever machines send
	trimAtLeast = 64
	paceFor     = time.Second // how long a batch that comes too soon is kept waiting rather than refused
)

// Weight is what a machine's share counts when the heaviest is looked for. What is reserved for the server does not count.
func (s Share) Weight(reserve int) int {
	if s.Machine == ServerMachine {
		return s.Decisions + s.Others - reserve
	}
	return s.Decisions + s.Others
}

// Cut says what a store trims of the heaviest share when excess events are too many and second is the weight of the next
// heaviest: whether decisions or other events, whichever are more, so that neither drives out the other; and how many.
func (s Share) Cut(reserve, second, excess int) (decisions bool, n int) {
	more, less := s.Others, s.Decisions
	if decisions = less > more; decisions {
		more, less = less, more
	}
	n = max(min(s.Weight(reserve)-second, more-less), trimAtLeast) // a few at least: it is done step by step
	return decisions, min(n, more, excess)
}

func (f *Fleet) trim(ctx context.Context, events EventStore, limit int) (int, error) {
	n, err := events.Trim(ctx, f.cfg.KeepEvents, f.cfg.KeepEvents/serverShare, limit)
	f.meter.Count("fleet_events_trimmed", int64(n))
	return n, err
}

// bucket is what an agent may still send; it fills with [EventRate] up to [EventBurst]. Below zero: somebody waits.
type bucket struct {
	left float64
	at   time.Time
}

// pace makes an agent that sends events too fast wait or, if it should wait too long, refuses: it tries again later.
func (f *Fleet) pace(ctx context.Context, machine string, events int) error {
	now := f.now()
	f.mu.Lock()
	b, ok := f.buckets[machine]
	if !ok {
		b = bucket{left: EventBurst, at: now}
	}
	if passed := now.Sub(b.at).Seconds(); passed > 0 {
		b.left, b.at = math.Min(EventBurst, b.left+passed*EventRate), now
	}
	wait := time.Duration((float64(events) - b.left) / EventRate * float64(time.Second))
	refused := wait > paceFor
	if !refused {
		b.left -= float64(events)
	}
	f.buckets[machine] = b // machines are bounded, and those that are quiet are left out by sweeps
	f.mu.Unlock()
	switch {
	case refused:
		f.meter.Count("fleet_events_refused", int64(events), "code", ErrEventRate.Code)
		return refuse(ErrEventRate, refusal.Exhausted, "events of machine "+machine,
			fmt.Sprintf("it sent more than %d events at once, and %d a second are taken then", EventBurst, EventRate),
			"keep them, and send them again in a while")
	case wait > 0:
		f.meter.Count("fleet_events_paced", int64(events))
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// forgetBuckets leaves out the buckets that are full again.
func (f *Fleet) forgetBuckets(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for machine, b := range f.buckets {
		if b.left+now.Sub(b.at).Seconds()*EventRate >= EventBurst {
			delete(f.buckets, machine)
		}
	}
}
