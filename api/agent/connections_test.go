package agent

import (
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redoubtsec/redoubt/event"
)

func TestDescriptorsAreLeftForTheRest(t *testing.T) {
	for have, want := range map[uint64]int{
		0: DefaultMaxConnections, 1 << 40: DefaultMaxConnections, 1<<64 - 1: DefaultMaxConnections,
		20_000: 18_976, 1_024: 512, 2_048: 1_024, 3_000: 1_976, 1: 1,
	} {
		if got := roomFor(have); got != want {
			t.Errorf("of %d: %d, want %d", have, got, want)
		}
	}
}

// placed is a connection from this source that has a place.
func placed(t *testing.T, in *connections, source string) *held {
	t.Helper()
	here, there := net.Pipe()
	t.Cleanup(func() { _ = there.Close() })
	h := &held{Conn: here, in: in, source: source}
	if refused := in.add(h); refused != "" {
		t.Fatalf("refused: %s", refused)
	}
	return h
}

func TestPlacesOfConnections(t *testing.T) {
	in := newConnections(nil, event.NoMeter, 1_100, time.Minute)
	var all []*held
	for i := range maxAnonymousConnections {
		all = append(all, placed(t, in, fmt.Sprint("s", i/maxAnonymousPerSource)))
		if i == maxAnonymousPerSource {
			if got := in.add(&held{in: in, source: "s0"}); got != "source" {
				t.Errorf("one too many of an address: %q", got)
			}
		}
	}
	if got := in.add(&held{in: in, source: "other"}); got != "anonymous" {
		t.Errorf("one too many in all: %q", got)
	}
	for i := range maxPerMachine {
		if !all[i].proven("m1") {
			t.Errorf("connection %d of a machine is refused", i+1)
		}
	}
	if all[maxPerMachine].proven("m1") {
		t.Error("one too many of a machine has a place")
	}
	for range maxPerMachine { // what machines hold no longer counts as nobody's
		all = append(all, placed(t, in, "other"))
	}
	for i := range 1_100 - in.all {
		all = append(all, placed(t, in, fmt.Sprint("more", i)))
		all[len(all)-1].proven(fmt.Sprint("n", i))
	}
	if got := in.add(&held{in: in, source: "last"}); got != "all" {
		t.Errorf("one too many altogether: %q", got)
	}
	for _, h := range all {
		_ = h.Close()
		_ = h.Close()
	}
	if in.all != 0 || in.anonymous != 0 || len(in.sources) != 0 || len(in.machines) != 0 {
		t.Errorf("places are not given back: %d %d %v %v", in.all, in.anonymous, in.sources, in.machines)
	}
}

func TestNobodyKeepsAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := newConnections(nil, event.NoMeter, 10, provenWithin)
		idle, joins, hangs, machine := placed(t, in, "a"), placed(t, in, "a"), placed(t, in, "a"), placed(t, in, "a")
		for _, h := range []*held{idle, joins, hangs, machine} {
			h.handshaken()
		}
		machine.proven("m1")
		done := joins.join()
		hangs.join() // and never ends
		at := func(after time.Duration, want string) {
			t.Helper()
			time.Sleep(after)
			synctest.Wait()
			in.mu.Lock()
			defer in.mu.Unlock()
			if got := fmt.Sprint(idle.closed, joins.closed, hangs.closed, machine.closed); got != want {
				t.Errorf("closed: %s, want %s", got, want)
			}
		}
		at(provenWithin-time.Millisecond, "false false false false")
		at(2*time.Millisecond, "true false false false")
		at(10*time.Second, "true false false false")
		done()
		at(900*time.Millisecond, "true false false false") // the answer may still be on its way
		at(1200*time.Millisecond, "true true false false")
		at(callWithin-10*time.Second, "true true true false")
		at(time.Hour, "true true true false")
	})
}

func TestSourcesOfConnections(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:4": "192.0.2.1", "[::ffff:192.0.2.1]:4": "192.0.2.1", "[2001:db8:1:2:3:4:5:6]:7": "2001:db8:1:2::/64",
		"[fe80::1%lo]:7": "fe80::/64",
	} {
		a, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if got := sourceOf(a); got != want {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}
