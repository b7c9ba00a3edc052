package api

import (
	"context"
	"net/http"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func addAuthority(s *server) {
	register(s, operation{
		id: "get-authority", section: sectionAuthority, method: http.MethodGet, path: "/v1/authority", summary: "The authority's keys",
		description: "Every key with its state and validity, and the next step of rotation. No private half leaves the server.",
	}, s.getAuthority)
	for _, step := range []struct {
		name, summary, description string
		do                         func(context.Context, event.Record) (ca.Status, error)
	}{
		{"prepare", "Prepare the next keys", "Makes the next issuing and JWT key.", s.rotation.Prepare},
		{"publish", "Publish the next keys", "Puts the next JWT key into the bundle, so that it is known before it signs.", s.rotation.Publish},
		{"activate", "Activate the next keys", "Lets them sign, in the place of the active ones.", s.rotation.Activate},
		{"retire", "Retire the former keys", "Takes them out of the bundle and destroys their private halves.", s.rotation.Retire},
	} {
		register(s, operation{
			id: step.name + "-authority", section: sectionAuthority, method: http.MethodPost, path: "/v1/authority/" + step.name,
			summary: step.summary, description: step.description + " The server takes these steps by itself; this takes one now.",
			refuses: []refusal.Kind{refusal.Conflict},
		}, func(ctx context.Context, c *call, _ *nothing) (*body[ca.Status], error) {
			status, err := step.do(ctx, c.record("authority."+step.name, s.trustDomain.String()))
			if err != nil {
				return nil, err
			}
			return &body[ca.Status]{status}, nil
		})
	}
	register(s, operation{
		id: "get-bundle", section: sectionAuthority, method: http.MethodGet, path: "/v1/bundle", public: true,
		summary:     "The trust domain's bundle",
		description: "The public keys that verify its SVIDs, as a SPIFFE bundle document (a JWK set). Needs no credential.",
	}, s.getBundle)
}

func (s *server) getAuthority(context.Context, *call, *nothing) (*body[ca.Status], error) {
	return &body[ca.Status]{s.rotation.Status()}, nil
}

type bundleOutput struct {
	CacheControl string `header:"Cache-Control"`
	Body         bundle
}

func (s *server) getBundle(context.Context, *call, *nothing) (*bundleOutput, error) {
	return &bundleOutput{CacheControl: "no-cache", Body: bundle{s.authority.Bundle()}}, nil
}

func addAudit(s *server) {
	register(s, operation{
		id: "get-audit", section: sectionAudit, method: http.MethodGet, path: "/v1/audit", summary: "How the audit log stands",
		description: "Its size, what waits to be logged, the key that verifies it, and the published checkpoint.",
	}, s.getAudit)
}

func (s *server) getAudit(ctx context.Context, _ *call, _ *nothing) (*body[client.AuditLog], error) {
	status, err := s.audit.Status(ctx)
	if err != nil {
		return nil, err
	}
	out := client.AuditLog{Status: status, Verifier: s.audit.Verifier()}
	if status.Published > 0 {
		checkpoint, err := s.audit.Checkpoint()
		if err != nil {
			return nil, err
		}
		out.Checkpoint = string(checkpoint)
	}
	return &body[client.AuditLog]{out}, nil
}
