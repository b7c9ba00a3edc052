package workload

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// The default bounds. A process that uses an SVID needs one connection and two or three streams.
const (
	DefaultMaxConns           = 4096
	DefaultMaxConnsPerUser    = 1024
	DefaultMaxConnsPerProcess = 64
	DefaultMaxStreams         = 32 // per connection
	DefaultHandshakeTimeout   = 5 * time.Second
)

// The bounds that are not configured.
const (
	maxMessageBytes = 64 << 10               // of a request; the largest that is of use holds one token
	maxHeaderBytes  = 8 << 10                // of a request's metadata
	pushInterval    = 100 * time.Millisecond // between two pushes on a stream: changes in a burst are pushed once
	farewell        = 250 * time.Millisecond // from the end of a caller, or of serving, to the end of its connections
	pingEvery       = 5 * time.Minute        // so that a connection whose peer has stopped is given up
)

// Config is what a [Server] is made of. Zero values mean the defaults; only Source is needed.
type Config struct {
	Source Source
	// CgroupRoot and Method are as in [Options].
	CgroupRoot string
	Method     Method

	// MaxConns bounds the connections open at once: in total, of one user and of one process. The total is lowered to a
	// quarter of the files that this process may open, as a connection takes two; that of a user to a quarter of the
	// total, so that none can take the places of all others; that of a process to that of its user.
	MaxConns, MaxConnsPerUser, MaxConnsPerProcess int
	// MaxStreams bounds the calls in progress on one connection.
	MaxStreams int
	// HandshakeTimeout bounds the time from accept to the end of the HTTP/2 preface.
	HandshakeTimeout time.Duration

	Meter  event.Meter
	Logger *slog.Logger
}

// Server serves the SPIFFE Workload API.
//
// Concurrency: safe. Its bounds hold over all listeners that it serves.
type Server struct {
	source Source
	config Config
	meter  event.Meter
	log    *slog.Logger
	gate   *gate
}

// New returns a server; it starts nothing.
func New(c Config) *Server {
	orDefault := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	orDefault(&c.MaxConns, DefaultMaxConns)
	orDefault(&c.MaxConnsPerUser, DefaultMaxConnsPerUser)
	orDefault(&c.MaxConnsPerProcess, DefaultMaxConnsPerProcess)
	orDefault(&c.MaxStreams, DefaultMaxStreams)
	c.MaxConns = min(c.MaxConns, max(descriptors()/4, 1))
	c.MaxConnsPerUser = min(c.MaxConnsPerUser, max(c.MaxConns/4, 1))
	c.MaxConnsPerProcess = min(c.MaxConnsPerProcess, c.MaxConnsPerUser)
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{source: c.Source, config: c, meter: c.Meter, log: c.Logger, gate: newGate(c)}
}

// Serve answers the connections of ln, a unix listener, until ctx ends; then streams end with UNAVAILABLE, ln is closed,
// and Serve returns nil when the last connection is. Errors: ln is no unix listener, no unified cgroup hierarchy is
// mounted, ln fails.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	if ln.Addr().Network() != "unix" {
		return &refusal.Error{
			Kind: refusal.Invalid, Code: "not-a-unix-socket", What: "Workload API",
			Why: "a caller can be identified on a unix stream socket only, not on " + ln.Addr().Network(),
			Do:  "listen on a unix socket",
		}
	}
	root := s.config.CgroupRoot
	if root == "" {
		var err error
		if root, err = unifiedRoot(); err != nil {
			return err
		}
	}
	sv := &service{Server: s, stopping: make(chan struct{})}
	var callers sync.WaitGroup
	g := grpc.NewServer(
		grpc.Creds(kernelCredentials{server: s, root: root, callers: &callers}),
		grpc.ConnectionTimeout(s.config.HandshakeTimeout),
		grpc.MaxConcurrentStreams(uint32(s.config.MaxStreams)+1), // one more, so that one is told why it is refused
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingEvery}),
		grpc.WaitForHandlers(true),
		grpc.StatsHandler(counter{s.meter}),
		grpc.UnaryInterceptor(sv.unary),
		grpc.StreamInterceptor(sv.stream),
	)
	gen.RegisterSpiffeWorkloadAPIServer(g, sv)
	ended := make(chan struct{})
	var stopper sync.WaitGroup
	stopper.Go(func() {
		select {
		case <-ctx.Done():
			close(sv.stopping) // streams say why they end
			force := time.AfterFunc(farewell, g.Stop)
			g.GracefulStop()
			force.Stop()
		case <-ended:
		}
	})
	err := g.Serve(&listener{Listener: ln, server: s})
	close(ended)
	stopper.Wait()
	g.Stop()
	callers.Wait()
	if ctx.Err() != nil || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}
