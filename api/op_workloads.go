package api

import (
	"context"
	"net/http"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

func addWorkloads(s *server) {
	register(s, operation{
		id: "list-workloads", section: sectionWorkload, method: http.MethodGet, path: "/v1/workloads", summary: "List workloads",
		description: "What runs, and what ran until lately, in order of instance.",
		refuses:     []refusal.Kind{refusal.Invalid},
	}, s.listWorkloads)
	register(s, operation{
		id: "get-workload", section: sectionWorkload, method: http.MethodGet, path: "/v1/workloads/{instance}", summary: "Get a workload",
		description: "One instance: its facts, and its identity or why it has none.",
		refuses:     []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.getWorkload)
	register(s, operation{
		id: "explain-identity", section: sectionIdentity, method: http.MethodPost, path: "/v1/identities/explain",
		summary: "Explain an identity", maxBody: defaultBody,
		description: "Which identity a workload (by instance or name) or any set of facts earns by the rules in force: which rule " +
			"matched, and why the others did not. Nothing is issued.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Conflict, refusal.Invalid},
	}, s.explainIdentity)
}

type workloadsInput struct {
	client.Paging
	client.WorkloadFilter
}

func (s *server) listWorkloads(ctx context.Context, c *call, in *workloadsInput) (*pageOutput[fleet.Workload], error) {
	list := listName(c.op.id, in.Machine, in.Service, in.Identity, in.State)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	items, err := s.workloads.Workloads(ctx, fleet.WorkloadQuery{
		After: after, Machine: in.Machine, Service: in.Service, ID: in.Identity, State: fleet.WorkloadState(in.State), Limit: in.Limit + 1,
	})
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(w fleet.Workload) string { return w.Instance }), nil
}

type workloadInput struct {
	Instance string `path:"instance" maxLength:"128" doc:"The instance, w-…"`
}

func (s *server) getWorkload(ctx context.Context, _ *call, in *workloadInput) (*body[fleet.Workload], error) {
	w, err := s.workloads.Workload(ctx, in.Instance)
	if err != nil {
		return nil, err
	}
	return &body[fleet.Workload]{w}, nil
}

type explainInput struct {
	Body client.ExplainRequest
}

func (s *server) explainIdentity(ctx context.Context, _ *call, in *explainInput) (*body[client.Explained], error) {
	given := 0
	for _, is := range []bool{in.Body.Instance != "", in.Body.Name != "", in.Body.Facts.Len() > 0} {
		if is {
			given++
		}
	}
	if given != 1 {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: codeInvalid, What: "the request", Why: "it does not name exactly one of instance, name and facts",
			Do: "give one of them",
		}
	}
	out := client.Explained{Facts: in.Body.Facts}
	if in.Body.Facts.Len() == 0 {
		w, err := s.find(ctx, in.Body.Instance, in.Body.Name)
		if err != nil {
			return nil, err
		}
		out.Instance, out.Machine, out.Facts = w.Instance, w.Machine, w.Facts
	}
	rules, edition := s.policies.Current()
	id, issuance, err := rules.Issue(s.trustDomain, out.Facts)
	if err != nil && refusal.As(err) == nil {
		return nil, err
	}
	out.ID, out.Issuance, out.Edition, out.Refusal = id, issuance, edition.Version, fleet.RefusalOf(err)
	return &body[client.Explained]{out}, nil
}

// find returns the workload of an instance, or the one present workload of a service or SPIFFE ID. Of several alike the
// first is as good as any; the answer says which it was.
func (s *server) find(ctx context.Context, instance, name string) (fleet.Workload, error) {
	if instance != "" {
		return s.workloads.Workload(ctx, instance)
	}
	queries := []fleet.WorkloadQuery{{Service: name, State: fleet.WorkloadPresent, Limit: 1}}
	if id, err := identity.ParseID(name); err == nil {
		queries = []fleet.WorkloadQuery{{ID: id.String(), State: fleet.WorkloadPresent, Limit: 1}}
	}
	for _, q := range queries {
		found, err := s.workloads.Workloads(ctx, q)
		if err != nil {
			return fleet.Workload{}, err
		}
		if len(found) > 0 {
			return found[0], nil
		}
	}
	if identity.IsUnique("w", name) {
		return s.workloads.Workload(ctx, name)
	}
	return fleet.Workload{}, unknown("the workload", "no workload of that name is present", "list them with redoubt get workloads")
}

func unknown(what, why, do string) error {
	return &refusal.Error{Kind: refusal.Unknown, Code: codeUnknown, What: what, Why: why, Do: do}
}

// idOrUnknown is an id fit for a record: one that was submitted and has not the form of an id is not repeated.
func idOrUnknown(prefix, id string) string {
	if identity.IsUnique(prefix, id) {
		return id
	}
	return prefix + "-?"
}
