package api_test

import (
	"context"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// freeTokens makes tokens that cost nothing, so that a benchmark measures the API.
type freeTokens struct{ tokens }

type tokens = api.Tokens

func (freeTokens) CreateToken(_ context.Context, r fleet.TokenRequest, rec event.Record) (fleet.JoinToken, fleet.JoinSecret, error) {
	return fleet.JoinToken{ID: "t-1", Machine: r.Machine, Author: rec.Actor}, fleet.JoinSecret{ID: "t-1"}, nil
}

type auditLog = api.AuditLog

// instantAudit has every record at once.
type instantAudit struct{ auditLog }

func (instantAudit) Wait(context.Context, string) (uint64, error) { return 1, nil }
