package main

import (
	"cmp"
	"context"
	"strings"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// listers are the kinds of `redoubt get`.
func (c *cli) listers() map[string]lister {
	return map[string]lister{
		"machines": of(func(ctx context.Context, api *client.Client) func(func(fleet.Machine, error) bool) {
			return api.Machines(ctx)
		},
			"MACHINE\tSTATE\tVERSION\tJOINED\tLAST SEEN", func(m fleet.Machine) []any {
				state := string(m.State)
				if m.Lost && m.State == fleet.MachineJoined {
					state = "lost"
				}
				return []any{m.ID, state, m.Version, when(m.Joined), when(m.LastSeen)}
			}),
		"workloads": of(func(ctx context.Context, api *client.Client) func(func(fleet.Workload, error) bool) {
			return api.Workloads(ctx, client.WorkloadFilter{})
		}, "INSTANCE\tSERVICE\tMACHINE\tSTATE\tIDENTITY, OR WHY NONE", func(w fleet.Workload) []any {
			id := w.ID.String()
			if w.Refusal != nil {
				id = "none: " + shorten(w.Refusal.Why, 80)
			}
			return []any{w.Instance, w.Service, w.Machine, w.State, id}
		}),
		"tokens": of(func(ctx context.Context, api *client.Client) func(func(fleet.JoinToken, error) bool) {
			return api.Tokens(ctx)
		},
			"TOKEN\tMACHINE\tEXPIRES\tUSED", func(t fleet.JoinToken) []any {
				return []any{t.ID, t.Machine, when(t.Expires), when(t.Used)}
			}),
		"editions": of(func(ctx context.Context, api *client.Client) func(func(set.Edition, error) bool) {
			return api.PolicySets(ctx)
		},
			"VERSION\tSTATE\tCAUSE\tCREATED\tAUTHOR\tNOTE", func(e set.Edition) []any {
				return []any{e.Version, e.State, e.Cause, when(e.Created), e.Author, e.Note}
			}),
		"overrides": of(func(ctx context.Context, api *client.Client) func(func(set.Override, error) bool) {
			return api.Observations(ctx)
		},
			"OVERRIDE\tFOR\tUNTIL\tAUTHOR\tNOTE", func(o set.Override) []any {
				return []any{o.ID, selectorText(o.All, o.Service, o.Machine, o.Labels), when(o.Expires), o.Author, o.Note}
			}),
		"decisions": of(func(ctx context.Context, api *client.Client) func(func(policy.Decision, error) bool) {
			return api.Decisions(ctx, client.DecisionFilter{})
		}, "DECISION\tTIME\tVERDICT\tMODE\tPRINCIPAL\tACTION\tRESOURCE", func(d policy.Decision) []any {
			return []any{
				d.ID, when(d.Time), d.Verdict, d.Mode, d.Request.Principal.UID, strings.Replace(d.Request.Action.Type, "::Action", "", 1) + "::" + d.Request.Action.ID,
				d.Request.Resource.UID,
			}
		}),
		"revocations": of(func(ctx context.Context, api *client.Client) func(func(fleet.Revocation, error) bool) {
			return api.Revocations(ctx)
		},
			"REVOCATION\tOF\tUNTIL\tREASON", func(r fleet.Revocation) []any {
				return []any{r.ID, cmp.Or(r.Identity.String(), r.Machine, r.SPKI), when(r.Expires), r.Reason}
			}),
		"quarantines": of(func(ctx context.Context, api *client.Client) func(func(fleet.Quarantine, error) bool) {
			return api.Quarantines(ctx)
		},
			"QUARANTINE\tOF\tUNTIL\tREASON", func(q fleet.Quarantine) []any {
				return []any{q.ID, cmp.Or(q.Identity.String(), q.Instance), when(q.Expires), q.Reason}
			}),
		"protections": of(func(ctx context.Context, api *client.Client) func(func(policy.Protection, error) bool) {
			return api.Protections(ctx, client.ProtectionFilter{})
		}, "PROTECTION\tOF\tSTATE\tPROVED\tREASON", func(p policy.Protection) []any {
			return []any{p.Name, cmp.Or(p.Workload, p.Machine), p.State, when(p.Proved), p.Reason}
		}),
	}
}
