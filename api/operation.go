package api

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/redoubtsec/redoubt/refusal"
)

// operation is what is special about one operation; everything else is the same for all.
type operation struct {
	id          string // the operation id, which policies name: Operation::"<id>"
	section     string // the group it belongs to, which policies name too
	method      string
	path        string
	summary     string
	description string
	status      int           // of success; default 200, or 204 without a body
	public      bool          // served without a credential
	creates     bool          // takes an Idempotency-Key
	replaces    bool          // needs If-Match
	tagged      bool          // honours If-Match
	maxBody     int64         // 0: takes no body
	limit       time.Duration // default [defaultTime]
	refuses     []refusal.Kind

	run func(http.ResponseWriter, *http.Request) // set by register
}

// The bounds of an operation's time and body, where it does not say otherwise.
const (
	defaultTime = 20 * time.Second
	defaultBody = 256 << 10
	filesBody   = 16 << 20 // of a policy set
)

// level is how loud the log of an operation is: reading is routine.
func (op *operation) level() slog.Level {
	if op.method == http.MethodGet {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// register adds an operation: its place in the OpenAPI document, its route, and its own function, which gets a request
// that was identified, permitted, parsed and validated.
func register[I, O any](s *server, op operation, act func(ctx context.Context, c *call, in *I) (*O, error)) {
	op.limit = cmp.Or(op.limit, defaultTime)
	security := []map[string][]string{{"operator": {}}, {"machine": {}}}
	if op.public {
		security = []map[string][]string{{}}
	}
	h := huma.Operation{
		OperationID: op.id, Method: op.method, Path: op.path, Summary: op.summary, Description: op.description,
		Tags: []string{op.section}, DefaultStatus: op.status, Security: security,
		Parameters: op.parameters(), Responses: s.problems(&op),
		MaxBodyBytes: -1, BodyReadTimeout: -1, // act has read it, within its bounds
		RejectUnknownQueryParameters: true,
		Metadata:                     map[string]any{"operation": &op},
	}
	huma.Register(s.huma, h, func(ctx context.Context, in *I) (*O, error) {
		c := callOf(ctx)
		out, err := act(ctx, c, in)
		if err == nil {
			return out, nil
		}
		p, internal := render(err, c.request)
		if internal {
			c.doubtful = true
			s.meter.Count("api_internal", 1, "operation", c.op.id)
			s.log.ErrorContext(ctx, "operation failed", "operation", c.op.id, "request", c.request, "error", err)
		}
		return nil, p
	})
	s.operations = append(s.operations, &op)
}

// parameters are the headers that the flow reads, for the document.
func (op *operation) parameters() []*huma.Param {
	text := func(name, doc string, required bool) *huma.Param {
		return &huma.Param{Name: name, In: "header", Description: doc, Required: required, Schema: &huma.Schema{Type: huma.TypeString}}
	}
	var out []*huma.Param
	if op.creates {
		out = append(out, text("Idempotency-Key", "A random string: a repetition with the same key and body gets the same "+
			"answer and creates nothing more, for an hour. The same key with another body is refused.", false))
	}
	if op.replaces || op.tagged {
		out = append(out, text("If-Match", "The ETag of the version that this replaces, or *.", op.replaces))
	}
	if op.method == http.MethodGet {
		out = append(out, text("If-None-Match", "The ETag of the answer you have: 304 if it is still the same.", false))
	}
	return out
}

// problems are the answers of an operation that are no success, for the document.
func (s *server) problems(op *operation) map[string]*huma.Response {
	kinds := slices.Clone(op.refuses)
	if !op.public {
		kinds = append(kinds, refusal.Unproven, refusal.Denied, refusal.Exhausted)
	}
	kinds = append(kinds, refusal.Unavailable)
	statusText := map[int]string{http.StatusInternalServerError: "Internal failure"}
	for _, kind := range kinds {
		statusText[forms[kind].status] = forms[kind].title
	}
	if op.maxBody > 0 {
		statusText[http.StatusBadRequest] = "The body is not valid JSON"
		statusText[http.StatusRequestTimeout] = "The body did not arrive in time"
		statusText[http.StatusRequestEntityTooLarge] = "The body is too large"
		statusText[http.StatusUnsupportedMediaType] = "The body is not JSON"
		statusText[http.StatusUnprocessableEntity] = forms[refusal.Invalid].title
	}
	if op.creates {
		statusText[http.StatusConflict] = forms[refusal.Conflict].title
	}
	if op.replaces {
		statusText[http.StatusPreconditionRequired] = forms[refusal.Precondition].title
	}
	if op.replaces || op.tagged {
		statusText[http.StatusPreconditionFailed] = "The ETag in If-Match is no longer current"
	}
	out := map[string]*huma.Response{}
	for status, text := range statusText {
		out[strconv.Itoa(status)] = &huma.Response{
			Description: text,
			Content:     map[string]*huma.MediaType{problemType: {Schema: s.problemSchema}},
		}
	}
	if op.method == http.MethodGet {
		out["304"] = &huma.Response{Description: "What you have is current"}
	}
	return out
}

// adapter is huma's way to the mux: every operation passes through the flow.
type adapter struct{ s *server }

// Handle implements huma.Adapter.
func (a adapter) Handle(h *huma.Operation, handler func(huma.Context)) {
	op, _ := h.Metadata["operation"].(*operation)
	op.run = func(w http.ResponseWriter, r *http.Request) { handler(humago.NewContext(h, r, w)) }
	a.s.mux.HandleFunc(op.method+" "+op.path, func(w http.ResponseWriter, r *http.Request) { a.s.handle(op, w, r) })
}

// ServeHTTP implements huma.Adapter.
func (a adapter) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.s.ServeHTTP(w, r) }
