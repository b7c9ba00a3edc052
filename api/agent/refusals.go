package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of this room's refusals, to be matched with errors.Is.
var (
	// Of the server.
	ErrNoCertificate = &refusal.Error{Code: "agent-certificate-missing"}
	ErrCertificate   = &refusal.Error{Code: "agent-certificate-invalid"}
	ErrCertExpired   = &refusal.Error{Code: "agent-certificate-expired"}
	ErrMessage       = &refusal.Error{Code: "malformed-message"}
	ErrBusy          = &refusal.Error{Code: "agent-api-busy"}
	ErrSlow          = &refusal.Error{Code: "sync-slow"}
	ErrSuperseded    = &refusal.Error{Code: "sync-superseded"}
	ErrDraining      = &refusal.Error{Code: "server-draining"}
	ErrInternal      = &refusal.Error{Code: "internal"}

	// Of the client.
	ErrUnreachable   = &refusal.Error{Code: "server-unreachable"}
	ErrServer        = &refusal.Error{Code: "server-unproven"} // whoever answers does not prove to be the server
	ErrClock         = &refusal.Error{Code: "clock-differs"}
	ErrNotJoined     = &refusal.Error{Code: "not-joined"}
	ErrAlreadyJoined = &refusal.Error{Code: "already-joined"}
	ErrCredentials   = &refusal.Error{Code: "credentials-unreadable"}
)

// refuse makes the refusal with the code of sentinel.
func refuse(sentinel *refusal.Error, kind refusal.Kind, what, why, do string) *refusal.Error {
	return &refusal.Error{Kind: kind, Code: sentinel.Code, What: what, Why: why, Do: do}
}

// codeOf is this edge's table of kinds.
func codeOf(kind refusal.Kind) codes.Code {
	switch kind {
	case refusal.Invalid:
		return codes.InvalidArgument
	case refusal.Unknown:
		return codes.NotFound
	case refusal.Conflict:
		return codes.Aborted
	case refusal.Unproven:
		return codes.Unauthenticated
	case refusal.Denied:
		return codes.PermissionDenied
	case refusal.Exhausted:
		return codes.ResourceExhausted
	case refusal.Unavailable:
		return codes.Unavailable
	case refusal.Unsupported, refusal.Precondition:
		return codes.FailedPrecondition
	default:
		return codes.Unknown
	}
}

// maxText bounds each text of a refusal on the wire.
const maxText = 4 << 10

// toStatus renders an error for the wire: a refusal whole, anything else as "internal" with an id that the log has too.
func toStatus(ctx context.Context, log *slog.Logger, err error, now time.Time) error {
	if err == nil {
		return nil
	}
	e := refusal.As(err)
	switch {
	case e != nil:
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "canceled")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "deadline exceeded")
	default:
		if s, ok := status.FromError(err); ok { // of gRPC itself: the stream ended
			return s.Err()
		}
		id := identity.Unique("x")
		log.ErrorContext(ctx, "internal error", slog.String("id", id), slog.Any("error", err))
		e = refuse(ErrInternal, refusal.Unavailable, "agent API", "the server failed ("+id+")", "look for that id in the server's log, and try again")
	}
	s := status.New(codeOf(e.Kind), clip(e.Error()))
	detailed, derr := s.WithDetails(&agentpb.Refusal{
		Kind: string(e.Kind), Code: clip(e.Code), What: clip(e.What), Why: clip(e.Why), Do: clip(e.Do), Decision: clip(e.Decision),
		ServerTime: now.UnixMilli(),
	})
	if derr != nil { // a text that is not UTF-8
		return s.Err()
	}
	return detailed.Err()
}

func clip(s string) string {
	if len(s) > maxText {
		return s[:maxText]
	}
	return s
}

// fromStatus returns what toStatus rendered, as it was, and the server's clock if it was said. An error that is no refusal
// of the server becomes one of kind unavailable. Trust: err comes from the other side.
func fromStatus(err error) (*refusal.Error, time.Time) {
	s, ok := status.FromError(err)
	if !ok {
		e := refuse(ErrUnreachable, refusal.Unavailable, "server", "the call did not come through", "try again")
		e.Err = err
		return e, time.Time{}
	}
	for _, d := range s.Details() {
		if r, ok := d.(*agentpb.Refusal); ok {
			e := &refusal.Error{
				Kind: refusal.Kind(r.GetKind()), Code: clip(r.GetCode()), What: clip(r.GetWhat()), Why: clip(r.GetWhy()),
				Do: clip(r.GetDo()), Decision: clip(r.GetDecision()), Err: err,
			}
			return e, fromMillis(r.GetServerTime())
		}
	}
	e := refuse(ErrUnreachable, refusal.Unavailable, "server", clip(s.Message()), "it is tried again; check that the server runs and can be reached")
	if s.Code() == codes.DeadlineExceeded {
		e.Why = "it did not answer in time"
	}
	e.Err = err
	return e, time.Time{}
}

func fromMillis(ms int64) time.Time {
	if ms <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
