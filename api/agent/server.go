package agent

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// ServerConfig is what a [Server] is made of. TrustDomain, Fleet, Bundle and GetCertificate are needed.
type ServerConfig struct {
	TrustDomain identity.TrustDomain
	Fleet       *fleet.Fleet
	// Bundle returns what certificates of agents are verified against, now.
	Bundle func() *identity.Bundle
	// GetCertificate returns the server's own X509-SVID, of [fleet.ServerID]; the roots are added to it here.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	MaxConnections int           // default 20,000, or fewer if the process may not have as many files open
	MaxAnonymous   int           // calls at once without a certificate (joining); default 64
	MaxCalls       int           // calls at once of one machine, streams included; default 64
	Heartbeat      time.Duration // of idle streams; default 15 s
	Window         int           // messages that a stream may have unacknowledged; default 32
	SlowAfter      time.Duration // how long an agent may leave them so; default 30 s
	ProvenWithin   time.Duration // for a connection to show whose it is; default 10 s

	Meter  event.Meter      // nil: event.NoMeter
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now
}

// The defaults of [ServerConfig], and fixed terms.
const (
	DefaultMaxConnections = 20_000
	DefaultMaxAnonymous   = 64
	DefaultMaxCalls       = 64
	DefaultHeartbeat      = 15 * time.Second
	DefaultWindow         = 32
	DefaultSlowAfter      = 30 * time.Second

	handshakeWithin = 10 * time.Second
	callWithin      = 30 * time.Second
	drainWithin     = 5 * time.Second
	maxHeaderBytes  = 16 << 10
	deltaLimit      = 256 // changes in one message
)

// Server is the server's end of the agent API. Concurrency: safe.
type Server struct {
	agentpb.UnimplementedAgentServer
	cfg    ServerConfig
	meter  event.Meter
	log    *slog.Logger
	drain  chan struct{} // closed when Serve ends
	drainO sync.Once

	mu        sync.Mutex             // guards what follows
	anonymous int                    // calls in progress
	calls     map[string]int         // machine → calls in progress
	syncing   map[string]*supersedes // machine → its stream
	turns     map[string]*turn       // machine → whose report is being received
}

// turn lets one report of a machine at a time into memory. waiting counts those that hold or wait for it, guarded by mu.
type turn struct {
	free    chan struct{} // of one: who puts into it has the turn
	waiting int
}

// supersedes is closed when a later stream of the same machine takes the place of this one.
type supersedes struct{ gone chan struct{} }

// NewServer returns the server. It starts nothing: [Server.Serve] does. Errors: a field of cfg is missing.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.TrustDomain == "" || cfg.Fleet == nil || cfg.Bundle == nil || cfg.GetCertificate == nil {
		return nil, errors.New("agent API: ServerConfig.TrustDomain, Fleet, Bundle and GetCertificate are needed")
	}
	cfg.MaxConnections = cmp.Or(cfg.MaxConnections, roomFor(descriptors()))
	cfg.MaxAnonymous = cmp.Or(cfg.MaxAnonymous, DefaultMaxAnonymous)
	cfg.MaxCalls = cmp.Or(cfg.MaxCalls, DefaultMaxCalls)
	cfg.Heartbeat = cmp.Or(cfg.Heartbeat, DefaultHeartbeat)
	cfg.Window = cmp.Or(cfg.Window, DefaultWindow)
	cfg.SlowAfter = cmp.Or(cfg.SlowAfter, DefaultSlowAfter)
	cfg.ProvenWithin = cmp.Or(cfg.ProvenWithin, provenWithin)
	if cfg.Meter == nil {
		cfg.Meter = event.NoMeter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Server{
		cfg: cfg, meter: cfg.Meter, log: cfg.Logger, drain: make(chan struct{}),
		calls: map[string]int{}, syncing: map[string]*supersedes{}, turns: map[string]*turn{},
	}, nil
}

// roomFor returns how many connections fit into the descriptors of a process, which needs some for other things. 0 is not
// known.
func roomFor(descriptors uint64) int {
	if descriptors == 0 {
		return DefaultMaxConnections
	}
	return int(min(DefaultMaxConnections, descriptors-min(reservedDescriptors, descriptors/2)))
}

// Serve answers agents on a listener, which it closes, until ctx ends; calls in progress then have five seconds, and
// streams are ended with a reason. It returns nil when ctx has ended. A Server serves once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(shaking{credentials.NewTLS(serverTLS(s.cfg.GetCertificate, s.cfg.Bundle)), s}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxRequestBytes), grpc.MaxSendMsgSize(maxResponseBytes), grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(uint32(min(s.cfg.MaxCalls, 1<<16))), grpc.ConnectionTimeout(handshakeWithin),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 20 * time.Second, Timeout: 10 * time.Second, MaxConnectionIdle: idleWithin,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	agentpb.RegisterAgentServer(g, s)
	ended := make(chan error, 1)
	go func() {
		ended <- g.Serve(newConnections(l, s.meter, s.cfg.MaxConnections, s.cfg.ProvenWithin))
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	s.drainO.Do(func() { close(s.drain) })
	force := time.AfterFunc(drainWithin, g.Stop)
	defer force.Stop()
	g.GracefulStop()
	if err := <-ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Time implements redoubt.agent.v1.
func (s *Server) Time(context.Context, *agentpb.TimeRequest) (*agentpb.TimeResponse, error) {
	return &agentpb.TimeResponse{ServerTime: s.cfg.Now().UnixMilli()}, nil
}

// Join implements redoubt.agent.v1.
func (s *Server) Join(ctx context.Context, r *agentpb.JoinRequest) (*agentpb.JoinResponse, error) {
	req := fleet.JoinRequest{Secret: r.GetToken(), Machine: r.GetMachine(), CSR: r.GetCsr(), Version: r.GetVersion()}
	if err := unmarshal(r.GetFacts(), &req.Facts); err != nil {
		return nil, malformed("join", "the facts of the machine are malformed")
	}
	joined, err := s.cfg.Fleet.Join(ctx, req)
	if err != nil {
		return nil, err
	}
	return s.joined(joined)
}

// Renew implements redoubt.agent.v1.
func (s *Server) Renew(ctx context.Context, r *agentpb.RenewRequest) (*agentpb.JoinResponse, error) {
	c := callerOf(ctx)
	joined, err := s.cfg.Fleet.Renew(ctx, fleet.RenewRequest{
		Machine: c.machine, Proven: c.spki, NotAfter: c.notAfter, CSR: r.GetCsr(), Version: r.GetVersion(),
	})
	if err != nil {
		return nil, err
	}
	return s.joined(joined)
}

func (s *Server) joined(j fleet.Joined) (*agentpb.JoinResponse, error) {
	bundle, err := json.Marshal(j.Bundle)
	if err != nil {
		return nil, err
	}
	return &agentpb.JoinResponse{Machine: j.Machine.ID, Chain: chainTo(j.Chain), Bundle: bundle, ServerTime: s.cfg.Now().UnixMilli()}, nil
}

// SignX509 implements redoubt.agent.v1.
func (s *Server) SignX509(ctx context.Context, r *agentpb.SignX509Request) (*agentpb.SignX509Response, error) {
	chain, err := s.cfg.Fleet.SignX509(ctx, callerOf(ctx).machine, r.GetInstance(), r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &agentpb.SignX509Response{Chain: chainTo(chain)}, nil
}

// SignJWT implements redoubt.agent.v1.
func (s *Server) SignJWT(ctx context.Context, r *agentpb.SignJWTRequest) (*agentpb.SignJWTResponse, error) {
	svid, err := s.cfg.Fleet.SignJWT(ctx, callerOf(ctx).machine, r.GetInstance(), r.GetAudience())
	if err != nil {
		return nil, err
	}
	return &agentpb.SignJWTResponse{Id: svid.ID.String(), Token: svid.Token, Audience: svid.Audience, Expires: svid.Expires.UnixMilli()}, nil
}

// takeTurn waits until no other report of the machine is being received: what they may hold of memory is bounded together.
func (s *Server) takeTurn(ctx context.Context, machine string) (done func(), err error) {
	s.mu.Lock()
	t := s.turns[machine]
	if t == nil {
		t = &turn{free: make(chan struct{}, 1)}
		s.turns[machine] = t
	}
	t.waiting++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if t.waiting--; t.waiting == 0 {
			delete(s.turns, machine)
		}
	}
	wait := time.NewTimer(callWithin)
	defer wait.Stop()
	select {
	case t.free <- struct{}{}:
		return func() { <-t.free; leave() }, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-wait.C:
		err = refuse(ErrBusy, refusal.Exhausted, "report", "another one of this machine is being received", "try again in a while")
	}
	leave()
	return nil, err
}

// Report implements redoubt.agent.v1.
func (s *Server) Report(stream agentpb.Agent_ReportServer) error {
	done, err := s.takeTurn(stream.Context(), callerOf(stream.Context()).machine)
	if err != nil {
		return err
	}
	defer done()
	var report fleet.Report
	size := 0
	err = receiveAll(stream, func(part *agentpb.ReportRequest) error {
		for _, o := range part.GetPresent() {
			size += len(o.GetFacts()) + len(o.GetInstance())
		}
		for _, g := range part.GetGone() {
			size += len(g)
		}
		if size > maxReportBytes {
			return refuse(ErrMessage, refusal.Exhausted, "report", "it is larger than 32 MiB", "report in parts")
		}
		present, err := observedOf(part.GetPresent())
		if err != nil {
			return err
		}
		report.Present = append(report.Present, present...)
		report.Gone = append(report.Gone, part.GetGone()...)
		report.Full = report.Full || part.GetFull()
		return nil
	})
	if err != nil {
		return err
	}
	assigned, err := s.cfg.Fleet.Report(stream.Context(), callerOf(stream.Context()).machine, report)
	if err != nil {
		return err
	}
	part, size := &agentpb.ReportResponse{}, 0
	for _, a := range assigned {
		x, err := assignedTo(a)
		if err != nil {
			return err
		}
		part.Assigned = append(part.Assigned, x)
		if size += len(x.Facts) + len(x.Issuance); size >= partBytes {
			if err := stream.Send(part); err != nil {
				return err
			}
			part, size = &agentpb.ReportResponse{}, 0
		}
	}
	if len(part.Assigned) == 0 {
		return nil
	}
	return stream.Send(part)
}
