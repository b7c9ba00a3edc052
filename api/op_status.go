package api

import (
	"context"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// The sections of the API: tags of the document, and Operation::"<section>" in policies.
const (
	sectionStatus      = "status"
	sectionMachine     = "machine"
	sectionToken       = "join-token"
	sectionWorkload    = "workload"
	sectionIdentity    = "identity"
	sectionPolicySet   = "policy-set"
	sectionObservation = "observation"
	sectionDecision    = "decision"
	sectionEvent       = "event"
	sectionProtection  = "protection"
	sectionAuthority   = "authority"
	sectionRevocation  = "revocation"
	sectionQuarantine  = "quarantine"
	sectionAudit       = "audit"
)

var sections = []*huma.Tag{
	{Name: sectionStatus, Description: "The server."},
	{Name: sectionMachine, Description: "Hosts whose agents joined."},
	{Name: sectionToken, Description: "Secrets with which agents join, once each."},
	{Name: sectionWorkload, Description: "What runs on the machines."},
	{Name: sectionIdentity, Description: "Which identity facts earn."},
	{Name: sectionPolicySet, Description: "What `redoubt apply` takes, in versions."},
	{Name: sectionObservation, Description: "The panic switch: observe instead of enforce, for a time."},
	{Name: sectionDecision, Description: "Answers of policy, and why."},
	{Name: sectionEvent, Description: "What happened."},
	{Name: sectionProtection, Description: "What is enforced where, and on what proof."},
	{Name: sectionAuthority, Description: "The trust domain's keys."},
	{Name: sectionRevocation, Description: "Trust withdrawn from identities, machines and keys."},
	{Name: sectionQuarantine, Description: "Identities and instances marked as suspicious."},
	{Name: sectionAudit, Description: "The tamper-evident log of changes."},
}

func addStatus(s *server) {
	register(s, operation{
		id: "get-status", section: sectionStatus, method: http.MethodGet, path: "/v1/status", summary: "The server in a few lines",
		description: "Version, clock, the policy set in force, the audit log, and what an operator should look at.",
	}, s.getStatus)
	register(s, operation{
		id: "list-protections", section: sectionProtection, method: http.MethodGet, path: "/v1/protections",
		summary: "What is enforced where",
		description: "Every protection of every machine and workload: enforced (with the time of the last proof), observed, or not " +
			"enforceable (with the reason, and what would change it).",
	}, s.listProtections)
}

func (s *server) getStatus(ctx context.Context, _ *call, _ *nothing) (*body[client.Status], error) {
	log, err := s.audit.Status(ctx)
	if err != nil {
		return nil, err
	}
	_, edition := s.policies.Current()
	out := client.Status{
		Version: s.version, TrustDomain: s.trustDomain, Started: s.started, Time: s.now().UTC(),
		PolicySet: summaryOf(edition), Overrides: len(s.overrides.Overrides()), Audit: log, Problems: []string{},
	}
	if log.Failing != "" {
		out.Problems = append(out.Problems, "the audit log: "+log.Failing)
	}
	if edition.State == set.EditionPending {
		out.Problems = append(out.Problems, "edition "+strconv.FormatUint(edition.Version, 10)+
			" of the policy set returns to the one before unless it is confirmed")
	}
	if out.Overrides > 0 {
		out.Problems = append(out.Problems, "the panic switch is on: some workloads are observed, not enforced")
	}
	out.Problems = append(out.Problems, s.rotation.Status().Problems...)
	if e, ok := s.events.(interface{ Dropped() uint64 }); ok {
		if n := e.Dropped(); n > 0 {
			out.Problems = append(out.Problems, "events of the server, decisions among them perhaps, that were dropped "+
				"since it began, for want of room or of a store that works: "+strconv.FormatUint(n, 10))
		}
	}
	if e, ok := s.events.(interface{ PublishProblem() string }); ok {
		if problem := e.PublishProblem(); problem != "" {
			out.Problems = append(out.Problems, "the policy set in force did not reach the agents: "+problem)
		}
	}
	return &body[client.Status]{out}, nil
}

func summaryOf(e set.Edition) client.EditionSummary {
	return client.EditionSummary{Version: e.Version, Digest: e.Digest, State: e.State, ConfirmBy: e.ConfirmBy}
}

type protectionsInput struct {
	client.Paging
	client.ProtectionFilter
}

func (s *server) listProtections(ctx context.Context, c *call, in *protectionsInput) (*pageOutput[policy.Protection], error) {
	var all []policy.Protection
	if s.protections != nil {
		var err error
		if all, err = s.protections.Protections(ctx); err != nil {
			return nil, err
		}
	}
	list := listName(c.op.id, in.Machine, in.Workload, in.State)
	begin, err := numberCursor(list, in.Cursor, 0)
	if err != nil {
		return nil, err
	}
	var page []policy.Protection
	last := begin
	for i := begin; i < uint64(len(all)) && len(page) <= in.Limit; i++ {
		p := all[i]
		if (in.Machine == "" || p.Machine == in.Machine) && (in.Workload == "" || p.Workload == in.Workload) &&
			(in.State == "" || string(p.State) == in.State) {
			if page = append(page, p); len(page) <= in.Limit {
				last = i + 1
			}
		}
	}
	return pageOf(c, list, page, in.Limit, func(policy.Protection) string { return strconv.FormatUint(last, 10) }), nil
}
