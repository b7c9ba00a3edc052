package api

import (
	"context"
	"net/http"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

func addWithdrawals(s *server) {
	register(s, operation{
		id: "create-revocation", section: sectionRevocation, method: http.MethodPost, path: "/v1/revocations",
		status: http.StatusCreated, summary: "Withdraw trust", creates: true, maxBody: defaultBody,
		description: "From exactly one of an identity, a machine or a key. Agents are told at once and refuse it.",
		refuses:     []refusal.Kind{refusal.Invalid},
	}, s.createRevocation)
	register(s, operation{
		id: "list-revocations", section: sectionRevocation, method: http.MethodGet, path: "/v1/revocations", summary: "List revocations",
		description: "Those in force, and those that ended of late, in order of id.", refuses: []refusal.Kind{refusal.Invalid},
	}, s.listRevocations)
	register(s, operation{
		id: "delete-revocation", section: sectionRevocation, method: http.MethodDelete, path: "/v1/revocations/{id}",
		summary: "Lift a revocation", status: http.StatusNoContent, description: "What it withdrew is trusted again.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.deleteRevocation)
}

func addQuarantines(s *server) {
	register(s, operation{
		id: "create-quarantine", section: sectionQuarantine, method: http.MethodPost, path: "/v1/quarantines",
		status: http.StatusCreated, summary: "Quarantine an identity or instance", creates: true, maxBody: defaultBody,
		description: "Exactly one of them gets the fact risk.quarantined; what that forbids is for policies to say.",
		refuses:     []refusal.Kind{refusal.Invalid, refusal.Unknown},
	}, s.createQuarantine)
	register(s, operation{
		id: "list-quarantines", section: sectionQuarantine, method: http.MethodGet, path: "/v1/quarantines", summary: "List quarantines",
		description: "Those in force, and those that ended of late, in order of id.", refuses: []refusal.Kind{refusal.Invalid},
	}, s.listQuarantines)
	register(s, operation{
		id: "delete-quarantine", section: sectionQuarantine, method: http.MethodDelete, path: "/v1/quarantines/{id}",
		summary: "Lift a quarantine", status: http.StatusNoContent, description: "The fact is taken away again.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.deleteQuarantine)
}

// until is the end of what holds for d from now; zero if it has none.
func (s *server) until(d client.Duration) time.Time {
	if d == 0 {
		return time.Time{}
	}
	return s.now().UTC().Add(time.Duration(d))
}

// exactlyOne refuses a request that does not name just one of what it may name.
func exactlyOne(names string, values ...string) error {
	n := 0
	for _, v := range values {
		if v != "" {
			n++
		}
	}
	if n == 1 {
		return nil
	}
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeInvalid, What: "the request", Why: "it does not name exactly one of " + names, Do: "give one of them",
	}
}

// parseID reads an optional SPIFFE ID.
func parseID(text string) (identity.ID, error) {
	if text == "" {
		return identity.ID{}, nil
	}
	return identity.ParseID(text)
}

type createRevocationInput struct {
	Body client.RevocationRequest
}

func (s *server) createRevocation(ctx context.Context, c *call, in *createRevocationInput) (*body[fleet.Revocation], error) {
	b := in.Body
	if err := exactlyOne("identity, machine and spki", b.Identity, b.Machine, b.SPKI); err != nil {
		return nil, err
	}
	id, err := parseID(b.Identity)
	if err != nil {
		return nil, err
	}
	r, err := s.withdrawals.Revoke(ctx, fleet.Revocation{
		Identity: id, Machine: b.Machine, SPKI: b.SPKI, Reason: b.Reason, Expires: s.until(b.ExpiresIn),
	}, c.record("revocation.create", id.String()+b.Machine+b.SPKI))
	if err != nil {
		return nil, err
	}
	return &body[fleet.Revocation]{r}, nil
}

func (s *server) listRevocations(ctx context.Context, c *call, in *client.Paging) (*pageOutput[fleet.Revocation], error) {
	list := listName(c.op.id)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	items, err := s.withdrawals.Revocations(ctx, after, in.Limit+1)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(r fleet.Revocation) string { return r.ID }), nil
}

type revocationInput struct {
	ID string `path:"id" maxLength:"64" doc:"Id of the revocation, v-…"`
}

func (s *server) deleteRevocation(ctx context.Context, c *call, in *revocationInput) (*nothing, error) {
	return nil, s.withdrawals.Lift(ctx, in.ID, c.record("revocation.delete", idOrUnknown("v", in.ID)))
}

type createQuarantineInput struct {
	Body client.QuarantineRequest
}

func (s *server) createQuarantine(ctx context.Context, c *call, in *createQuarantineInput) (*body[fleet.Quarantine], error) {
	b := in.Body
	if err := exactlyOne("identity and instance", b.Identity, b.Instance); err != nil {
		return nil, err
	}
	id, err := parseID(b.Identity)
	if err != nil {
		return nil, err
	}
	q, err := s.quarantines.Quarantine(ctx, fleet.Quarantine{
		Identity: id, Instance: b.Instance, Reason: b.Reason, Expires: s.until(b.ExpiresIn),
	}, c.record("quarantine.create", id.String()+b.Instance))
	if err != nil {
		return nil, err
	}
	return &body[fleet.Quarantine]{q}, nil
}

func (s *server) listQuarantines(ctx context.Context, c *call, in *client.Paging) (*pageOutput[fleet.Quarantine], error) {
	list := listName(c.op.id)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	items, err := s.quarantines.Quarantines(ctx, after, in.Limit+1)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(q fleet.Quarantine) string { return q.ID }), nil
}

type quarantineInput struct {
	ID string `path:"id" maxLength:"64" doc:"Id of the quarantine, q-…"`
}

func (s *server) deleteQuarantine(ctx context.Context, c *call, in *quarantineInput) (*nothing, error) {
	return nil, s.quarantines.Release(ctx, in.ID, c.record("quarantine.delete", idOrUnknown("q", in.ID)))
}
