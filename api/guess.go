package api

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds on wrong credentials. A right one is never held up: 256 random bits are not guessed, so the limit is there
// to keep guessing from costing anything, and must not let whoever shares an address with the operator lock them out.
const (
	guessBurst   = 10                       // wrong credentials a source may send at once
	guessRefill  = 6 * time.Second          // and then one in this time
	maxSources   = 4096                     // sources told apart; all others share one allowance
	sourceIdle   = guessBurst * guessRefill // after which an allowance is full again, and forgotten
	unixSource   = "unix"
	otherSources = "other"
)

// guesses holds each source of wrong credentials to its allowance (a token bucket).
//
// Concurrency: safe.
type guesses struct {
	now func() time.Time

	mu      sync.Mutex
	sources map[string]time.Time // guarded by mu: when the allowance is full again (GCRA's theoretical arrival time)
}

func newGuesses(now func() time.Time) *guesses {
	return &guesses{now: now, sources: map[string]time.Time{}}
}

// wrong counts a wrong credential of a source and returns the refusal for it: wrong while the source has any of its
// allowance left, and too-many-wrong-credentials after that.
func (g *guesses) wrong(source string, wrong error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	if _, known := g.sources[source]; !known && len(g.sources) >= maxSources {
		for s, full := range g.sources {
			if !full.After(now) {
				delete(g.sources, s)
			}
		}
		if len(g.sources) >= maxSources {
			source = otherSources
		}
	}
	full := g.sources[source]
	if full.Before(now) {
		full = now
	}
	full = full.Add(guessRefill)
	if full.Sub(now) > sourceIdle {
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: codeGuessing, What: "the credential", Why: "too many wrong ones came from this address",
			Do: "wait a minute; the right credential is accepted at any time",
		}
	}
	g.sources[source] = full
	return wrong
}

// sourceOf names where a request comes from: its address, of IPv6 the /64, since whoever has one address of it has all.
func sourceOf(r *http.Request) string { return sourceOfAddr(r.RemoteAddr) }

func sourceOfAddr(remote string) string {
	addr, ok := parseAddr(remote)
	if !ok {
		return unixSource
	}
	if addr.Is6() {
		if p, err := addr.Prefix(64); err == nil {
			return p.String()
		}
	}
	return addr.String()
}

// addrOf returns the caller's IP address; a unix socket has none. Headers that claim another one are not believed.
func addrOf(r *http.Request) (netip.Addr, bool) { return parseAddr(r.RemoteAddr) }

func parseAddr(remote string) (netip.Addr, bool) {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}, false
	}
	return addr.WithZone("").Unmap(), true
}
