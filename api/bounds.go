package api

import (
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of connections, for [Bound].
const (
	maxStreams     = 64  // requests at once on one HTTP/2 connection
	maxConnections = 512 // descriptors that the API may hold: the agents need the rest
	maxPerSource   = 64  // of them, connections of one address (of IPv6: one /64)
)

// Bound sets the limits of an HTTP server that the API relies on: how long and how large a request's headers may be,
// how long a connection may idle, how many requests one connection and how many connections one address may have. A
// connection too many is closed at once; eight addresses that keep theirs open can still take all of them, so do not offer
// the API to networks that have no business with it. Bodies and answers have limits of their own within the API, so that
// a stream of events is not cut off.
//
// s.ConnState, if it is set already, is still called.
func Bound(s *http.Server) {
	s.ReadHeaderTimeout = 10 * time.Second
	s.IdleTimeout = 2 * time.Minute
	s.MaxHeaderBytes = 16 << 10
	s.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams: maxStreams,
		SendPingTimeout:      30 * time.Second, PingTimeout: 15 * time.Second, // one whose other end is gone
		WriteByteTimeout: answerTime, // one that takes nothing at all
	}
	c := &connections{of: map[net.Conn]string{}, sources: map[string]int{}}
	next := s.ConnState
	s.ConnState = func(conn net.Conn, state http.ConnState) {
		c.changed(conn, state)
		if next != nil {
			next(conn, state)
		}
	}
}

// connections counts those of a server by where they come from.
//
// Concurrency: safe.
type connections struct {
	mu      sync.Mutex
	of      map[net.Conn]string // guarded by mu: source of each that is open
	sources map[string]int      // guarded by mu
}

// changed follows a connection, and closes a new one if there are too many. A unix socket is not counted.
func (c *connections) changed(conn net.Conn, state http.ConnState) {
	source := sourceOfAddr(conn.RemoteAddr().String())
	if source == unixSource {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		if len(c.of) >= maxConnections || c.sources[source] >= maxPerSource {
			_ = conn.Close() // nobody is told: it has not said a word
			return
		}
		c.of[conn] = source
		c.sources[source]++
	case http.StateClosed, http.StateHijacked:
		if _, ok := c.of[conn]; !ok {
			return
		}
		delete(c.of, conn)
		if c.sources[source]--; c.sources[source] == 0 {
			delete(c.sources, source)
		}
	default:
	}
}

// places is room for work that goes on at once.
type places chan struct{}

// take returns what gives the place back, which may be called more than once. Errors: a refusal, if there is none free.
func (p places) take() (leave func(), err error) {
	select {
	case p <- struct{}{}:
		return sync.OnceFunc(func() { <-p }), nil
	default:
		return func() {}, &refusal.Error{
			Kind: refusal.Unavailable, Code: codeBusy, What: "the request", Why: "as many are in work as this server takes on",
			Do: "try again shortly",
		}
	}
}
