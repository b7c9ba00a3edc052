package attest

// For tests of what cannot be seen from outside.
const (
	MaxParents  = maxParents
	MaxReadings = maxReadings
	MaxLabels   = maxLabels
	MaxHashes   = maxHashes
	MaxSlow     = maxSlowFiles
)

// Between sets what happens after the facts were read and before they are checked again.
func (a *Attestor) Between(f func()) { a.between = f }

// Hang takes all places for slow files until the returned function is called.
func (a *Attestor) Hang() (free func()) {
	for range maxSlowFiles {
		a.slow <- struct{}{}
	}
	return func() {
		for range maxSlowFiles {
			<-a.slow
		}
	}
}

// Hashes returns how many executables are remembered.
func (a *Attestor) Hashes() int { return len(a.hashes.items) }

// Bounded puts n numbers into a bounded map of this limit and returns how many stay and how many had to go.
func Bounded(limit, n int) (stay, gone int) {
	b := newBounded[int, int](limit)
	for i := range n {
		if b.put(i, i) {
			gone++
		}
	}
	if _, ok := b.get(n - 1); !ok {
		return -1, gone
	}
	return len(b.items), gone
}
