package workload

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/redoubtsec/redoubt/refusal"
)

// prefaceBytes is what a client has sent at least once its handshake is over: the HTTP/2 connection preface and the
// header of a SETTINGS frame. Source: RFC 9113, section 3.4.
const prefaceBytes = 24 + 9

// refusedLinger is how long a refused connection stays open to be told why.
const refusedLinger = time.Second

// turnAwayTimeout bounds the write of a GOAWAY; the buffer of a new socket has room for it.
const turnAwayTimeout = 20 * time.Millisecond

// listener lets connections through the gate before gRPC sees them.
type listener struct {
	net.Listener
	server *Server
}

// Accept returns the next connection that has a place, or one of the few that are told why they have none.
func (l *listener) Accept() (net.Conn, error) {
	s := l.server
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		accepted := sinceBoot()
		uc, ok := raw.(*net.UnixConn)
		if !ok {
			_ = raw.Close()
			return nil, errors.New("accept: not a unix connection")
		}
		pid, uid, err := peerIDs(uc)
		if err != nil {
			s.meter.Count("workloadapi_refused", 1, "reason", "credentials")
			_ = raw.Close()
			continue
		}
		c := &conn{UnixConn: uc, server: s, accepted: accepted, pid: pid, uid: uid, gone: make(chan struct{})}
		bound, refused := s.gate.enter(pid, uid)
		if refused == nil {
			s.meter.Count("workloadapi_connections", 1)
			return c, nil
		}
		s.meter.Count("workloadapi_refused", 1, "reason", bound)
		if s.gate.refuse() {
			c.refused, c.overfull = refused, true
			return c, nil
		}
		_ = uc.SetWriteDeadline(time.Now().Add(turnAwayTimeout))
		_, _ = uc.Write(goAway(refused)) // whoever does not read it is closed all the same
		_ = uc.Close()
	}
}

// conn is one connection and who made it.
type conn struct {
	*net.UnixConn
	server   *Server
	accepted time.Duration // since boot
	pid      int           // at connect; for the bounds only
	uid      uint32
	refused  *refusal.Error // set before gRPC sees the connection or in its handshake; nil if it is served
	overfull bool           // refused by the gate: has none of its places
	caller   *Caller        // set in the handshake
	gone     chan struct{}  // closed when the caller has ended
	streams  atomic.Int64   // calls in progress
	read     atomic.Int64   // bytes
	linger   atomic.Pointer[time.Timer]
	close    sync.Once
}

// Read counts what the client has sent.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.UnixConn.Read(b)
	c.read.Add(int64(n))
	return n, err
}

// Close closes the connection and gives its place back, once.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.close.Do(func() {
		err = c.UnixConn.Close()
		if t := c.linger.Load(); t != nil {
			t.Stop()
		}
		if c.caller != nil {
			_ = c.caller.Close()
		}
		if c.overfull {
			c.server.gate.refused()
			return
		}
		c.server.gate.leave(c.pid, c.uid)
		if c.read.Load() < prefaceBytes {
			c.server.meter.Count("workloadapi_refused", 1, "reason", "handshake")
		}
	})
	return err
}

// closeAfter closes the connection when d has passed.
func (c *conn) closeAfter(d time.Duration) {
	c.linger.Store(time.AfterFunc(d, func() { _ = c.Close() }))
}

// kernelCredentials are gRPC transport credentials for which the kernel vouches: who the peer of a unix socket is.
type kernelCredentials struct {
	server  *Server
	root    string          // the unified hierarchy
	callers *sync.WaitGroup // the goroutines that wait for callers to end
}

// callerInfo is what gRPC carries to the handlers.
type callerInfo struct {
	credentials.CommonAuthInfo
	conn *conn
}

// AuthType implements credentials.AuthInfo.
func (callerInfo) AuthType() string { return "kernel" }

// ServerHandshake identifies the caller. One that cannot be identified is kept for a moment, to be told why.
func (k kernelCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("handshake: not a connection of this server")
	}
	if c.refused == nil {
		k.identify(c)
	}
	if c.refused != nil {
		c.closeAfter(refusedLinger)
	}
	return c, callerInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c}, nil
}

func (k kernelCredentials) identify(c *conn) {
	s := k.server
	caller, err := Identify(c.UnixConn, Options{CgroupRoot: k.root, Method: s.config.Method, Accepted: c.accepted})
	if err != nil {
		if c.refused = refusal.As(err); c.refused == nil {
			c.refused = s.internal(context.Background(), "identify caller", err)
		}
		s.meter.Count("workloadapi_refused", 1, "reason", c.refused.Code)
		return
	}
	c.caller = caller
	k.callers.Go(func() {
		caller.Wait()
		close(c.gone)
		c.closeAfter(farewell) // streams say why they end; then whoever holds the socket has no use of it
	})
}

// ClientHandshake is not for servers.
func (kernelCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("kernel credentials are a server's")
}

// Info implements credentials.TransportCredentials.
func (kernelCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "kernel"}
}

// Clone implements credentials.TransportCredentials.
func (k kernelCredentials) Clone() credentials.TransportCredentials { return k }

// OverrideServerName implements credentials.TransportCredentials.
func (kernelCredentials) OverrideServerName(string) error { return nil }
