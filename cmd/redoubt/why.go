package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func (c *cli) whyVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "why DECISION",
		Short: "Explain a decision: who, what, by which policy, and what nearly applied",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := c.decision(cmd.Context(), policy.ID(args[0]))
			if err != nil {
				return err
			}
			return c.show(d, func(w io.Writer) { explain(w, d) })
		},
	}
}

// decision asks the server and, where it does not know or is away, this machine's agent.
func (c *cli) decision(ctx context.Context, id policy.ID) (*policy.Decision, error) {
	api, err := c.api()
	if err == nil {
		defer api.Close()
		var known client.Known
		if known, err = api.Decision(ctx, id); err == nil && len(known.Told) > 0 {
			return &known.Told[0].Decision, nil
		}
	}
	if r := refusal.As(err); r != nil && r.Kind != refusal.Unknown && r.Kind != refusal.Unavailable && r.Code != codeNoOperator {
		return nil, err
	}
	agent := c.agent()
	defer agent.Close()
	d, localErr := agent.Decision(ctx, id)
	if localErr != nil {
		return nil, err // what the server said is the better answer
	}
	return d, nil
}

// explain prints a decision for people.
func explain(w io.Writer, d *policy.Decision) {
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	verdict := strings.ToUpper(string(d.Verdict))
	switch {
	case d.WouldDeny():
		verdict += ", let through: observe mode"
	case d.Explanation.Reason == policy.ReasonReleased:
		verdict += ", let through: this machine is released"
	}
	line("decision   %s", d.ID)
	line("verdict    %s (%s)", verdict, d.Explanation.Reason)
	line("because    %s", printable(d.Explanation.Summary))
	line("time       %s at %s, point %s, policy set %d", d.Time.UTC().Format(time.RFC3339Nano), d.Machine, orDash(d.Request.Point), d.Edition)
	line("principal  %s", printable(d.Request.Principal.UID.String()))
	for _, p := range d.Request.Principal.Parents {
		line("           in %s", printable(p.String()))
	}
	for _, k := range slices.Sorted(maps.Keys(d.Request.Principal.Tags)) {
		line("           label %s = %s", printable(k), printable(d.Request.Principal.Tags[k]))
	}
	for _, f := range d.Request.Facts.All() {
		line("           fact %s = %s  (%s, epoch %d)", f.Name, printable(fmt.Sprint(f.Value)), f.Source, f.Epoch)
	}
	line("action     %s", printable(d.Request.Action.String()))
	line("resource   %s", printable(d.Request.Resource.UID.String()))
	for _, p := range d.Request.Resource.Parents {
		line("           in %s", printable(p.String()))
	}
	for _, k := range slices.Sorted(maps.Keys(d.Request.Context)) {
		raw, _ := json.Marshal(d.Request.Context[k])
		line("context    %s = %s", printable(k), printable(string(raw)))
	}
	for _, p := range d.Explanation.Deciding {
		line("decided by %s %q in %s", p.Effect, p.ID, p.File)
	}
	for _, m := range d.Explanation.Nearest {
		line("nearest    %s %q in %s did not apply:", m.Policy.Effect, m.Policy.ID, m.Policy.File)
		for _, why := range m.Why {
			line("           - %s", printable(why))
		}
	}
	for _, f := range d.Explanation.Failures {
		line("failed     %s %q in %s: %s", f.Policy.Effect, f.Policy.ID, f.Policy.File, printable(f.Error))
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
