package ca

import (
	"fmt"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The fixed terms of lifetimes.
const (
	// Backdate is how long before its signing a certificate begins, for relying parties whose clock is behind.
	Backdate = time.Minute
	// Leeway is by how much the clock of a verifier of JWT-SVIDs may differ from the authority's.
	Leeway = 30 * time.Second
	// MinTTL is the shortest lifetime of anything signed: less would have expired before it arrives.
	MinTTL = 5 * time.Second
	// MaxTTL is the longest, of a root.
	MaxTTL = 100 * 365 * 24 * time.Hour

	// maxNap is the longest that Run sleeps before it looks at the clock again: timers stand still while a machine is
	// suspended, and clocks get set.
	maxNap = time.Minute
)

// span is a period of validity, both ends included, in whole seconds as X.509 has them (RFC 5280, 4.1.2.5).
type span struct{ notBefore, notAfter time.Time }

// holds reports whether t lies within the span.
func (s span) holds(t time.Time) bool { return !t.Before(s.notBefore) && !t.After(s.notAfter) }

// within computes the span of a child that is signed now, for ttl, under a parent: it never begins before its parent
// and never outlives it. A child of which less than least would be left is refused, and so is any child of a parent that
// is not valid now. Every lifetime of this room comes from here, or from [rootSpan].
func within(parent span, now time.Time, ttl, least time.Duration, child, parentName string) (span, error) {
	now = now.UTC().Truncate(time.Second)
	switch {
	case now.Before(parent.notBefore):
		return span{}, refuse(ErrNotYetValid, refusal.Unavailable, child,
			fmt.Sprintf("%s begins at %s, and the server's clock says %s", parentName, stamp(parent.notBefore), stamp(now)),
			"set the server's clock; if it is right, rotate the keys")
	case now.After(parent.notAfter):
		return span{}, refuse(ErrExpired, refusal.Unavailable, child,
			fmt.Sprintf("%s ended at %s, and the server's clock says %s", parentName, stamp(parent.notAfter), stamp(now)),
			"set the server's clock; if it is right, rotate the keys")
	}
	s := span{notBefore: later(now.Add(-Backdate), parent.notBefore), notAfter: earlier(now.Add(ttl.Truncate(time.Second)), parent.notAfter)}
	if left := s.notAfter.Sub(now); left < least {
		return span{}, refuse(ErrTooShort, refusal.Unavailable, child,
			fmt.Sprintf("%s ends at %s, which leaves %s, less than the least of use, %s", parentName, stamp(parent.notAfter), left, least),
			"rotate the keys; the server does so by itself while it runs")
	}
	return s, nil
}

// leastSVID is the shortest SVID given when ttl is asked: half of it. Less would send its holder back at once, and all
// holders together.
func leastSVID(ttl time.Duration) time.Duration { return max(MinTTL, ttl/2) }

// rootSpan is the life of a root made now.
func rootSpan(now time.Time, ttl time.Duration) span {
	now = now.UTC().Truncate(time.Second)
	return span{now.Add(-Backdate), now.Add(ttl.Truncate(time.Second))}
}

// leastIssuing is the shortest life that an issuing key may have left when it begins to sign: twice the longest SVID.
func (c *Config) leastIssuing() time.Duration { return 2 * max(c.SVIDTTL, c.AgentTTL, c.JWTTTL) }

// checkLifetimes fills in the defaults and refuses lifetimes of which the one cannot carry the other.
func (c *Config) checkLifetimes() error {
	for _, d := range []struct {
		name    string
		ttl     *time.Duration
		normal  time.Duration
		shortly time.Duration
	}{
		{"SVIDTTL", &c.SVIDTTL, DefaultSVIDTTL, MinTTL},
		{"AgentTTL", &c.AgentTTL, max(DefaultAgentTTL, c.SVIDTTL), MinTTL},
		{"JWTTTL", &c.JWTTTL, DefaultJWTTTL, MinTTL},
		{"IssuingTTL", &c.IssuingTTL, DefaultIssuingTTL, MinTTL},
		{"RootTTL", &c.RootTTL, DefaultRootTTL, MinTTL},
		{"RefreshHint", &c.RefreshHint, DefaultRefreshHint, time.Second},
	} {
		if *d.ttl == 0 {
			*d.ttl = d.normal
		}
		if *d.ttl < d.shortly || *d.ttl > MaxTTL {
			return badLifetime(d.name, fmt.Sprintf("%s is not between %s and %s", *d.ttl, d.shortly, MaxTTL))
		}
	}
	if c.AgentTTL < c.SVIDTTL {
		return badLifetime("AgentTTL", fmt.Sprintf("%s is shorter than the SVIDTTL, %s", c.AgentTTL, c.SVIDTTL))
	}
	// Rotation begins at half the life of a key and takes a refresh interval; an SVID that is signed at its end must
	// still fit.
	if need := 2 * (max(c.AgentTTL, c.JWTTTL) + c.RefreshHint + 2*maxNap); c.IssuingTTL < need {
		return badLifetime("IssuingTTL", fmt.Sprintf("%s is less than %s, twice the longest SVID and the time to rotate", c.IssuingTTL, need))
	}
	if c.RootTTL < 2*c.IssuingTTL {
		return badLifetime("RootTTL", fmt.Sprintf("%s is less than %s, two issuing keys", c.RootTTL, 2*c.IssuingTTL))
	}
	return nil
}

func badLifetime(field, why string) error {
	return refuse(ErrLifetimes, refusal.Invalid, "certificate authority, "+field, why, "make it longer, or the lifetimes that it must carry shorter")
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
