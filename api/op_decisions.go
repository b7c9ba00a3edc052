package api

import (
	"context"
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

// kindDecision is the kind of events that record decisions.
const kindDecision = "decision"

func addDecisions(s *server) {
	register(s, operation{
		id: "ask-decision", section: sectionDecision, method: http.MethodPost, path: "/v1/decisions", summary: "Ask for a decision",
		maxBody: defaultBody,
		description: "May this principal do this action to this resource, by the policy set in force? Nothing is done; the answer is " +
			"recorded as any other, with who asked.",
		refuses: []refusal.Kind{refusal.Invalid, refusal.Unknown},
	}, s.askDecision)
	register(s, operation{
		id: "list-decisions", section: sectionDecision, method: http.MethodGet, path: "/v1/decisions", summary: "List decisions",
		description: "Those recorded, newest first.", refuses: []refusal.Kind{refusal.Invalid},
	}, s.listDecisions)
	register(s, operation{
		id: "get-decision", section: sectionDecision, method: http.MethodGet, path: "/v1/decisions/{id}", summary: "Explain a decision",
		description: "The whole of it: principal with its facts, action, resource, context, mode, deciding policies or the nearest " +
			"misses, and the edition of the policy set; from every machine that told of it.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.getDecision)
}

type askInput struct {
	Body client.AskRequest
}

func (s *server) askDecision(ctx context.Context, c *call, in *askInput) (*body[policy.Decision], error) {
	asked := in.Body
	var w fleet.Workload
	if asked.Instance != "" {
		var err error
		if w, err = s.workloads.Workload(ctx, asked.Instance); err != nil {
			return nil, err
		}
		if asked.Principal.UID.IsZero() {
			asked.Principal.UID = eval.WorkloadEntity(w.ID, w.Facts).UID
		}
	}
	question, err := askedRequest(asked)
	if err != nil {
		return nil, err
	}
	if asked.Instance != "" {
		question.Principal, question.Facts = eval.WorkloadEntity(w.ID, w.Facts), w.Facts
	}
	question.Point, question.Trace = "ask", c.trace
	d := s.engine.Decide(ctx, question)
	if d == nil {
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: codeUndecided, What: "the decision", Why: "the policy engine gave no answer",
			Do: "look into the server's log",
		}
	}
	e := event.OfDecision(d)
	e.Attrs = map[string]any{"asked.by": c.who.actor()}
	s.keep(ctx, e)
	return &body[policy.Decision]{*d}, nil
}

// keep records an event before the answer that names it, where the sink can: who asked asks next why.
func (s *server) keep(ctx context.Context, e event.Event) {
	if r, ok := s.sink.(Recorder); ok {
		err := r.Record(ctx, e)
		if err == nil {
			return
		}
		s.log.Error("a decision was answered before it was stored", "decision", e.Decision, "error", err)
	}
	s.sink.Emit(e)
}

type decisionsInput struct {
	client.Paging
	client.DecisionFilter
}

func (s *server) listDecisions(ctx context.Context, c *call, in *decisionsInput) (*pageOutput[policy.Decision], error) {
	list := listName(c.op.id, in.Workload, in.Machine, in.Verdict, in.Layer)
	before, err := numberCursor(list, in.Cursor, 0)
	if err != nil {
		return nil, err
	}
	stored, err := s.events.Events(ctx, fleet.EventQuery{
		Newest: true, Before: before, Kind: kindDecision, Workload: in.Workload, Machine: in.Machine,
		Verdict: policy.Verdict(in.Verdict), Layer: event.Layer(in.Layer), Limit: in.Limit + 1,
	})
	if err != nil {
		return nil, err
	}
	page := pageOf(c, list, stored, in.Limit, positionOf)
	out := &pageOutput[policy.Decision]{Link: page.Link}
	out.Body.Next, out.Body.Items = page.Body.Next, make([]policy.Decision, len(page.Body.Items))
	for i, e := range page.Body.Items {
		out.Body.Items[i] = decisionOf(e)
	}
	return out, nil
}

func positionOf(e fleet.StoredEvent) string { return strconv.FormatUint(e.Position, 10) }

// decisionOf returns the decision that an event records; of one that came without its detail, what the event says.
func decisionOf(e fleet.StoredEvent) policy.Decision {
	var d policy.Decision
	if err := json.Unmarshal(e.Event.Detail, &d); err != nil || d.ID != e.Event.Decision {
		d = policy.Decision{
			ID: e.Event.Decision, Time: e.Event.Time, Verdict: e.Event.Verdict, Mode: e.Event.Mode,
			Explanation: policy.Explanation{Summary: e.Event.Message},
		}
	}
	d.Machine = e.Machine // the server's word, not the sender's
	return d
}

type decisionInput struct {
	ID string `path:"id" maxLength:"64" doc:"Id of the decision, d-…"`
}

func (s *server) getDecision(ctx context.Context, _ *call, in *decisionInput) (*body[client.Known], error) {
	told, err := s.events.Decision(ctx, policy.ID(in.ID))
	if err != nil {
		return nil, err
	}
	return &body[client.Known]{client.Known{ID: policy.ID(in.ID), Told: told}}, nil
}
