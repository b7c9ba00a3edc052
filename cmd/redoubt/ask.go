package main

import (
	"context"
	"encoding/json"
	"regexp"
	"strings"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

// cedarUID is Type::"id"; shortUID is Type:id, which needs no quotes in a shell.
var (
	cedarUID = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_:]*)::"([^"\\]*)"$`)
	shortUID = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_]*):(.+)$`)
	actionID = regexp.MustCompile(`^(Run|Net|Api|Access)::(?:Action::)?"?([a-z]+)"?$`)
)

func parseUID(s string) (policy.UID, error) {
	for _, form := range []*regexp.Regexp{cedarUID, shortUID} {
		if m := form.FindStringSubmatch(s); m != nil {
			return policy.UID{Type: m[1], ID: m[2]}, nil
		}
	}
	return policy.UID{}, usagef("%q is no entity: write Service:payments, or Service::\"payments\"", s)
}

// ask makes the request out of three words and has it decided, by the server or by this machine.
func (c *cli) ask(ctx context.Context, args []string, circumstances, instance string, local bool) (*policy.Decision, error) {
	principal, err := parseUID(args[0])
	if err != nil {
		return nil, err
	}
	resource, err := parseUID(args[2])
	if err != nil {
		return nil, err
	}
	m := actionID.FindStringSubmatch(args[1])
	if m == nil {
		return nil, usagef("%q is no action: write Net::connect", args[1])
	}
	action := policy.Action(m[1], m[2])
	raw := map[string]json.RawMessage{}
	if circumstances != "" {
		if err := json.Unmarshal([]byte(circumstances), &raw); err != nil {
			return nil, usagef("--context is no JSON object: %v", err)
		}
	}
	if local {
		return c.askLocal(ctx, principal, action, resource, raw)
	}
	api, err := c.api()
	if err != nil {
		return nil, err
	}
	defer api.Close()
	if principal.Type == "Workload" && instance == "" {
		if instance, err = present(ctx, api, principal.ID); err != nil {
			return nil, err
		}
	}
	d, err := api.Ask(ctx, client.AskRequest{
		Principal: client.AskEntity{UID: principal}, Action: action, Resource: client.AskEntity{UID: resource}, Context: raw, Instance: instance,
	})
	return &d, err
}

// present finds the instance of a workload by service, identity or instance; "" of an identity that nothing bears.
func present(ctx context.Context, api *client.Client, name string) (string, error) {
	f := client.WorkloadFilter{State: "present", Service: name}
	switch {
	case strings.HasPrefix(name, "w-"):
		return name, nil
	case strings.HasPrefix(name, "spiffe://"):
		f.Service, f.Identity = "", name
	}
	page, err := api.ListWorkloads(ctx, f, client.Paging{Limit: 1})
	switch {
	case err != nil:
		return "", err
	case len(page.Items) > 0:
		return page.Items[0].Instance, nil
	case f.Identity != "":
		return "", nil // an identity may be asked about before anything bears it
	}
	return "", &refusal.Error{
		Kind: refusal.Unknown, Code: "unknown-workload", What: "workload " + name, Why: "no workload of that service is present",
		Do: "see redoubt get workloads, or ask about an identity: Workload:spiffe://…",
	}
}

func (c *cli) askLocal(ctx context.Context, principal, action, resource policy.UID, raw map[string]json.RawMessage) (*policy.Decision, error) {
	agent := c.agent()
	defer agent.Close()
	req := policy.Request{Principal: policy.Entity{UID: principal}, Action: action, Resource: policy.Entity{UID: resource}, Context: policy.Record{}}
	for k, v := range raw {
		value, err := plain(v)
		if err != nil {
			return nil, usagef("--context %s: %v", k, err)
		}
		req.Context[k] = value
	}
	workloads, err := agent.Workloads(ctx)
	if err != nil {
		return nil, err
	}
	for _, w := range workloads {
		if principal.Type == "Workload" && (w.Instance == principal.ID || w.Service == principal.ID || w.ID.String() == principal.ID) {
			req.Principal, req.Facts = eval.WorkloadEntity(w.ID, w.Facts), w.Facts
			break
		}
	}
	got, err := agent.Decide(ctx, req)
	if err != nil {
		return nil, err
	}
	return got.Decision, nil
}

// plain reads a value that the agent's own socket can carry.
func plain(raw json.RawMessage) (any, error) {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case string, bool:
		return v, nil
	case float64:
		if v == float64(int64(v)) {
			return int64(v), nil
		}
	}
	return nil, &refusal.Error{
		Kind: refusal.Invalid, Code: "ask-context", What: "a value of the context", Why: "only strings, booleans and whole numbers are taken with --local",
		Do: "ask the server, which takes all of Cedar's JSON",
	}
}
