package api

import (
	"context"
	"net/http"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

func addTokens(s *server) {
	register(s, operation{
		id: "create-join-token", section: sectionToken, method: http.MethodPost, path: "/v1/join-tokens", status: http.StatusCreated,
		summary: "Create a join token", creates: true, maxBody: defaultBody,
		description: "A secret with which one agent joins, once, as one machine. It is in this answer and nowhere else: the server " +
			"keeps a hash.",
		refuses: []refusal.Kind{refusal.Invalid, refusal.Conflict},
	}, s.createToken)
	register(s, operation{
		id: "list-join-tokens", section: sectionToken, method: http.MethodGet, path: "/v1/join-tokens", summary: "List join tokens",
		description: "Tokens outstanding, and those used or expired of late, in order of id; without their secrets.",
		refuses:     []refusal.Kind{refusal.Invalid},
	}, s.listTokens)
	register(s, operation{
		id: "delete-join-token", section: sectionToken, method: http.MethodDelete, path: "/v1/join-tokens/{id}",
		summary: "End a join token", status: http.StatusNoContent, description: "It expires now. One that was used cannot be ended.",
		refuses: []refusal.Kind{refusal.Unknown, refusal.Conflict, refusal.Invalid},
	}, s.deleteToken)
}

type createTokenInput struct {
	Body client.TokenRequest
}

func (s *server) createToken(ctx context.Context, c *call, in *createTokenInput) (*body[client.Token], error) {
	req := fleet.TokenRequest{Machine: in.Body.Machine, TTL: time.Duration(in.Body.ExpiresIn), Replace: in.Body.Replace}
	rec := c.record("join-token.create", "machine "+req.Machine)
	token, secret, err := s.tokens.CreateToken(ctx, req, rec)
	if err != nil {
		return nil, err
	}
	return &body[client.Token]{client.Token{JoinToken: token, Secret: secret.Reveal()}}, nil
}

func (s *server) listTokens(ctx context.Context, c *call, in *client.Paging) (*pageOutput[fleet.JoinToken], error) {
	list := listName(c.op.id)
	after, err := decodeCursor(list, in.Cursor)
	if err != nil {
		return nil, err
	}
	items, err := s.tokens.Tokens(ctx, after, in.Limit+1)
	if err != nil {
		return nil, err
	}
	return pageOf(c, list, items, in.Limit, func(t fleet.JoinToken) string { return t.ID }), nil
}

type tokenInput struct {
	ID string `path:"id" maxLength:"64" doc:"Id of the token, t-…"`
}

func (s *server) deleteToken(ctx context.Context, c *call, in *tokenInput) (*nothing, error) {
	return nil, s.tokens.DeleteToken(ctx, in.ID, c.record("join-token.delete", idOrUnknown("t", in.ID)))
}
