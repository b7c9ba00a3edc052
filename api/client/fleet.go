package client

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"net/url"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy"
)

// Status returns the server in a few lines (get-status).
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "/v1/status", nil)
}

// ListProtections returns a page of what is enforced where (list-protections).
func (c *Client) ListProtections(ctx context.Context, f ProtectionFilter, p Paging) (Page[policy.Protection], error) {
	return list[policy.Protection](ctx, c, "/v1/protections", f, p)
}

// Protections iterates over every protection.
func (c *Client) Protections(ctx context.Context, f ProtectionFilter) iter.Seq2[policy.Protection, error] {
	return all(ctx, func(p Paging) (Page[policy.Protection], error) { return c.ListProtections(ctx, f, p) })
}

// ListMachines returns a page of machines (list-machines).
func (c *Client) ListMachines(ctx context.Context, p Paging) (Page[fleet.Machine], error) {
	return list[fleet.Machine](ctx, c, "/v1/machines", nil, p)
}

// Machines iterates over every machine.
func (c *Client) Machines(ctx context.Context) iter.Seq2[fleet.Machine, error] {
	return all(ctx, func(p Paging) (Page[fleet.Machine], error) { return c.ListMachines(ctx, p) })
}

// Machine returns one machine (get-machine).
func (c *Client) Machine(ctx context.Context, id string) (fleet.Machine, error) {
	return get[fleet.Machine](ctx, c, "/v1/machines/"+url.PathEscape(id), nil)
}

// RevokeMachine revokes a machine for good (revoke-machine).
func (c *Client) RevokeMachine(ctx context.Context, id, reason string) (fleet.Revocation, error) {
	return post[fleet.Revocation](ctx, c, "/v1/machines/"+url.PathEscape(id)+"/revoke", Revoke{Reason: reason}, true)
}

// CreateToken makes a join token (create-join-token). Its secret is in the answer and nowhere else.
func (c *Client) CreateToken(ctx context.Context, r TokenRequest) (Token, error) {
	return post[Token](ctx, c, "/v1/join-tokens", r, true)
}

// ListTokens returns a page of join tokens (list-join-tokens).
func (c *Client) ListTokens(ctx context.Context, p Paging) (Page[fleet.JoinToken], error) {
	return list[fleet.JoinToken](ctx, c, "/v1/join-tokens", nil, p)
}

// Tokens iterates over every join token.
func (c *Client) Tokens(ctx context.Context) iter.Seq2[fleet.JoinToken, error] {
	return all(ctx, func(p Paging) (Page[fleet.JoinToken], error) { return c.ListTokens(ctx, p) })
}

// DeleteToken ends a join token (delete-join-token).
func (c *Client) DeleteToken(ctx context.Context, id string) error {
	return c.remove(ctx, "/v1/join-tokens/"+url.PathEscape(id))
}

// ListWorkloads returns a page of workloads (list-workloads).
func (c *Client) ListWorkloads(ctx context.Context, f WorkloadFilter, p Paging) (Page[fleet.Workload], error) {
	return list[fleet.Workload](ctx, c, "/v1/workloads", f, p)
}

// Workloads iterates over every workload.
func (c *Client) Workloads(ctx context.Context, f WorkloadFilter) iter.Seq2[fleet.Workload, error] {
	return all(ctx, func(p Paging) (Page[fleet.Workload], error) { return c.ListWorkloads(ctx, f, p) })
}

// Workload returns one workload (get-workload).
func (c *Client) Workload(ctx context.Context, instance string) (fleet.Workload, error) {
	return get[fleet.Workload](ctx, c, "/v1/workloads/"+url.PathEscape(instance), nil)
}

// ExplainIdentity says which identity something earns, and why (explain-identity).
func (c *Client) ExplainIdentity(ctx context.Context, r ExplainRequest) (Explained, error) {
	return post[Explained](ctx, c, "/v1/identities/explain", r, false)
}

// Revoke withdraws trust (create-revocation).
func (c *Client) Revoke(ctx context.Context, r RevocationRequest) (fleet.Revocation, error) {
	return post[fleet.Revocation](ctx, c, "/v1/revocations", r, true)
}

// ListRevocations returns a page of revocations (list-revocations).
func (c *Client) ListRevocations(ctx context.Context, p Paging) (Page[fleet.Revocation], error) {
	return list[fleet.Revocation](ctx, c, "/v1/revocations", nil, p)
}

// Revocations iterates over every revocation.
func (c *Client) Revocations(ctx context.Context) iter.Seq2[fleet.Revocation, error] {
	return all(ctx, func(p Paging) (Page[fleet.Revocation], error) { return c.ListRevocations(ctx, p) })
}

// LiftRevocation ends a revocation (delete-revocation).
func (c *Client) LiftRevocation(ctx context.Context, id string) error {
	return c.remove(ctx, "/v1/revocations/"+url.PathEscape(id))
}

// Quarantine marks an identity or instance (create-quarantine).
func (c *Client) Quarantine(ctx context.Context, r QuarantineRequest) (fleet.Quarantine, error) {
	return post[fleet.Quarantine](ctx, c, "/v1/quarantines", r, true)
}

// ListQuarantines returns a page of quarantines (list-quarantines).
func (c *Client) ListQuarantines(ctx context.Context, p Paging) (Page[fleet.Quarantine], error) {
	return list[fleet.Quarantine](ctx, c, "/v1/quarantines", nil, p)
}

// Quarantines iterates over every quarantine.
func (c *Client) Quarantines(ctx context.Context) iter.Seq2[fleet.Quarantine, error] {
	return all(ctx, func(p Paging) (Page[fleet.Quarantine], error) { return c.ListQuarantines(ctx, p) })
}

// LiftQuarantine ends a quarantine (delete-quarantine).
func (c *Client) LiftQuarantine(ctx context.Context, id string) error {
	return c.remove(ctx, "/v1/quarantines/"+url.PathEscape(id))
}

// Authority returns the authority's keys and the next step of rotation (get-authority).
func (c *Client) Authority(ctx context.Context) (ca.Status, error) {
	return get[ca.Status](ctx, c, "/v1/authority", nil)
}

// PrepareAuthority makes the next keys (prepare-authority).
func (c *Client) PrepareAuthority(ctx context.Context) (ca.Status, error) {
	return post[ca.Status](ctx, c, "/v1/authority/prepare", nil, false)
}

// PublishAuthority puts the next JWT key into the bundle (publish-authority).
func (c *Client) PublishAuthority(ctx context.Context) (ca.Status, error) {
	return post[ca.Status](ctx, c, "/v1/authority/publish", nil, false)
}

// ActivateAuthority lets the next keys sign (activate-authority).
func (c *Client) ActivateAuthority(ctx context.Context) (ca.Status, error) {
	return post[ca.Status](ctx, c, "/v1/authority/activate", nil, false)
}

// RetireAuthority destroys the former keys (retire-authority).
func (c *Client) RetireAuthority(ctx context.Context) (ca.Status, error) {
	return post[ca.Status](ctx, c, "/v1/authority/retire", nil, false)
}

// Bundle returns the trust domain's public keys (get-bundle). It needs no credential.
func (c *Client) Bundle(ctx context.Context, td identity.TrustDomain) (*identity.Bundle, error) {
	var raw []byte
	if _, err := c.do(ctx, exchange{method: http.MethodGet, path: "/v1/bundle", out: &raw}); err != nil {
		return nil, err
	}
	return identity.ParseBundle(td, raw)
}

// Audit returns how the audit log stands, and what verifies it (get-audit).
func (c *Client) Audit(ctx context.Context) (AuditLog, error) {
	return get[AuditLog](ctx, c, "/v1/audit", nil)
}

// OpenAPI returns the API's own description, OpenAPI 3.1 in JSON.
func (c *Client) OpenAPI(ctx context.Context) (json.RawMessage, error) {
	var raw []byte
	_, err := c.do(ctx, exchange{method: http.MethodGet, path: "/v1/openapi.json", out: &raw})
	return raw, err
}
