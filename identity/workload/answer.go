package workload

import (
	"context"
	"errors"
	"log/slog"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// The security header that every request must carry, so that a forged request of another protocol does not pass for one.
// Source: SPIFFE Workload Endpoint, section 3.
const (
	securityHeader = "workload.spiffe.io"
	securityValue  = "true"
)

// service answers the calls of one Serve.
type service struct {
	gen.UnimplementedSpiffeWorkloadAPIServer
	*Server
	stopping chan struct{}
}

func (s *service) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	c, err := s.admit(ctx)
	if err != nil {
		return nil, s.answer(ctx, err)
	}
	defer c.streams.Add(-1)
	resp, err := next(ctx, req)
	if err == nil {
		err = c.caller.Verify() // making the answer took time
	}
	if err != nil {
		return nil, s.answer(ctx, err)
	}
	return resp, nil
}

func (s *service) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	c, err := s.admit(ss.Context())
	if err != nil {
		return s.answer(ss.Context(), err)
	}
	defer c.streams.Add(-1)
	return s.answer(ss.Context(), next(srv, ss))
}

// admit checks what every call must bring, and takes a place among the calls of its connection.
func (s *service) admit(ctx context.Context) (*conn, error) {
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get(securityHeader)) != 1 || md.Get(securityHeader)[0] != securityValue {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: "no-security-header", What: "request to the Workload API",
			Why: "it lacks the metadata workload.spiffe.io: true", Do: "use a SPIFFE client library, or add that metadata",
		}
	}
	c, err := connOf(ctx)
	if err != nil {
		return nil, err
	}
	if c.refused != nil {
		return nil, c.refused
	}
	if err := c.caller.Verify(); err != nil {
		return nil, err
	}
	if c.streams.Add(1) > int64(s.config.MaxStreams) {
		c.streams.Add(-1)
		return nil, &refusal.Error{
			Kind: refusal.Exhausted, Code: "too-many-calls", What: "request to the Workload API",
			Why: "this connection has as many calls in progress as it may", Do: "share one stream between all users of the process",
		}
	}
	return c, nil
}

func connOf(ctx context.Context) (*conn, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("call without a peer")
	}
	info, ok := p.AuthInfo.(callerInfo)
	if !ok {
		return nil, errors.New("call without an identified caller")
	}
	return info.conn, nil
}

// kinds is how refusals are answered. Source: SPIFFE Workload Endpoint, section 6 and appendix A.
var kinds = map[refusal.Kind]codes.Code{
	refusal.Invalid:      codes.InvalidArgument,
	refusal.Unknown:      codes.NotFound,
	refusal.Conflict:     codes.Aborted,
	refusal.Unproven:     codes.PermissionDenied, // callers prove nothing: there is nothing to authenticate again with
	refusal.Denied:       codes.PermissionDenied,
	refusal.Exhausted:    codes.ResourceExhausted,
	refusal.Unavailable:  codes.Unavailable,
	refusal.Unsupported:  codes.FailedPrecondition,
	refusal.Precondition: codes.FailedPrecondition,
}

// answer renders an error for the client: a refusal in full, anything else as "internal" with an id that is in the log.
func (s *service) answer(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err // gRPC's own: the client went away, a frame was too long
	}
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return status.FromContextError(ctx.Err()).Err()
	}
	r := refusal.As(err)
	if r == nil {
		r = s.internal(ctx, "answer call", err)
	}
	code, ok := kinds[r.Kind]
	switch {
	case errors.Is(r, ErrNoIdentity):
		code = codes.PermissionDenied
	case !ok:
		code = codes.Internal
	}
	reason := r.Code
	if reason == "" {
		reason = string(r.Kind)
	}
	s.meter.Count("workloadapi_refused", 1, "reason", reason)
	return status.Error(code, r.Error())
}

// internal logs err and returns what a client may know of it.
func (s *Server) internal(ctx context.Context, doing string, err error) *refusal.Error {
	id := identity.Unique("x")
	s.log.ErrorContext(ctx, "workload API: internal error", slog.String("id", id), slog.String("doing", doing), slog.Any("error", err))
	return &refusal.Error{
		Code: "internal", What: "request to the Workload API", Why: "internal error " + id,
		Do: "look for that id in the agent's log", Err: err,
	}
}

// counter counts calls by method and result, those that gRPC refuses by itself included.
type counter struct{ meter event.Meter }

type methodKey struct{}

// TagRPC implements stats.Handler.
func (counter) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	method := "unknown" // a label has few values: names of methods come from the client
	for _, m := range gen.SpiffeWorkloadAPI_ServiceDesc.Methods {
		if info.FullMethodName == "/"+gen.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/"+m.MethodName {
			method = m.MethodName
		}
	}
	for _, m := range gen.SpiffeWorkloadAPI_ServiceDesc.Streams {
		if info.FullMethodName == "/"+gen.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/"+m.StreamName {
			method = m.StreamName
		}
	}
	return context.WithValue(ctx, methodKey{}, method)
}

// HandleRPC implements stats.Handler.
func (c counter) HandleRPC(ctx context.Context, s stats.RPCStats) {
	method, _ := ctx.Value(methodKey{}).(string)
	switch s := s.(type) {
	case *stats.OutPayload:
		c.meter.Count("workloadapi_messages", 1, "method", method)
	case *stats.End:
		c.meter.Count("workloadapi_calls", 1, "method", method, "code", status.Code(s.Error).String())
	}
}

// TagConn implements stats.Handler.
func (counter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (counter) HandleConn(context.Context, stats.ConnStats) {}
