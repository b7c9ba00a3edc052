package client

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// PolicySet returns the policy set in force with its files, and the ETag that a change of it wants (get-policy-set).
func (c *Client) PolicySet(ctx context.Context) (edition set.Edition, etag string, err error) {
	header, err := c.do(ctx, exchange{method: http.MethodGet, path: "/v1/policy-set", out: &edition})
	return edition, header.Get("ETag"), err
}

// ApplyPolicySet puts files in force, in the place of the version that etag names (apply-policy-set). Errors: a refusal
// whose cause, a *[Problem], lists every defect of every file.
func (c *Client) ApplyPolicySet(ctx context.Context, r ApplyRequest, etag string) (Applied, error) {
	var out Applied
	_, err := c.do(ctx, exchange{method: http.MethodPut, path: "/v1/policy-set", in: r, out: &out, ifMatch: etag})
	return out, err
}

// ConfirmPolicySet confirms an edition that waits for it: this version, and no other (confirm-policy-set).
func (c *Client) ConfirmPolicySet(ctx context.Context, version uint64) (set.Edition, error) {
	return post[set.Edition](ctx, c, "/v1/policy-set/confirm", ConfirmRequest{Version: version}, false)
}

// RollbackPolicySet puts the files of a former edition in force again, in the place of the version that etag names
// (rollback-policy-set).
func (c *Client) RollbackPolicySet(ctx context.Context, r RollbackRequest, etag string) (Applied, error) {
	var out Applied
	_, err := c.do(ctx, exchange{method: http.MethodPost, path: "/v1/policy-set/rollback", in: r, out: &out, ifMatch: etag})
	return out, err
}

// DiffPolicySet compares files with the set in force (diff-policy-set).
func (c *Client) DiffPolicySet(ctx context.Context, files []set.File) (set.Diff, error) {
	return post[set.Diff](ctx, c, "/v1/policy-set/diff", DiffRequest{Files: files}, false)
}

// ListPolicySets returns a page of editions, newest first, without their files (list-policy-sets).
func (c *Client) ListPolicySets(ctx context.Context, p Paging) (Page[set.Edition], error) {
	return list[set.Edition](ctx, c, "/v1/policy-sets", nil, p)
}

// PolicySets iterates over every edition that is kept.
func (c *Client) PolicySets(ctx context.Context) iter.Seq2[set.Edition, error] {
	return all(ctx, func(p Paging) (Page[set.Edition], error) { return c.ListPolicySets(ctx, p) })
}

// PolicySetVersion returns one edition with its files (get-policy-set-version).
func (c *Client) PolicySetVersion(ctx context.Context, version uint64) (set.Edition, error) {
	return get[set.Edition](ctx, c, "/v1/policy-sets/"+strconv.FormatUint(version, 10), nil)
}

// DiffPolicySetVersions says what changed from one edition to another (diff-policy-set-versions).
func (c *Client) DiffPolicySetVersions(ctx context.Context, from, to uint64) (set.Diff, error) {
	return get[set.Diff](ctx, c, "/v1/policy-sets/"+strconv.FormatUint(to, 10)+"/diff", url.Values{"from": {strconv.FormatUint(from, 10)}})
}

// Observe pulls the panic switch (create-observation).
func (c *Client) Observe(ctx context.Context, r ObserveRequest) (set.Override, error) {
	return post[set.Override](ctx, c, "/v1/observations", r, true)
}

// ListObservations returns a page of the pulls in force (list-observations).
func (c *Client) ListObservations(ctx context.Context, p Paging) (Page[set.Override], error) {
	return list[set.Override](ctx, c, "/v1/observations", nil, p)
}

// Observations iterates over every pull in force.
func (c *Client) Observations(ctx context.Context) iter.Seq2[set.Override, error] {
	return all(ctx, func(p Paging) (Page[set.Override], error) { return c.ListObservations(ctx, p) })
}

// EndObserve ends a pull before it expires (delete-observation).
func (c *Client) EndObserve(ctx context.Context, id string) error {
	return c.remove(ctx, "/v1/observations/"+url.PathEscape(id))
}

// Ask asks for a decision, which is recorded (ask-decision).
func (c *Client) Ask(ctx context.Context, r AskRequest) (policy.Decision, error) {
	return post[policy.Decision](ctx, c, "/v1/decisions", r, false)
}

// ListDecisions returns a page of decisions, newest first (list-decisions).
func (c *Client) ListDecisions(ctx context.Context, f DecisionFilter, p Paging) (Page[policy.Decision], error) {
	return list[policy.Decision](ctx, c, "/v1/decisions", f, p)
}

// Decisions iterates over every decision that is kept.
func (c *Client) Decisions(ctx context.Context, f DecisionFilter) iter.Seq2[policy.Decision, error] {
	return all(ctx, func(p Paging) (Page[policy.Decision], error) { return c.ListDecisions(ctx, f, p) })
}

// Decision returns what the server was told of a decision (get-decision).
func (c *Client) Decision(ctx context.Context, id policy.ID) (Known, error) {
	return get[Known](ctx, c, "/v1/decisions/"+url.PathEscape(string(id)), nil)
}
