package api

import (
	"cmp"
	"errors"
	"log/slog"
	"net/http"
	"path"
	"runtime/debug"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Config is what the API is made of. Every interface is needed, but Protections; Sink, Meter, Logger and Now have
// defaults.
type Config struct {
	TrustDomain identity.TrustDomain
	Version     string // of Redoubt, for status and the OpenAPI document

	Operators   Verifier
	Engine      Engine
	Authority   Authority
	Rotation    Rotation
	Machines    Machines
	Tokens      Tokens
	Workloads   Workloads
	Withdrawals Withdrawals
	Quarantines Quarantines
	Events      Events
	PolicySet   PolicySet
	Editions    Editions
	Overrides   Overrides
	Audit       AuditLog
	Protections Protections // nil: none are known
	Enforced    []string    // namespaces of actions that points of this build act on (set.Unenforced)

	// Drain, once closed, ends every stream, so that a server which shuts down need not wait for its followers; they
	// resume elsewhere, or here later. nil: never.
	Drain     <-chan struct{}
	BodyTime  time.Duration // for a whole body to arrive; default 10 s
	Heartbeat time.Duration // between comments on a quiet stream; default 15 s, and clients expect one in 45 s

	Sink   event.Sink       // of the decisions taken here; nil: event.NoSink
	Meter  event.Meter      // nil: event.NoMeter
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now
}

// The bounds of requests that are worked on at once. Whoever is nobody has places of their own, and gives them back before
// the answer is written: a client that does not read must hold nothing that an operator needs.
const (
	maxInFlight = 256 // of callers who are identified; at most [maxFollowers] of them streams
	maxPublic   = 32  // of operations that need no credential
)

// wholeTime bounds what no shorter limit does; it is longer than any operation and its answer may take. A connection
// that is kept alive would otherwise carry the deadline of its last answer into the next.
const wholeTime = 3 * time.Minute

// The defaults of [Config].
const (
	defaultBodyTime  = 10 * time.Second
	defaultHeartbeat = 15 * time.Second
)

// server is the handler that [New] returns.
type server struct {
	trustDomain identity.TrustDomain
	version     string
	started     time.Time

	operators   Verifier
	engine      Engine
	authority   Authority
	rotation    Rotation
	machines    Machines
	tokens      Tokens
	workloads   Workloads
	withdrawals Withdrawals
	quarantines Quarantines
	events      Events
	policies    PolicySet
	editions    Editions
	overrides   Overrides
	audit       AuditLog
	protections Protections
	enforced    []string
	bodyTime    time.Duration
	heartbeat   time.Duration
	drain       <-chan struct{}

	sink  event.Sink
	meter event.Meter
	log   *slog.Logger
	now   func() time.Time

	// Set while New runs, and not changed after.
	mux           *http.ServeMux
	huma          huma.API
	operations    []*operation
	names         map[string]bool // of properties and parameters: what an error may repeat
	problemSchema *huma.Schema
	specJSON      []byte
	specYAML      []byte

	guesses   *guesses
	answers   *answers
	inFlight  places
	public    places
	followers chan struct{}
}

// New returns the management API as a handler for the whole of its host. It starts nothing and owns no goroutine.
// Errors: a part of cfg is missing; the OpenAPI document cannot be rendered.
//
// Put it behind a server with [Bound], and TLS 1.3 that asks for client certificates without needing them
// (tls.RequestClientCert: the API verifies them itself).
func New(cfg Config) (http.Handler, error) {
	s := &server{
		trustDomain: cfg.TrustDomain, version: cfg.Version, operators: cfg.Operators, engine: cfg.Engine,
		authority: cfg.Authority, rotation: cfg.Rotation, machines: cfg.Machines, tokens: cfg.Tokens,
		workloads: cfg.Workloads, withdrawals: cfg.Withdrawals, quarantines: cfg.Quarantines, events: cfg.Events,
		policies: cfg.PolicySet, editions: cfg.Editions, overrides: cfg.Overrides, audit: cfg.Audit,
		protections: cfg.Protections, enforced: cfg.Enforced,
		bodyTime: cmp.Or(cfg.BodyTime, defaultBodyTime), heartbeat: cmp.Or(cfg.Heartbeat, defaultHeartbeat),
		drain: cfg.Drain, sink: cfg.Sink, meter: cfg.Meter, log: cfg.Logger, now: cfg.Now,
		mux: http.NewServeMux(), inFlight: make(places, maxInFlight), public: make(places, maxPublic),
		followers: make(chan struct{}, maxFollowers),
	}
	switch {
	case s.trustDomain == "":
		return nil, errors.New("management API: Config.TrustDomain is missing")
	case s.operators == nil, s.engine == nil, s.authority == nil, s.rotation == nil, s.machines == nil, s.tokens == nil,
		s.workloads == nil, s.withdrawals == nil, s.quarantines == nil, s.events == nil, s.policies == nil,
		s.editions == nil, s.overrides == nil, s.audit == nil:
		return nil, errors.New("management API: a part of Config is missing")
	}
	if s.sink == nil {
		s.sink = event.NoSink
	}
	if s.meter == nil {
		s.meter = event.NoMeter
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.started = s.now().UTC()
	s.guesses, s.answers = newGuesses(s.now), newAnswers(s.now)
	s.newHuma(cfg.Version)
	for _, add := range []func(*server){
		addStatus, addMachines, addTokens, addWorkloads, addPolicySet, addEditions, addObservations, addDecisions, addEvents,
		addAuthority, addWithdrawals, addQuarantines, addAudit,
	} {
		add(s)
	}
	if err := s.describe(); err != nil {
		return nil, err
	}
	return s, nil
}

// ServeHTTP implements http.Handler: what every request has in common, whether it leads to an operation or not.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	request := requestID(r.Header)
	header := w.Header()
	header.Set(requestHeader, request)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-store")
	header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wholeTime)) // not all writers have deadlines
	defer func() {
		if failure := recover(); failure != nil {
			if err, ok := failure.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(failure)
			}
			s.meter.Count("api_panics", 1)
			s.log.ErrorContext(r.Context(), "request panicked", "request", request, "panic", failure, "stack", string(debug.Stack()))
			p, _ := render(errPanicked, request)
			p.write(w)
		}
	}()
	s.route(w, r, request)
}

// route leads to the operation, or says that there is none: the mux's own answers are not problems.
func (s *server) route(w http.ResponseWriter, r *http.Request, request string) {
	if path.Clean(r.URL.Path) != r.URL.Path {
		s.refuse(w, request, noRoute)
		return
	}
	switch r.URL.Path {
	case "/v1/openapi.json":
		s.document(w, r, request, "application/openapi+json", s.specJSON)
		return
	case "/v1/openapi.yaml":
		s.document(w, r, request, "application/openapi+yaml", s.specYAML)
		return
	}
	handler, pattern := s.mux.Handler(r)
	if pattern != "" {
		s.mux.ServeHTTP(w, r)
		return
	}
	probe := &recorder{header: http.Header{}}
	handler.ServeHTTP(probe, r)
	if probe.status != http.StatusMethodNotAllowed {
		s.refuse(w, request, noRoute)
		return
	}
	s.refuseMethod(w, request, probe.header.Get("Allow"))
}

var noRoute = &refusal.Error{
	Kind: refusal.Unknown, Code: codeNoRoute, What: "the path", Why: "the API has no such path",
	Do: "see /v1/openapi.json for those it has",
}

func (s *server) refuseMethod(w http.ResponseWriter, request, allow string) {
	w.Header().Set("Allow", allow) // RFC 9110, 15.5.6
	s.refuse(w, request, &refusal.Error{
		Kind: refusal.Invalid, Code: codeMethod, What: "the method", Why: "this path does not have it", Do: "use " + allow,
	})
}

// refuse answers what did not get as far as an operation.
func (s *server) refuse(w http.ResponseWriter, request string, err error) {
	p, _ := render(err, request)
	s.meter.Count("api_unrouted", 1, "code", p.Code)
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(publicTime)) // not all writers have deadlines
	p.write(w)
}

// document serves the OpenAPI document. It describes public source code, so it needs no credential.
func (s *server) document(w http.ResponseWriter, r *http.Request, request, media string, body []byte) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		s.refuseMethod(w, request, "GET, HEAD")
		return
	}
	out := &answer{status: http.StatusOK, header: http.Header{"Content-Type": {media}, "Cache-Control": {"no-cache"}}, body: body}
	out.send(w, r, publicTime)
}
