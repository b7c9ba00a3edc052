package api

import (
	"context"
	"net/http"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

func addMachines(s *server) {
	register(s, operation{
		id: "list-machines", section: sectionMachine, method: http.MethodGet, path: "/v1/machines", summary: "List machines",
		description: "Every host whose agent joined, in order of id, revoked ones included.",
		refuses:     []refusal.Kind{refusal.Invalid},
	}, s.listMachines)
	register(s, operation{
		id: "get-machine", section: sectionMachine, method: http.MethodGet, path: "/v1/machines/{id}", summary: "Get a machine",
		description: "One host: its state, its key, when it was last heard of, and its facts.",
		refuses:     []refusal.Kind{refusal.Unknown, refusal.Invalid},
	}, s.getMachine)
	register(s, operation{
		id: "revoke-machine", section: sectionMachine, method: http.MethodPost, path: "/v1/machines/{id}/revoke",
		summary: "Revoke a machine", status: http.StatusCreated, creates: true, maxBody: defaultBody,
		description: "For good: its agent may no longer speak, nothing is signed for its workloads, and all agents are told. It comes " +
			"back when the revocation is lifted, or by joining anew with a token that replaces it.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Invalid, refusal.Conflict},
	}, s.revokeMachine)
}

func (s *server) listMachines(ctx context.Context, c *call, in *client.Paging) (*pageOutput[fleet.Machine], error) {
	list := listName(c.op.id)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	items, err := s.machines.Machines(ctx, after, in.Limit+1)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(m fleet.Machine) string { return m.ID }), nil
}

type machineInput struct {
	ID string `path:"id" maxLength:"63" doc:"Id of the machine."`
}

func (s *server) getMachine(ctx context.Context, _ *call, in *machineInput) (*body[fleet.Machine], error) {
	m, err := s.machines.Machine(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	return &body[fleet.Machine]{m}, nil
}

type revokeInput struct {
	ID   string `path:"id" maxLength:"63" doc:"Id of the machine."`
	Body client.Revoke
}

func (s *server) revokeMachine(ctx context.Context, c *call, in *revokeInput) (*body[fleet.Revocation], error) {
	m, err := s.machines.Machine(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	r, err := s.machines.RevokeMachine(ctx, m.ID, in.Body.Reason, c.record("machine.revoke", m.ID))
	if err != nil {
		return nil, err
	}
	return &body[fleet.Revocation]{r}, nil
}
