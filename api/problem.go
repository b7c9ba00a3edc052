package api

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"strconv"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// form is how one kind of refusal is rendered: its status, and the title that is the same for every occurrence.
type form struct {
	status int
	title  string
}

// forms is the one table that turns refusals into answers. Its fragments are explained in problems.md.
var forms = map[refusal.Kind]form{
	refusal.Invalid:      {http.StatusUnprocessableEntity, "The request is wrong"},
	refusal.Unknown:      {http.StatusNotFound, "There is no such thing"},
	refusal.Conflict:     {http.StatusConflict, "The state has moved on"},
	refusal.Unproven:     {http.StatusUnauthorized, "Who asks is not established"},
	refusal.Denied:       {http.StatusForbidden, "Policy said no"},
	refusal.Exhausted:    {http.StatusTooManyRequests, "A limit was reached"},
	refusal.Unavailable:  {http.StatusServiceUnavailable, "A part needed is away"},
	refusal.Unsupported:  {http.StatusNotImplemented, "This server cannot do it"},
	refusal.Precondition: {http.StatusPreconditionRequired, "Say what you saw"},
}

// The codes of refusals that this room makes itself.
const (
	codeNoRoute       = "no-such-path"
	codeMethod        = "method-not-allowed"
	codeMalformed     = "malformed-request"
	codeInvalid       = "invalid-request"
	codeTooLarge      = "body-too-large"
	codeSlow          = "body-too-slow"
	codeMediaType     = "unsupported-media-type"
	codeCredential    = "no-credential"
	codeBadCredential = "wrong-credential"
	codeBadSVID       = "wrong-svid"
	codeGuessing      = "too-many-wrong-credentials"
	codeBusy          = "server-busy"
	codeDenied        = "not-permitted"
	codeUndecided     = "undecided"
	codeDeadline      = "took-too-long"
	codeUnindexed     = "not-yet-in-audit-log"
	codeIfMatch       = "if-match-required"
	codeStale         = "if-match-failed"
	codeBadTag        = "malformed-entity-tag"
	codeBadCursor     = "malformed-cursor"
	codeBadKey        = "malformed-idempotency-key"
	codeKeyReused     = "idempotency-key-reused"
	codeKeyBusy       = "idempotency-key-in-use"
	codeKeysFull      = "idempotency-store-full"
	codeFollowers     = "too-many-followers"
	codeUnknown       = "unknown"
	codeInternal      = "internal"
)

// statuses has the codes whose status says more than that of their kind.
var statuses = map[string]int{
	codeMalformed: http.StatusBadRequest,
	codeBadTag:    http.StatusBadRequest,
	codeBadCursor: http.StatusBadRequest,
	codeBadKey:    http.StatusBadRequest,
	codeMethod:    http.StatusMethodNotAllowed,
	codeSlow:      http.StatusRequestTimeout,
	codeTooLarge:  http.StatusRequestEntityTooLarge,
	codeMediaType: http.StatusUnsupportedMediaType,
	codeStale:     http.StatusPreconditionFailed,
	codeBusy:      http.StatusServiceUnavailable,
}

// problem is an answer in the making: the body, and the headers that go with it. It implements huma's StatusError,
// HeadersError and ContentTypeFilter.
type problem struct {
	client.Problem
	header http.Header
}

const problemType = "application/problem+json"

// GetStatus returns the HTTP status.
func (p *problem) GetStatus() int { return p.Status }

// GetHeaders returns headers that go with the problem.
func (p *problem) GetHeaders() http.Header { return p.header }

// ContentType returns the media type of RFC 9457.
func (*problem) ContentType(string) string { return problemType }

// MarshalJSON renders the body alone.
func (p *problem) MarshalJSON() ([]byte, error) { return json.Marshal(&p.Problem) }

// explained is a refusal with the explanation of the decision behind it.
type explained struct {
	refused     *refusal.Error
	explanation policy.Explanation
}

func (e *explained) Error() string { return e.refused.Error() }
func (e *explained) Unwrap() error { return e.refused }

// render is the only way from an error to an answer. An error that is no refusal is an internal failure: its text stays
// here, for the log, and the answer has the request's id only. internal reports that.
func render(err error, request string) (p *problem, internal bool) {
	if done, ok := errors.AsType[*problem](err); ok {
		done.Request = request
		return done, false
	}
	r := refusal.As(err)
	if r == nil && errors.Is(err, context.DeadlineExceeded) {
		r = &refusal.Error{
			Kind: refusal.Unavailable, Code: codeDeadline, What: "the request", Why: "it took longer than the server allows",
			Do: "look whether it was done, then try again",
		}
	}
	f, known := form{}, false
	if r != nil {
		f, known = forms[r.Kind]
	}
	if !known {
		return &problem{Problem: client.Problem{
			Type: client.ProblemInternal, Title: "Internal failure", Status: http.StatusInternalServerError,
			Detail: "the server failed; its log says why, under this request's id", Code: codeInternal, Request: request,
		}}, true
	}
	p = &problem{Problem: client.Problem{
		Type: client.ProblemBase + string(r.Kind), Title: f.title, Status: f.status, Detail: r.What + ": " + r.Why,
		Code: r.Code, What: r.What, Why: r.Why, Do: r.Do, Decision: r.Decision, Request: request,
	}, header: http.Header{}}
	if status, ok := statuses[r.Code]; ok {
		p.Status = status
	}
	if r.Code == "" {
		p.Code = string(r.Kind)
	}
	if e, ok := errors.AsType[*explained](err); ok {
		p.Explanation = &e.explanation
	}
	p.Problems = defects(err)
	switch r.Kind {
	case refusal.Unproven:
		p.header.Set("WWW-Authenticate", challenge(r.Code))
	case refusal.Exhausted, refusal.Unavailable:
		if p.Status == http.StatusTooManyRequests || p.Status == http.StatusServiceUnavailable {
			p.header.Set("Retry-After", strconv.Itoa(int(retryAfter/time.Second)))
		}
	default:
	}
	return p, false
}

// retryAfter is what a refused caller is told to wait before it asks again.
const retryAfter = time.Second

// challenge is the WWW-Authenticate header of a 401. Source: RFC 9110, 11.6.1; RFC 6750, section 3: a request without
// any credential gets no error code.
func challenge(code string) string {
	if code == codeCredential {
		return `Bearer realm="redoubt"`
	}
	return `Bearer realm="redoubt", error="invalid_token"`
}

// maxDefects bounds the list of defects in one answer.
const maxDefects = 1000

// defects returns the refusals that were joined into err, or nil if there is only one.
func defects(err error) []client.Defect {
	var out []client.Defect
	var walk func(error)
	walk = func(err error) {
		if len(out) >= maxDefects {
			return
		}
		if r, ok := err.(*refusal.Error); ok { //nolint:errorlint // each node of the tree is looked at by itself
			inner, _ := r.Err.(interface{ Unwrap() []error })
			if inner == nil {
				out = append(out, client.Defect{Kind: r.Kind, Code: r.Code, What: r.What, Why: r.Why, Do: r.Do})
				return
			}
		}
		switch e := err.(type) { //nolint:errorlint // as above
		case interface{ Unwrap() []error }:
			for _, inner := range e.Unwrap() {
				walk(inner)
			}
		case interface{ Unwrap() error }:
			if inner := e.Unwrap(); inner != nil {
				walk(inner)
			}
		}
	}
	walk(err)
	if len(out) < 2 {
		return nil
	}
	return out
}

// write sends p. It is for answers outside of an operation; within one, the flow buffers.
func (p *problem) write(w http.ResponseWriter) {
	maps.Copy(w.Header(), p.header)
	body, err := json.Marshal(p)
	if err != nil { // a problem is plain data
		body = []byte(`{"type":"` + client.ProblemInternal + `","title":"Internal failure","status":500,"code":"internal"}`)
		p.Status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", problemType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.Status)
	_, _ = w.Write(body) // a client that went away cannot be told
}
