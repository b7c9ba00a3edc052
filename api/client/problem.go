package client

import (
	"strings"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// ProblemBase is the common part of every problem's type URI; the rest is the kind. It leads to the page that explains
// them.
const ProblemBase = "https://github.com/redoubtsec/redoubt/blob/main/api/problems.md#"

// ProblemInternal is the type URI of a failure that is no refusal. Its details are in the server's log, under Request.
const ProblemInternal = ProblemBase + "internal"

// Problem is the body of every answer that is not a success. Source: RFC 9457, section 3; the members from Code on are
// extensions (section 3.2).
//
// Trust: rendered by the server; Detail, What, Why and Errors never hold a submitted value.
type Problem struct {
	Type   string `json:"type" doc:"URI of the kind of problem; the fragment is the kind: invalid, unknown, conflict, unproven, denied, exhausted, unavailable, unsupported, precondition or internal."`
	Title  string `json:"title" doc:"The kind of problem in a few words; the same for every occurrence."`
	Status int    `json:"status" doc:"The HTTP status of this answer."`
	Detail string `json:"detail,omitempty" doc:"What was refused in this case, and why."`

	Code        string              `json:"code" doc:"Stable, lower-case, hyphenated: what programs match on."`
	What        string              `json:"what,omitempty" doc:"What was refused."`
	Why         string              `json:"why,omitempty" doc:"The reason."`
	Do          string              `json:"do,omitempty" doc:"What to do about it."`
	Decision    string              `json:"decision,omitempty" doc:"Id of the policy decision behind it; GET /v1/decisions/{id} explains it."`
	Explanation *policy.Explanation `json:"explanation,omitempty" doc:"Of a policy decision: why it came out so."`
	Errors      []FieldError        `json:"errors,omitempty" doc:"Of an invalid request: each defect, by place."`
	Problems    []Defect            `json:"problems,omitempty" doc:"Of a refused set of files: every defect of every file."`
	Request     string              `json:"request,omitempty" doc:"Id of the request, as in X-Request-ID; the server's log has it too."`
}

// FieldError is one defect of a request: where, and what is wrong there. The value is never repeated.
type FieldError struct {
	Location string `json:"location,omitempty" doc:"body.confirm_within, query.limit, header.If-Match"`
	Message  string `json:"message" doc:"What is wrong."`
}

// Defect is one of several refusals that came together, such as the defects of a policy set.
type Defect struct {
	Kind refusal.Kind `json:"kind" doc:"What sort of refusal."`
	Code string       `json:"code" doc:"Stable code."`
	What string       `json:"what" doc:"What was refused: file, document, policy."`
	Why  string       `json:"why" doc:"The reason."`
	Do   string       `json:"do,omitempty" doc:"What to do."`
}

// Error renders "what: why; what to do", or the detail of what is no refusal.
func (p *Problem) Error() string {
	if r := p.plain(); r != nil {
		return r.Error()
	}
	if p.Request != "" {
		return p.Title + ": " + p.Detail + " (request " + p.Request + ")"
	}
	return p.Title + ": " + p.Detail
}

// Kind returns the kind of refusal, or "" of an internal failure and of foreign problems.
func (p *Problem) Kind() refusal.Kind {
	kind, ok := strings.CutPrefix(p.Type, ProblemBase)
	if !ok || p.Type == ProblemInternal {
		return ""
	}
	return refusal.Kind(kind)
}

// Refusal returns the refusal that the server rendered, with p as its cause, or nil if p is none.
func (p *Problem) Refusal() *refusal.Error {
	r := p.plain()
	if r != nil {
		r.Err = p
	}
	return r
}

func (p *Problem) plain() *refusal.Error {
	kind := p.Kind()
	if kind == "" || p.Code == "" {
		return nil
	}
	return &refusal.Error{Kind: kind, Code: p.Code, What: p.What, Why: p.Why, Do: p.Do, Decision: p.Decision}
}

// Refusals returns the defects that came together, as refusals.
func (p *Problem) Refusals() []*refusal.Error {
	out := make([]*refusal.Error, len(p.Problems))
	for i, d := range p.Problems {
		out[i] = &refusal.Error{Kind: d.Kind, Code: d.Code, What: d.What, Why: d.Why, Do: d.Do}
	}
	return out
}
