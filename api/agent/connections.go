package agent

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/redoubtsec/redoubt/event"
)

// The bounds of connections. An agent has one or two.
const (
	maxAnonymousConnections = 1_024 // of those whose other end is not known to be a machine; handshakes included
	maxAnonymousPerSource   = 64    // of these, from one address (of IPv6: one /64)
	maxPerMachine           = 32
	reservedDescriptors     = 1_024 // for the database, the log, the management API; at most half of all

	provenWithin = 10 * time.Second          // from the handshake: to show who it is, or to join
	joinedWithin = provenWithin + callWithin // the same, of one that is joining
	idleWithin   = 10 * time.Minute          // without a call; an agent always has its streams
)

// connections bounds what a listener accepts, before and after it is known who connects. Whoever is nobody may hold few
// connections, and not for long: else they could hold every descriptor of the server. Sixteen addresses that keep coming
// back can still keep others from joining, but not put out an agent that is connected.
//
// Counters: agentapi_connections_refused by reason, agentapi_connections_unproven of those closed because nobody showed
// who they are in time.
//
// Concurrency: safe.
type connections struct {
	net.Listener
	meter event.Meter
	max   int
	prove time.Duration

	mu        sync.Mutex
	all       int            // guarded by mu
	anonymous int            // guarded by mu
	sources   map[string]int // guarded by mu: of anonymous ones
	machines  map[string]int // guarded by mu
}

func newConnections(l net.Listener, meter event.Meter, limit int, prove time.Duration) *connections {
	return &connections{Listener: l, meter: meter, max: limit, prove: prove, sources: map[string]int{}, machines: map[string]int{}}
}

// Accept implements net.Listener: a connection too many is closed at once, and counted.
func (t *connections) Accept() (net.Conn, error) {
	for {
		c, err := t.Listener.Accept()
		if err != nil {
			return nil, err
		}
		h := &held{Conn: c, in: t, source: sourceOf(c.RemoteAddr())}
		if reason := t.add(h); reason != "" {
			t.meter.Count("agentapi_connections_refused", 1, "reason", reason)
			_ = c.Close()
			continue
		}
		return h, nil
	}
}

func (t *connections) add(h *held) (refused string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.all >= t.max:
		return "all"
	case t.anonymous >= maxAnonymousConnections:
		return "anonymous"
	case t.sources[h.source] >= maxAnonymousPerSource:
		return "source"
	}
	t.all++
	t.anonymous++
	t.sources[h.source]++
	return ""
}

// held is a connection that has a place. Zero value of machine: nobody.
type held struct {
	net.Conn
	in     *connections
	source string

	// guarded by in.mu
	machine string
	joining int // calls that make it somebody, in progress
	shaken  time.Time
	timer   *time.Timer
	closed  bool
}

// Close implements net.Conn.
func (h *held) Close() error {
	h.in.mu.Lock()
	if !h.closed {
		h.closed = true
		h.in.all--
		h.leaveClass()
		if h.timer != nil {
			h.timer.Stop()
		}
	}
	h.in.mu.Unlock()
	return h.Conn.Close()
}

// leaveClass must be called with in.mu held.
func (h *held) leaveClass() {
	if h.machine != "" {
		if h.in.machines[h.machine]--; h.in.machines[h.machine] == 0 {
			delete(h.in.machines, h.machine)
		}
		return
	}
	h.in.anonymous--
	if h.in.sources[h.source]--; h.in.sources[h.source] == 0 {
		delete(h.in.sources, h.source)
	}
}

// proven says that the other end is a machine that may speak. It is false, and the connection closed, if that machine has
// too many.
func (h *held) proven(machine string) bool {
	if h == nil {
		return true
	}
	h.in.mu.Lock()
	if h.closed || h.machine != "" {
		h.in.mu.Unlock()
		return true
	}
	full := h.in.machines[machine] >= maxPerMachine
	if !full {
		h.leaveClass()
		h.machine = machine
		h.in.machines[machine]++
		if h.timer != nil {
			h.timer.Stop()
		}
	}
	h.in.mu.Unlock()
	if full {
		h.in.meter.Count("agentapi_connections_refused", 1, "reason", "machine")
		_ = h.Close()
	}
	return !full
}

// handshaken begins the time in which the other end must show who it is.
func (h *held) handshaken() {
	h.in.mu.Lock()
	defer h.in.mu.Unlock()
	if !h.closed && h.machine == "" {
		h.shaken = time.Now()
		h.timer = time.AfterFunc(h.in.prove, h.overdue)
	}
}

// overdue closes the connection unless it is somebody's by now, or about to be.
func (h *held) overdue() {
	h.in.mu.Lock()
	keep := h.closed || h.machine != ""
	if !keep && h.joining > 0 && time.Since(h.shaken) < joinedWithin {
		keep = true
		h.timer.Reset(time.Second)
	}
	h.in.mu.Unlock()
	if !keep {
		h.in.meter.Count("agentapi_connections_unproven", 1)
		_ = h.Close()
	}
}

// join says that a call is in progress which may make the other end somebody. done must be called at its end; its answer
// has a second to leave.
func (h *held) join() (done func()) {
	if h == nil {
		return func() {}
	}
	h.in.mu.Lock()
	h.joining++
	h.in.mu.Unlock()
	return func() {
		time.AfterFunc(time.Second, func() {
			h.in.mu.Lock()
			defer h.in.mu.Unlock()
			h.joining--
		})
	}
}

// sourceOf names where a connection comes from: its address, of IPv6 the /64, since whoever has one address of it has all.
func sourceOf(a net.Addr) string {
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	addr := at.Addr().WithZone("").Unmap()
	if addr.Is6() {
		return netip.PrefixFrom(addr, 64).Masked().String()
	}
	return addr.String()
}

// shown is what gRPC keeps of a handshake: what was proven in it, and the connection that it is of.
type shown struct {
	credentials.TLSInfo
	conn *held // nil: not one of ours
}

// connOf returns the connection of a call, or nil.
func connOf(ctx context.Context) *held {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(shown); ok {
			return info.conn
		}
	}
	return nil
}

// shaking is TLS, and what follows for the place that a connection holds.
type shaking struct {
	credentials.TransportCredentials
	s *Server
}

// ServerHandshake implements credentials.TransportCredentials. A certificate that is good makes the connection its machine's;
// one that is not is refused by the calls, which say why.
func (k shaking) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := k.TransportCredentials.ServerHandshake(raw)
	h, ours := raw.(*held)
	tls, isTLS := info.(credentials.TLSInfo)
	if err != nil || !ours || !isTLS {
		return conn, info, err
	}
	if c, err := k.s.verify(tls.State.PeerCertificates, false); err == nil && k.s.cfg.Fleet.Trusted(c.machine, c.spki) == nil {
		h.proven(c.machine)
	}
	h.handshaken()
	return conn, shown{tls, h}, nil
}

// Clone implements credentials.TransportCredentials.
func (k shaking) Clone() credentials.TransportCredentials {
	return shaking{k.TransportCredentials.Clone(), k.s}
}
