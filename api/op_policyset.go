package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// applyTime bounds the operations that parse a whole policy set.
const applyTime = time.Minute

func addPolicySet(s *server) {
	register(s, operation{
		id: "get-policy-set", section: sectionPolicySet, method: http.MethodGet, path: "/v1/policy-set",
		summary: "The policy set in force", description: "Its edition and files. Its ETag is what If-Match of a change wants.",
	}, s.getPolicySet)
	register(s, operation{
		id: "apply-policy-set", section: sectionPolicySet, method: http.MethodPut, path: "/v1/policy-set",
		summary: "Apply a policy set", replaces: true, maxBody: filesBody, limit: applyTime,
		description: "The files become the next edition, at once and as a whole, or are refused as a whole with everything that is " +
			"wrong with them. With `confirm_within` the former edition returns unless this one is confirmed in time. With " +
			"`dry_run` they are checked and compared only.",
		refuses: []refusal.Kind{refusal.Invalid, refusal.Conflict},
	}, s.applyPolicySet)
	register(s, operation{
		id: "confirm-policy-set", section: sectionPolicySet, method: http.MethodPost, path: "/v1/policy-set/confirm",
		summary: "Confirm the policy set", tagged: true, maxBody: defaultBody, description: "The edition that waits for it stays.",
		refuses: []refusal.Kind{refusal.Invalid, refusal.Conflict},
	}, s.confirmPolicySet)
	register(s, operation{
		id: "rollback-policy-set", section: sectionPolicySet, method: http.MethodPost, path: "/v1/policy-set/rollback",
		summary: "Roll the policy set back", replaces: true, maxBody: defaultBody, limit: applyTime,
		description: "Puts the files of a former edition in force again, as a new edition; 0 is the built-in set. It also ends the " +
			"wait of an edition that is not confirmed yet.",
		refuses: []refusal.Kind{refusal.Invalid, refusal.Conflict, refusal.Unknown},
	}, s.rollbackPolicySet)
	register(s, operation{
		id: "diff-policy-set", section: sectionPolicySet, method: http.MethodPost, path: "/v1/policy-set/diff",
		summary: "Compare files with the policy set in force", maxBody: filesBody, limit: applyTime,
		description: "Policy by policy and document by document. Nothing is checked or changed.",
		refuses:     []refusal.Kind{refusal.Invalid},
	}, s.diffPolicySet)
}

// setTag is the entity tag of an edition in force: it changes with whatever an operator would want to have seen.
func setTag(e set.Edition) string {
	return fmt.Sprintf("v%d-%s-%s", e.Version, orActive(e.State), bodyTag([]byte(e.Digest+e.ConfirmBy.String())))
}

func orActive(state set.EditionState) set.EditionState {
	if state == "" {
		return set.EditionActive // the built-in set
	}
	return state
}

type editionOutput struct {
	ETag string `header:"ETag" doc:"Of this version; what If-Match wants."`
	Body set.Edition
}

func (s *server) getPolicySet(context.Context, *call, *nothing) (*editionOutput, error) {
	current, edition := s.policies.Current()
	edition.Files = current.Files()
	return &editionOutput{ETag: quote(setTag(edition)), Body: edition}, nil
}

type appliedOutput struct {
	ETag string `header:"ETag" doc:"Of the policy set now in force."`
	Body client.Applied
}

type applyInput struct {
	Body client.ApplyRequest
}

func (s *server) applyPolicySet(ctx context.Context, c *call, in *applyInput) (*appliedOutput, error) {
	_, before := s.policies.Current()
	if err := matched(c.header, "the policy set", setTag(before), true); err != nil {
		return nil, err
	}
	rec := c.record("policy-set.apply", "policy-set")
	edition, diff, err := s.policies.Apply(ctx, in.Body.Files, set.ApplyOptions{
		Expect: before.Version, ConfirmWithin: time.Duration(in.Body.ConfirmWithin), Author: c.who.actor(), Note: in.Body.Note,
		DryRun: in.Body.DryRun,
	}, rec)
	if err != nil {
		return nil, err
	}
	return s.applied(c, before, edition, diff, in.Body.Files, in.Body.DryRun), nil
}

// applied makes the answer to a change of the set. Files that were in force already made no edition, and no record.
func (s *server) applied(c *call, before, edition set.Edition, diff set.Diff, files []set.File, dry bool) *appliedOutput {
	changed := !dry && edition.Version != before.Version
	if !changed {
		c.unchanged()
	}
	_, now := s.policies.Current()
	out := &appliedOutput{ETag: quote(setTag(now)), Body: client.Applied{
		Edition: edition, Diff: whole(diff), Changed: changed, Notices: []set.Notice{},
	}}
	if parsed, err := set.Parse(files); err == nil && len(files) > 0 {
		out.Body.Notices = append(out.Body.Notices, set.Unenforced(parsed, s.enforced...)...)
	}
	return out
}

// whole returns d with lists that render as lists.
func whole(d set.Diff) set.Diff {
	d.Files = append([]set.FileChange{}, d.Files...)
	d.Changes = append([]set.Change{}, d.Changes...)
	return d
}

type confirmInput struct {
	Body client.ConfirmRequest
}

func (s *server) confirmPolicySet(ctx context.Context, c *call, in *confirmInput) (*editionOutput, error) {
	_, before := s.policies.Current()
	if err := matched(c.header, "the policy set", setTag(before), false); err != nil {
		return nil, err
	}
	edition, err := s.policies.Confirm(ctx, in.Body.Version, c.record("policy-set.confirm", strconv.FormatUint(in.Body.Version, 10)))
	if err != nil {
		return nil, err
	}
	return &editionOutput{ETag: quote(setTag(edition)), Body: edition}, nil
}

type rollbackInput struct {
	Body client.RollbackRequest
}

func (s *server) rollbackPolicySet(ctx context.Context, c *call, in *rollbackInput) (*appliedOutput, error) {
	_, before := s.policies.Current()
	if err := matched(c.header, "the policy set", setTag(before), true); err != nil {
		return nil, err
	}
	rec := c.record("policy-set.rollback", strconv.FormatUint(in.Body.To, 10))
	edition, diff, err := s.policies.Rollback(ctx, in.Body.To, set.ApplyOptions{
		Expect: before.Version, ConfirmWithin: time.Duration(in.Body.ConfirmWithin), Author: c.who.actor(), Note: in.Body.Note,
		DryRun: in.Body.DryRun,
	}, rec)
	if err != nil {
		return nil, err
	}
	return s.applied(c, before, edition, diff, nil, in.Body.DryRun), nil
}

type diffInput struct {
	Body client.DiffRequest
}

func (s *server) diffPolicySet(_ context.Context, _ *call, in *diffInput) (*body[set.Diff], error) {
	current, _ := s.policies.Current()
	return &body[set.Diff]{whole(set.Difference(current.Files(), in.Body.Files))}, nil
}
