package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/refusal"
)

func (c *cli) releaseVerb() *cobra.Command {
	var in local.Release
	cmd := &cobra.Command{
		Use:   "release [--reason TEXT]",
		Short: "Break-glass: lift everything on this machine, without the server; recorded",
		Long: "Lifts everything that Redoubt refuses on this machine: what is pinned in the kernel is unpinned, and every decision\n" +
			"lets its request through. It needs no server and not even a running agent, survives a restart, is recorded, and ends\n" +
			"with redoubt release --resume.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			agent := c.agent()
			defer agent.Close()
			r, err := agent.Release(cmd.Context(), in)
			if e := refusal.As(err); e != nil && e.Code == "agent-away" {
				r, err = redoubt.ReleaseOffline(cmd.Context(), c.agentDir(), in.Reason, in.Resume)
			}
			if err != nil {
				return err
			}
			if in.Resume {
				return c.show(map[string]bool{"released": false}, func(w io.Writer) {
					_, _ = fmt.Fprintln(w, "resumed: policy is in force on this machine again")
				})
			}
			return c.show(r, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "released as %s: nothing is refused on this machine until redoubt release --resume\n", r.ID)
				for _, l := range r.Lifted {
					_, _ = fmt.Fprintln(w, "lifted "+l)
				}
				for _, l := range r.Stays {
					_, _ = fmt.Fprintln(w, "stays: "+l)
				}
				if r.Failure != "" {
					_, _ = fmt.Fprintln(w, "not lifted: "+r.Failure)
				}
			})
		},
	}
	cmd.Flags().StringVar(&in.Reason, "reason", "", "why, for the record")
	cmd.Flags().BoolVar(&in.Resume, "resume", false, "end the release")
	return cmd
}
