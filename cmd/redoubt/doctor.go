package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sensor"
)

// report is what doctor prints. Without an agent it is the ledger alone.
type doctorReport struct {
	Machine     string              `json:"machine,omitempty"`
	Agent       string              `json:"agent"`
	Summary     string              `json:"summary"`
	Status      *machine.Status     `json:"status,omitempty"`
	Connection  json.RawMessage     `json:"connection,omitempty"`
	Spool       json.RawMessage     `json:"spool,omitempty"`
	Protections []policy.Protection `json:"protections"`
	WhenUnsure  []string            `json:"when_unsure,omitempty"`
	Ledger      *sensor.Ledger      `json:"ledger"`
}

func (c *cli) doctorVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine can enforce, what is enforced, and on what proof",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agent := c.agent()
			defer agent.Close()
			var report doctorReport
			raw, err := agent.Doctor(cmd.Context())
			switch r := refusal.As(err); {
			case err == nil:
				if err := json.Unmarshal(raw, &report); err != nil {
					return err
				}
				report.Agent = "running"
			case r != nil && r.Code == "agent-away":
				root, _ := attest.CgroupRoot() // without one the ledger says so of every cgroup hook
				ledger, err := sensor.Probe(cmd.Context(), root)
				if err != nil {
					return err
				}
				report.Agent = "not running: " + r.Why
				report.Ledger, report.Summary, report.Protections = ledger, ledger.Summary(), []policy.Protection{}
			default:
				return err
			}
			return c.show(report, report.print)
		},
	}
}

func (r doctorReport) print(w io.Writer) {
	_, _ = fmt.Fprintf(w, "agent    %s\n", r.Agent)
	if r.Status != nil {
		_, _ = fmt.Fprintf(w, "machine  %s, policy set %d, %d workloads\n", r.Machine, r.Status.PolicySet, r.Status.Workloads)
		if r.Status.Released != nil {
			_, _ = fmt.Fprintf(w, "RELEASED by %s at %s: nothing is refused here (end it with redoubt release --resume)\n",
				printable(r.Status.Released.Actor), when(r.Status.Released.Time))
		}
	}
	_, _ = fmt.Fprintf(w, "kernel   %s\n\n", r.Summary)
	if len(r.Protections) > 0 {
		printProtections(w, r.Protections)
		_, _ = fmt.Fprintln(w)
	}
	table(w, "CAPABILITY\tWORKS\tFROM\tUSED FOR, OR THE KERNEL'S ANSWER", func(line func(...any)) {
		for _, e := range r.Ledger.Entries {
			works, note := "yes", e.Means
			if !e.Works {
				works, note = "no", e.Error
			}
			line(e.Name, works, e.Least, note)
		}
	})
	if len(r.WhenUnsure) > 0 {
		_, _ = fmt.Fprintln(w, "\nWhen a part is gone:")
		for _, l := range r.WhenUnsure {
			_, _ = fmt.Fprintln(w, "  - "+l)
		}
	}
}

func printProtections(w io.Writer, protections []policy.Protection) {
	table(w, "PROTECTION\tOF\tSTATE\tPROVED, OR REASON", func(line func(...any)) {
		for _, p := range protections {
			of := p.Workload
			if of == "" {
				of = p.Machine
			}
			detail := p.Reason
			if p.State == policy.Enforced {
				detail = "proved " + when(p.Proved)
			} else if p.Change != "" {
				detail += " (" + p.Change + ")"
			}
			line(p.Name, of, p.State, detail)
		}
	})
}
