package agent

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Every call goes: identify (the certificate) → ask (the fleet: may this machine speak?) → decide (and: is there room?) →
// act (the handler) → tell (count; render a refusal). Streams ask again whenever the domain changes.

// caller is who makes a call: of an open method (Time, Join) nobody.
type caller struct {
	machine  string
	spki     string
	notAfter time.Time
}

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	defer func() { err = s.tell(ctx, info.FullMethod, recover(), err) }()
	within, cancel := context.WithTimeout(ctx, callWithin)
	defer cancel()
	within, leave, err := s.enter(within, info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer leave()
	return handle(within, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	ctx := ss.Context()
	defer func() { err = s.tell(ctx, info.FullMethod, recover(), err) }()
	ctx, leave, err := s.enter(ctx, info.FullMethod)
	if err != nil {
		return err
	}
	defer leave()
	return handle(srv, &entered{ServerStream: ss, ctx: ctx})
}

// entered is a stream whose context knows the caller.
type entered struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // gRPC's own shape
}

func (e *entered) Context() context.Context { return e.ctx }

// enter identifies the caller and asks whether it may speak. leave must be called at the end.
func (s *Server) enter(ctx context.Context, method string) (_ context.Context, leave func(), err error) {
	if method == agentpb.Agent_Time_FullMethodName || method == agentpb.Agent_Join_FullMethodName {
		leave, err := s.admit("")
		if err == nil && method == agentpb.Agent_Join_FullMethodName {
			leave = both(leave, connOf(ctx).join())
		}
		return ctx, leave, err
	}
	renewal := method == agentpb.Agent_Renew_FullMethodName
	c, err := s.identify(ctx, renewal)
	if err != nil {
		return ctx, nil, err
	}
	if !renewal { // fleet.Renew asks by itself, and leaves the old key good until the new one is used
		if err := s.cfg.Fleet.Authenticate(ctx, c.machine, c.spki); err != nil {
			return ctx, nil, err
		}
		if !connOf(ctx).proven(c.machine) {
			return ctx, nil, refuse(ErrBusy, refusal.Exhausted, "connection to the agent API", "this machine has too many", "try again in a while")
		}
	}
	leave, err = s.admit(c.machine)
	if err == nil && renewal {
		leave = both(leave, connOf(ctx).join())
	}
	return context.WithValue(ctx, callerKey{}, c), leave, err
}

func both(first, second func()) func() { return func() { first(); second() } }

const joinAnew = "join with a token made with redoubt token create"

// identify verifies the certificate that the connection proved the key of. With ended, one whose end has passed is
// accepted: how long ago is for the caller to judge. Source: X509-SVID, section 5; RFC 5280, section 6.
func (s *Server) identify(ctx context.Context, ended bool) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, errors.New("agent API: a call without a peer")
	}
	info, ok := p.AuthInfo.(shown)
	if !ok {
		return caller{}, errors.New("agent API: a call without TLS")
	}
	return s.verify(info.State.PeerCertificates, ended)
}

func (s *Server) verify(certs []*x509.Certificate, ended bool) (caller, error) {
	if len(certs) == 0 {
		return caller{}, refuse(ErrNoCertificate, refusal.Unproven, "agent", "it shows no certificate", joinAnew)
	}
	leaf, now, bundle := certs[0], s.cfg.Now(), s.cfg.Bundle()
	invalid := func(why string) error {
		return refuse(ErrCertificate, refusal.Unproven, "certificate of the agent", why, joinAnew)
	}
	if len(certs) > maxChain {
		return caller{}, invalid("its chain is too long")
	}
	id, err := identity.IDFromCertificate(leaf)
	if err != nil {
		return caller{}, invalid("it is no X509-SVID")
	}
	when := now
	if now.After(leaf.NotAfter) {
		if !ended {
			return caller{}, refuse(ErrCertExpired, refusal.Unproven, "certificate of the agent",
				"it ended at "+stamp(leaf.NotAfter)+", and the server's time is "+stamp(now), "renew it; the agent does that by itself")
		}
		when = leaf.NotAfter
	}
	opts := x509.VerifyOptions{
		Roots: bundle.Pool(), Intermediates: x509.NewCertPool(), CurrentTime: when, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		if now.Before(leaf.NotBefore) {
			return caller{}, invalid("it is valid from " + stamp(leaf.NotBefore) + " on only, and the server's time is " + stamp(now))
		}
		return caller{}, invalid("it does not verify against the trust bundle")
	}
	machine, err := fleet.MachineOf(s.cfg.TrustDomain, id)
	if err != nil {
		return caller{}, err
	}
	spki := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return caller{machine: machine, spki: hex.EncodeToString(spki[:]), notAfter: leaf.NotAfter}, nil
}

// admit takes one of the places of a machine ("" is of all who have no certificate).
func (s *Server) admit(machine string) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	busy := refuse(ErrBusy, refusal.Exhausted, "call to the agent API", "too many are in progress", "try again in a while")
	if machine == "" {
		if s.anonymous >= s.cfg.MaxAnonymous {
			return nil, busy
		}
		s.anonymous++
		return func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.anonymous--
		}, nil
	}
	if s.calls[machine] >= s.cfg.MaxCalls {
		return nil, busy
	}
	s.calls[machine]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.calls[machine]--; s.calls[machine] == 0 {
			delete(s.calls, machine)
		}
	}, nil
}

// tell counts a call and renders its refusal.
func (s *Server) tell(ctx context.Context, method string, panicked any, err error) error {
	if panicked != nil {
		s.meter.Count("agentapi_panics", 1)
		s.log.ErrorContext(ctx, "a call panicked", slog.String("method", method), slog.Any("panic", panicked), slog.String("stack", string(debug.Stack())))
		err = errors.New("panic")
	}
	if errors.Is(err, io.EOF) {
		err = nil // the client is done
	}
	code := "ok"
	if err != nil {
		code = "internal"
		if e := refusal.As(err); e != nil {
			code = e.Code
		} else if ctx.Err() != nil {
			code = "canceled"
		}
		s.log.DebugContext(ctx, "a call was refused or failed", slog.String("method", method), slog.String("code", code), slog.Any("error", err))
	}
	s.meter.Count("agentapi_calls", 1, "method", method[len("/redoubt.agent.v1.Agent/"):], "code", code)
	return toStatus(ctx, s.log, err, s.cfg.Now())
}

// good returns nil while a stream may last: the machine may still speak, its certificate has not ended, and the server is
// not draining.
func (s *Server) good(c caller) error {
	select {
	case <-s.drain:
		return refuse(ErrDraining, refusal.Unavailable, "stream", "the server is stopping", "it is resumed when the server is back")
	default:
	}
	if now := s.cfg.Now(); now.After(c.notAfter) {
		return refuse(ErrCertExpired, refusal.Unproven, "stream", "the certificate it began with ended at "+stamp(c.notAfter)+
			", and the server's time is "+stamp(now), "renew it; the agent does that by itself")
	}
	return s.cfg.Fleet.Trusted(c.machine, c.spki)
}

// received is what a goroutine reads from a stream: the one that handles it must be free to end it.
type received[T any] struct {
	message T
	err     error
}

// receive reads a stream until it ends. The channel is not closed; reading ends with the stream, when its handler returns.
func receive[T any](ctx context.Context, next func() (T, error)) <-chan received[T] {
	out := make(chan received[T])
	go func() {
		for {
			m, err := next()
			select {
			case out <- received[T]{m, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return out
}

// receiveAll reads a request in parts to its end.
func receiveAll[T any](stream interface{ Recv() (T, error) }, take func(T) error) error {
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := take(part); err != nil {
			return err
		}
	}
}
