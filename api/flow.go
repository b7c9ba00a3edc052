package api

import (
	"context"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// The time limits of a request, beside those of the operation itself.
const (
	answerTime = 30 * time.Second // for the client to take the answer
	publicTime = 5 * time.Second  // the same, of a client that is nobody
	auditTime  = 10 * time.Second // for an audit record to be indexed
)

// handle is the life of a request to one operation. Identifying waits for nobody and so takes no place: a place that one
// must have before being known could be kept from the operator by those who are nobody.
func (s *server) handle(op *operation, w http.ResponseWriter, r *http.Request) {
	c := newCall(op, w, r)
	defer func() { c.leave() }()
	if op.public {
		if err := s.enter(c, s.public); err != nil {
			s.tell(c, w, r, s.refused(c, err))
			return
		}
		s.tell(c, w, r, s.act(c, w, r))
		return
	}

	who, err := s.identify(r)
	if err != nil {
		s.tell(c, w, r, s.refused(c, err))
		return
	}
	c.who = who
	if err := s.enter(c, s.inFlight); err != nil {
		s.tell(c, w, r, s.refused(c, err))
		return
	}

	question := s.ask(c, r)

	c.decision, err = s.decide(r.Context(), question)
	if err != nil {
		s.tell(c, w, r, s.refused(c, err))
		return
	}

	out := s.act(c, w, r)

	s.tell(c, w, r, out)
}

// enter takes a place for the call, until tell or the end.
func (s *server) enter(c *call, p places) (err error) {
	if c.leave, err = p.take(); err != nil {
		s.meter.Count("api_busy", 1)
	}
	return err
}

// call is one request on its way through the steps. It is owned by the request's goroutine.
type call struct {
	op       *operation
	request  string // its id, q-…, or the client's own
	trace    string
	began    time.Time
	who      principal
	decision *policy.Decision
	records  []string // ids of the audit records of what it changed
	doubtful bool     // it failed, and may have changed something all the same
	header   http.Header
	query    map[string][]string
	follow   func(http.ResponseWriter, *http.Request) // set by an operation that streams its answer
	key      string                                   // claimed in the answers kept, or ""
	leave    func()                                   // gives back the place it holds; may be called again
}

func newCall(op *operation, w http.ResponseWriter, r *http.Request) *call {
	return &call{
		op: op, request: w.Header().Get(requestHeader), trace: traceOf(r.Header), began: time.Now(),
		header: r.Header, query: r.URL.Query(), leave: func() {},
	}
}

// record returns the audit record for what this call is about to change; the answer waits until it is indexed.
func (c *call) record(action, object string) event.Record {
	rec := event.NewRecord(c.who.actor(), action, object)
	if c.decision != nil {
		rec.Decision = c.decision.ID
	}
	rec.Detail = map[string]string{"request": c.request}
	c.records = append(c.records, rec.ID)
	return rec
}

// unchanged says that nothing was changed after all, so that no record is to be waited for.
func (c *call) unchanged() { c.records = nil }

type callKey struct{}

// callOf returns the call that a context belongs to.
func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// ask puts what is about to happen as a question to policy.
func (s *server) ask(c *call, r *http.Request) *policy.Request {
	section := policy.UID{Type: "Operation", ID: c.op.section}
	around := policy.Record{"now": s.now().UTC(), "method": r.Method, "path": recordable(c.op.path, r.URL.Path)}
	if addr, ok := addrOf(r); ok {
		around["source"] = addr
	}
	if c.who.machine {
		around["machine"] = c.who.entity.UID
	}
	return &policy.Request{
		Principal: c.who.entity,
		Action:    policy.Action(policy.Access, "administer"),
		Resource: policy.Entity{
			UID:     policy.UID{Type: "Operation", ID: c.op.id},
			Parents: []policy.UID{{Type: "Api", ID: "redoubt"}, section},
			Attrs: policy.Record{
				"operation": c.op.id, "method": c.op.method, "path": c.op.path, "section": c.op.section,
			},
		},
		Context: around, Point: "api", Trace: c.trace,
	}
}

// decide answers the question and records the decision. This point always enforces: whatever mode the decision came
// with, only a permit lets the request pass.
func (s *server) decide(ctx context.Context, question *policy.Request) (*policy.Decision, error) {
	d, err := s.judge(ctx, question)
	if d != nil {
		s.sink.Emit(event.OfDecision(d))
	}
	return d, err
}

// judge is decide without the record.
func (s *server) judge(ctx context.Context, question *policy.Request) (*policy.Decision, error) {
	answered := s.engine.Decide(ctx, question)
	if answered == nil {
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: codeUndecided, What: "operation " + question.Resource.UID.ID,
			Why: "the policy engine gave no answer", Do: "look into the server's log",
		}
	}
	d := *answered
	d.Mode = policy.Enforce
	if d.Verdict == policy.Permit {
		return &d, nil
	}
	s.meter.Count("api_denied", 1, "operation", question.Resource.UID.ID)
	return &d, &explained{explanation: d.Explanation, refused: &refusal.Error{
		Kind: refusal.Denied, Code: codeDenied, What: "operation " + question.Resource.UID.ID,
		Why: d.Explanation.Summary, Do: "ask for a policy that permits it, or look at the decision with redoubt why " + string(d.ID),
		Decision: string(d.ID),
	}}
}

// act reads the body, claims the idempotency key, and runs the operation's own function within its time limit. Whatever
// it answers is kept back until tell.
func (s *server) act(c *call, w http.ResponseWriter, r *http.Request) (out *answer) {
	ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), callKey{}, c), c.op.limit)
	defer cancel()
	defer func() {
		if failure := recover(); failure != nil {
			s.meter.Count("api_panics", 1)
			s.log.ErrorContext(ctx, "operation panicked", "operation", c.op.id, "request", c.request,
				"panic", failure, "stack", string(debug.Stack()))
			out = s.refused(c, errPanicked)
		}
	}()
	if c.op.method != http.MethodGet {
		if err := s.audit.Ready(); err != nil {
			return s.refused(c, err)
		}
	}
	body, err := readBody(c.op, s.bodyTime, w, r)
	if err != nil {
		s.meter.Count("api_body_refused", 1)
		return s.refused(c, err)
	}
	if c.op.creates {
		before, err := s.claim(c, body)
		if err != nil {
			s.meter.Count("api_idempotency_refused", 1)
			return s.refused(c, err)
		}
		if before != nil {
			return before
		}
	}
	buffer := &recorder{header: http.Header{}}
	inner := r.WithContext(ctx)
	inner.Body = body.reader()
	c.op.run(buffer, inner)
	return buffer.answer()
}

// claim begins the request's idempotency key, if it has one.
func (s *server) claim(c *call, body requestBody) (*answer, error) {
	key, err := parseKey(c.header)
	if err != nil || key == "" {
		return nil, err
	}
	full := c.who.actor() + "\x00" + c.op.id + "\x00" + key
	before, err := s.answers.begin(full, body)
	if err != nil || before != nil {
		return before, err
	}
	c.key = full
	return nil, nil
}

// tell answers, once what was changed is in the audit log, and says for the record how it ended.
func (s *server) tell(c *call, w http.ResponseWriter, r *http.Request, out *answer) {
	if out.status < http.StatusBadRequest {
		if err := s.indexed(r.Context(), c.records); err != nil {
			c.doubtful = true
			out = s.refused(c, err)
		}
	}
	if c.key != "" {
		if out.status < http.StatusBadRequest || c.doubtful {
			s.answers.keep(c.key, out)
		} else {
			s.answers.release(c.key)
		}
	}
	s.meter.Count("api_requests", 1, "operation", c.op.id, "status", strconv.Itoa(out.status))
	attrs := []slog.Attr{
		slog.String("operation", c.op.id), slog.Int("status", out.status), slog.String("request", c.request),
		slog.Duration("took", time.Since(c.began)),
	}
	if c.who.name != "" {
		attrs = append(attrs, slog.String("principal", c.who.actor()))
	}
	if c.decision != nil {
		attrs = append(attrs, slog.String("decision", string(c.decision.ID)))
	}
	s.log.LogAttrs(r.Context(), c.op.level(), "api request", attrs...)
	if c.follow != nil && out.status == http.StatusOK {
		c.follow(w, r)
		return
	}
	within := answerTime
	if c.who.name == "" {
		within = publicTime
	}
	if c.who.name == "" || out.status >= http.StatusBadRequest {
		c.leave() // any machine is somebody, but only whom policy permits may keep a place by reading slowly
	}
	out.send(w, r, within)
}

// indexed waits until the audit records are in the log. Their change is made by now, and the client gone or not does not
// matter to it.
func (s *server) indexed(ctx context.Context, records []string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTime)
	defer cancel()
	for _, id := range records {
		if _, err := s.audit.Wait(ctx, id); err != nil {
			s.meter.Count("api_audit_wait_failed", 1)
			s.log.ErrorContext(ctx, "audit record not indexed", "record", id, "error", err)
			return &refusal.Error{
				Kind: refusal.Unavailable, Code: codeUnindexed, What: "the answer",
				Why: "the change was made, but its audit record is not in the log yet",
				Do:  "do not repeat the request; look at the audit status", Err: err,
			}
		}
	}
	return nil
}

// refused renders err as the answer, and logs what must not be part of it.
func (s *server) refused(c *call, err error) *answer {
	p, internal := render(err, c.request)
	if internal {
		c.doubtful = true
		s.meter.Count("api_internal", 1, "operation", c.op.id)
		s.log.Error("operation failed", "operation", c.op.id, "request", c.request, "error", err)
	}
	buffer := &recorder{header: http.Header{}}
	p.write(buffer)
	return buffer.answer()
}

// newRequestID returns an id for a request that came without a usable one.
func newRequestID() string { return identity.Unique("q") }
