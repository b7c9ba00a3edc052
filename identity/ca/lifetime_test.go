package ca

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// TestAChildNeverOutlivesItsParent is the property that every lifetime of this room rests on, for any parent, clock
// and lifetime asked: either a refusal, or a child within its parent that lives for at least what was said to be of use.
func TestAChildNeverOutlivesItsParent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	base := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	signed := 0
	for range 200_000 {
		parent := span{notBefore: base, notAfter: base.Add(time.Duration(r.Int64N(int64(40 * 24 * time.Hour))).Truncate(time.Second))}
		now := base.Add(time.Duration(r.Int64N(int64(44*24*time.Hour))) - 2*24*time.Hour)
		ttl := MinTTL + time.Duration(r.Int64N(int64(48*time.Hour)))
		least := time.Duration(r.Int64N(int64(ttl)))
		child, err := within(parent, now, ttl, least, "child", "parent")
		if err != nil {
			if refusal.As(err) == nil || child != (span{}) {
				t.Fatalf("seed %d: %v with %v", seed, err, child)
			}
			continue
		}
		signed++
		from := now.Truncate(time.Second)
		switch {
		case child.notAfter.After(parent.notAfter):
			t.Fatalf("seed %d: a child to %s outlives its parent to %s", seed, child.notAfter, parent.notAfter)
		case child.notBefore.Before(parent.notBefore):
			t.Fatalf("seed %d: a child from %s begins before its parent, %s", seed, child.notBefore, parent.notBefore)
		case child.notAfter.Sub(from) < least || child.notAfter.Sub(from) > ttl:
			t.Fatalf("seed %d: a child of %s, where %s to %s was right", seed, child.notAfter.Sub(from), least, ttl)
		case !child.holds(from) || from.Sub(child.notBefore) > Backdate:
			t.Fatalf("seed %d: a child from %s, signed at %s", seed, child.notBefore, from)
		case child.notAfter.Nanosecond() != 0 || child.notBefore.Nanosecond() != 0:
			t.Fatalf("seed %d: parts of a second, which X.509 has not", seed)
		}
	}
	if signed < 1000 {
		t.Errorf("only %d children were signed: the property was hardly tried", signed)
	}
}

// TestLifetimesThatPassCanRotate takes any configuration: either it is refused, or an SVID of the longest life that is
// signed with the old key at the last moment before the next one takes over still fits.
func TestLifetimesThatPassCanRotate(t *testing.T) {
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 2))
	some := func(most time.Duration) time.Duration { return time.Duration(r.Int64N(int64(most))) }
	passed := 0
	for range 100_000 {
		c := Config{
			SVIDTTL: some(48 * time.Hour), AgentTTL: some(96 * time.Hour), JWTTTL: some(time.Hour),
			IssuingTTL: some(60 * 24 * time.Hour), RootTTL: some(365 * 24 * time.Hour), RefreshHint: some(6 * time.Hour),
		}
		if err := c.checkLifetimes(); err != nil {
			if e := refusal.As(err); e == nil || e.Code != ErrLifetimes.Code {
				t.Fatal(err)
			}
			continue
		}
		passed++
		longest := max(c.SVIDTTL, c.AgentTTL, c.JWTTTL)
		takesOver := c.IssuingTTL/2 + maxNap + c.RefreshHint + maxNap // prepared a nap late, activated a nap late
		if c.IssuingTTL-takesOver < longest {
			t.Fatalf("%+v: the last SVID of an issuing key is cut short", c)
		}
		if c.IssuingTTL < c.leastIssuing() || c.RootTTL < 2*c.IssuingTTL {
			t.Fatalf("%+v: a key could never be activated", c)
		}
	}
	if passed < 1000 {
		t.Errorf("only %d configurations passed: the property was hardly tried", passed)
	}
}

func TestTheDefaultsPass(t *testing.T) {
	var c Config
	if err := c.checkLifetimes(); err != nil {
		t.Fatal(err)
	}
	if c.SVIDTTL != time.Hour || c.AgentTTL != 24*time.Hour || c.JWTTTL != 5*time.Minute || c.IssuingTTL != 30*24*time.Hour {
		t.Errorf("%+v", c)
	}
	long := Config{SVIDTTL: 30 * time.Hour} // alone: the agents' follows it
	if err := long.checkLifetimes(); err != nil || long.AgentTTL != 30*time.Hour {
		t.Errorf("%v, %+v", err, long)
	}
}
