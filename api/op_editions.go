package api

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

func addEditions(s *server) {
	register(s, operation{
		id: "list-policy-sets", section: sectionPolicySet, method: http.MethodGet, path: "/v1/policy-sets",
		summary: "List editions of the policy set", description: "Those kept, newest first, without their files.",
		refuses: []refusal.Kind{refusal.Invalid},
	}, s.listEditions)
	register(s, operation{
		id: "get-policy-set-version", section: sectionPolicySet, method: http.MethodGet, path: "/v1/policy-sets/{version}",
		summary: "Get an edition of the policy set", description: "With its files; 0 is the built-in set.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.getEdition)
	register(s, operation{
		id: "diff-policy-set-versions", section: sectionPolicySet, method: http.MethodGet, path: "/v1/policy-sets/{version}/diff",
		summary: "Compare two editions", description: "What changed from one edition to another, policy by policy.",
		limit: applyTime, refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.diffEditions)
}

func addObservations(s *server) {
	register(s, operation{
		id: "create-observation", section: sectionObservation, method: http.MethodPost, path: "/v1/observations",
		status: http.StatusCreated, summary: "Pull the panic switch", creates: true, maxBody: defaultBody,
		description: "All workloads, or those selected, are observed instead of enforced in Run, Net and Api, until it expires. What " +
			"is privileged access stays enforced.",
		refuses: []refusal.Kind{refusal.Invalid},
	}, s.createObservation)
	register(s, operation{
		id: "list-observations", section: sectionObservation, method: http.MethodGet, path: "/v1/observations",
		summary: "List pulls of the panic switch", description: "Those in force, in order of id.", refuses: []refusal.Kind{refusal.Invalid},
	}, s.listObservations)
	register(s, operation{
		id: "delete-observation", section: sectionObservation, method: http.MethodDelete, path: "/v1/observations/{id}",
		summary: "Enforce again", status: http.StatusNoContent, description: "Ends a pull of the panic switch before it expires.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.deleteObservation)
}

func (s *server) listEditions(ctx context.Context, c *call, in *client.Paging) (*pageOutput[set.Edition], error) {
	list := listName(c.op.id)
	before, err := numberCursor(list, in.Cursor, 0)
	if err != nil {
		return nil, err
	}
	items, err := s.editions.Editions(ctx, before, in.Limit+1)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(e set.Edition) string { return strconv.FormatUint(e.Version, 10) }), nil
}

type editionInput struct {
	Version uint64 `path:"version" doc:"Number of the edition."`
}

func (s *server) getEdition(ctx context.Context, _ *call, in *editionInput) (*body[set.Edition], error) {
	e, err := s.editions.Edition(ctx, in.Version)
	if err != nil {
		return nil, err
	}
	return &body[set.Edition]{e}, nil
}

type diffEditionsInput struct {
	Version uint64 `path:"version" doc:"Number of the edition."`
	From    int64  `query:"from" minimum:"-1" default:"-1" doc:"The edition to compare with; -1 is the one before."`
}

func (s *server) diffEditions(ctx context.Context, _ *call, in *diffEditionsInput) (*body[set.Diff], error) {
	from := uint64(max(in.From, 0))
	if in.From < 0 && in.Version > 0 {
		from = in.Version - 1
	}
	a, err := s.editions.Edition(ctx, from)
	if err != nil {
		return nil, err
	}
	b, err := s.editions.Edition(ctx, in.Version)
	if err != nil {
		return nil, err
	}
	return &body[set.Diff]{whole(set.Difference(a.Files, b.Files))}, nil
}

type observeInput struct {
	Body client.ObserveRequest
}

func (s *server) createObservation(ctx context.Context, c *call, in *observeInput) (*body[set.Override], error) {
	o := set.Override{Selector: in.Body.Selector, Expires: s.until(in.Body.ExpiresIn), Author: c.who.actor(), Note: in.Body.Note}
	o, err := s.overrides.Observe(ctx, o, c.record("observation.create", "observation"))
	if err != nil {
		return nil, err
	}
	return &body[set.Override]{o}, nil
}

func (s *server) listObservations(_ context.Context, c *call, in *client.Paging) (*pageOutput[set.Override], error) {
	list := listName(c.op.id)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	all := s.overrides.Overrides()
	slices.SortFunc(all, func(a, b set.Override) int { return strings.Compare(a.ID, b.ID) })
	begin, _ := slices.BinarySearchFunc(all, after+"\x00", func(o set.Override, id string) int { return strings.Compare(o.ID, id) })
	items := all[begin:]
	return pageOf(c, list, items[:min(len(items), in.Limit+1)], in.Limit, func(o set.Override) string { return o.ID }), nil
}

type observationInput struct {
	ID string `path:"id" maxLength:"64" doc:"Id of the observation, o-…"`
}

func (s *server) deleteObservation(ctx context.Context, c *call, in *observationInput) (*nothing, error) {
	return nil, s.overrides.EndObserve(ctx, in.ID, c.record("observation.delete", idOrUnknown("o", in.ID)))
}
