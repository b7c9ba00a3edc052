package attest

import (
	"sync"
	"time"
)

// bounded is a map of at most limit entries: the oldest makes room.
//
// Concurrency: safe.
type bounded[K comparable, V any] struct {
	limit int

	mu    sync.Mutex
	items map[K]V
	order []K // oldest first; guarded by mu, as items is
}

func newBounded[K comparable, V any](limit int) *bounded[K, V] {
	return &bounded[K, V]{limit: limit, items: map[K]V{}}
}

func (b *bounded[K, V]) get(key K) (V, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	v, ok := b.items[key]
	return v, ok
}

// put reports whether another entry had to go.
func (b *bounded[K, V]) put(key K, value V) (evicted bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.items[key]; !ok {
		if len(b.order) >= b.limit {
			delete(b.items, b.order[0])
			b.order = append(b.order[:0], b.order[1:]...)
			evicted = true
		}
		b.order = append(b.order, key)
	}
	b.items[key] = value
	return evicted
}

// restUntil leaves an engine alone for a while after it did not answer, so that a hung one is not waited for again and
// again.
//
// Concurrency: safe.
type restUntil struct {
	mu    sync.Mutex
	until time.Time // guarded by mu
}

func (r *restUntil) resting() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.until)
}

func (r *restUntil) rest(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.until = time.Now().Add(d)
}
