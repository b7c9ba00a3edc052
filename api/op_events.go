package api

import (
	"context"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func addEvents(s *server) {
	register(s, operation{
		id: "list-events", section: sectionEvent, method: http.MethodGet, path: "/v1/events", summary: "List or follow events",
		description: "What happened, newest first, in pages. With `follow` the answer is a stream of server-sent events instead, of " +
			"what happens from now on or, with `Last-Event-ID`, from there on: `id` is the event's position, `data` the event; a " +
			"message of type `gap` says that events in between are no longer kept.",
		refuses: []refusal.Kind{refusal.Invalid},
	}, s.listEvents)
	if op := s.huma.OpenAPI().Paths["/v1/events"].Get; op != nil {
		op.Responses["200"].Content["text/event-stream"] = &huma.MediaType{Schema: &huma.Schema{
			Type: huma.TypeString, Description: "Server-sent events; data is a StoredEvent in JSON.",
		}}
	}
}

type eventsInput struct {
	client.Paging
	client.EventFilter
	Follow      string `query:"follow" enum:"true,false" doc:"Answer with a stream (also without a value: ?follow)."`
	Order       string `query:"order" enum:"newest,oldest" default:"newest" doc:"Of the pages."`
	LastEventID string `header:"Last-Event-ID" maxLength:"20" pattern:"^[0-9]*$" doc:"Of a stream: the id of the last event received."`
}

func (in *eventsInput) query() (fleet.EventQuery, error) {
	q := fleet.EventQuery{
		Machine: in.Machine, Workload: in.Workload, Layer: event.Layer(in.Layer), Kind: in.Kind,
		Decision: policy.ID(in.Decision), Verdict: policy.Verdict(in.Verdict), Since: in.Since, Until: in.Until,
	}
	var err error
	if in.Identity != "" {
		q.Identity, err = identity.ParseID(in.Identity)
	}
	return q, err
}

func (s *server) listEvents(ctx context.Context, c *call, in *eventsInput) (*pageOutput[fleet.StoredEvent], error) {
	q, err := in.query()
	if err != nil {
		return nil, err
	}
	if values, asked := c.query["follow"]; asked && values[0] != "false" {
		return &pageOutput[fleet.StoredEvent]{}, s.beginFollow(ctx, c, q, in.LastEventID)
	}
	list := listName(c.op.id, in.Order, in.Machine, in.Workload, in.Identity, in.Layer, in.Kind, in.Decision, in.Verdict,
		in.Since.String(), in.Until.String())
	place, err := numberCursor(list, in.Cursor, 0)
	if err != nil {
		return nil, err
	}
	q.Limit = in.Limit + 1
	if in.Order == "oldest" {
		q.After = place
	} else {
		q.Newest, q.Before = true, place
	}
	items, err := s.events.Events(ctx, q)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, positionOf), nil
}

// beginFollow makes the call a stream. It settles where the stream begins now, so that what happens between this and the
// first look is part of it.
func (s *server) beginFollow(ctx context.Context, c *call, q fleet.EventQuery, last string) error {
	var from uint64
	if last != "" {
		n, err := strconv.ParseUint(last, 10, 64)
		if err != nil {
			return badCursor("Last-Event-ID is no position of an event")
		}
		from = n
	} else {
		newest, err := s.events.Events(ctx, fleet.EventQuery{Newest: true, Limit: 1})
		if err != nil {
			return err
		}
		if len(newest) > 0 {
			from = newest[0].Position
		}
	}
	select {
	case s.followers <- struct{}{}:
	default:
		s.meter.Count("api_followers_refused", 1)
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: codeFollowers, What: "the stream of events",
			Why: "as many follow it as this server serves", Do: "end another one first, or list events in pages",
		}
	}
	c.follow = func(w http.ResponseWriter, r *http.Request) {
		defer func() { <-s.followers }()
		s.follow(w, r, c, q, from, last != "")
	}
	return nil
}
