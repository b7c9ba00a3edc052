package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

func (c *cli) applyVerb() *cobra.Command {
	var dir, within, note string
	var dry bool
	cmd := &cobra.Command{
		Use:   "apply -f DIR [--confirm-within 5m] [--dry-run]",
		Short: "Put a policy set in force, as a whole; it returns by itself unless confirmed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := duration("confirm-within", within)
			if err != nil {
				return err
			}
			files, _, left, err := readSet(dir)
			if err != nil {
				return err
			}
			if len(files) == 0 {
				return &refusal.Error{
					Kind: refusal.Invalid, Code: "no-files", What: "apply " + dir, Why: "there is no *.cedar, *.yaml or *.yml in it",
					Do: "name another directory; redoubt rollback --to 0 puts the built-in set in force",
				}
			}
			return c.withAPI(func(api *client.Client) error {
				_, etag, err := api.PolicySet(cmd.Context())
				if err != nil {
					return err
				}
				got, err := api.ApplyPolicySet(cmd.Context(), client.ApplyRequest{Files: files, ConfirmWithin: d, DryRun: dry, Note: note}, etag)
				if err != nil {
					return err
				}
				return c.show(got, func(w io.Writer) {
					printApplied(w, got, dry)
					for _, l := range left {
						_, _ = fmt.Fprintf(w, "left out: %s (not .cedar, .yaml or .yml)\n", printable(l))
					}
				})
			})
		},
	}
	filesFlag(cmd, &dir)
	cmd.Flags().StringVar(&within, "confirm-within", "", "return to the former set unless redoubt confirm is run within this time")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "check and compare only")
	cmd.Flags().StringVar(&note, "note", "", "for those who read the history")
	return cmd
}

func printApplied(w io.Writer, got client.Applied, dry bool) {
	printDiff(w, got.Diff)
	for _, n := range got.Notices {
		_, _ = fmt.Fprintln(w, printable(n.String()))
	}
	switch {
	case dry:
		_, _ = fmt.Fprintln(w, "dry run: nothing was changed")
	case !got.Changed:
		_, _ = fmt.Fprintf(w, "policy set %d is in force already, unchanged\n", got.Edition.Version)
	case got.Edition.State == set.EditionPending:
		_, _ = fmt.Fprintf(w, "policy set %d is in force until %s; keep it with redoubt confirm\n", got.Edition.Version, when(got.Edition.ConfirmBy))
	default:
		_, _ = fmt.Fprintf(w, "policy set %d is in force\n", got.Edition.Version)
	}
}

func printDiff(w io.Writer, d set.Diff) {
	for _, ch := range d.Changes {
		_, _ = fmt.Fprintf(w, "%s %s %s (%s)\n", ch.Op, ch.Kind, printable(ch.Name), printable(ch.File))
		for _, part := range []struct{ sign, text string }{{"-", ch.Before}, {"+", ch.After}} {
			if part.text == "" {
				continue
			}
			for line := range strings.Lines(part.text) {
				_, _ = fmt.Fprintf(w, "  %s %s\n", part.sign, printable(strings.TrimRight(line, "\n")))
			}
		}
	}
}

func (c *cli) diffVerb() *cobra.Command {
	var dir string
	var from, to uint64
	cmd := &cobra.Command{
		Use:   "diff -f DIR | --from VERSION --to VERSION",
		Short: "Compare a directory with the policy set in force, or two versions; exit 1 if they differ",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			byVersion := cmd.Flags().Changed("from") || cmd.Flags().Changed("to")
			if byVersion == (dir != "") {
				return usagef("redoubt diff takes either -f DIR, or --from and --to")
			}
			return c.withAPI(func(api *client.Client) error {
				var d set.Diff
				var err error
				if byVersion {
					d, err = api.DiffPolicySetVersions(cmd.Context(), from, to)
				} else {
					var files []set.File
					if files, _, _, err = readSet(dir); err != nil {
						return err
					}
					d, err = api.DiffPolicySet(cmd.Context(), files)
				}
				if err != nil {
					return err
				}
				if err := c.show(d, func(w io.Writer) { printDiff(w, d) }); err != nil {
					return err
				}
				if !d.Empty() {
					return exitStatus(exitFailed)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVarP(&dir, "file", "f", "", "directory to compare")
	cmd.Flags().Uint64Var(&from, "from", 0, "older version")
	cmd.Flags().Uint64Var(&to, "to", 0, "newer version")
	return cmd
}

func (c *cli) confirmVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "confirm",
		Short: "Keep the policy set that was applied with --confirm-within",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAPI(func(api *client.Client) error {
				edition, _, err := api.PolicySet(cmd.Context())
				if err != nil {
					return err
				}
				if edition, err = api.ConfirmPolicySet(cmd.Context(), edition.Version); err != nil {
					return err
				}
				return c.show(edition, func(w io.Writer) { _, _ = fmt.Fprintf(w, "policy set %d stays in force\n", edition.Version) })
			})
		},
	}
}

func (c *cli) rollbackVerb() *cobra.Command {
	var to uint64
	var within, note string
	var dry bool
	cmd := &cobra.Command{
		Use:   "rollback [--to VERSION]",
		Short: "Put an earlier policy set back in force (default: the newest that stayed and differs)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := duration("confirm-within", within)
			if err != nil {
				return err
			}
			return c.withAPI(func(api *client.Client) error {
				edition, etag, err := api.PolicySet(cmd.Context())
				if err != nil {
					return err
				}
				if !cmd.Flags().Changed("to") {
					if to, err = former(cmd.Context(), api, edition); err != nil {
						return err
					}
				}
				got, err := api.RollbackPolicySet(cmd.Context(), client.RollbackRequest{To: to, ConfirmWithin: d, DryRun: dry, Note: note}, etag)
				if err != nil {
					return err
				}
				return c.show(got, func(w io.Writer) { printApplied(w, got, dry) })
			})
		},
	}
	cmd.Flags().Uint64Var(&to, "to", 0, "version whose files to put back; 0 is the built-in set")
	cmd.Flags().StringVar(&within, "confirm-within", "", "return unless confirmed within this time")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "compare only")
	cmd.Flags().StringVar(&note, "note", "", "for those who read the history")
	return cmd
}

// former returns the newest edition before the current one that stayed in force until another took its place, and has
// other files. One that was put back since nobody confirmed it is what an operator wants to get away from, and the edition
// that was put back in its place says nothing new. Of one that waits to be confirmed it is the one it would return to.
func former(ctx context.Context, api *client.Client, current set.Edition) (uint64, error) {
	if current.State == set.EditionPending {
		return current.Version - 1, nil
	}
	for e, err := range api.PolicySets(ctx) {
		if err != nil {
			return 0, err
		}
		if e.Version < current.Version && e.State == set.EditionSuperseded && e.Digest != current.Digest {
			return e.Version, nil
		}
	}
	return 0, &refusal.Error{
		Kind: refusal.Unknown, Code: "no-former-edition", What: "rollback",
		Why: "no other policy set that is kept was in force before this one and stayed",
		Do:  "name a version with --to (redoubt get editions lists them; 0 is the built-in set)",
	}
}

func (c *cli) observeVerb() *cobra.Command {
	var selector, expires, note, end string
	var all bool
	cmd := &cobra.Command{
		Use:   "observe --all | --for SELECTOR [--expires 1h] | --end ID",
		Short: "Panic switch: let everything through and record it, until it expires by itself",
		Long: "Puts workloads into observe mode: what would be refused goes through and is recorded. It ends by itself. Selectors are\n" +
			"service=NAME, machine=ID and label.KEY=VALUE, joined by commas.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if given := btoi(all) + btoi(selector != "") + btoi(end != ""); given != 1 {
				return usagef("redoubt observe takes one of --all, --for and --end")
			}
			d, err := duration("expires", expires)
			if err != nil {
				return err
			}
			return c.withAPI(func(api *client.Client) error {
				if end != "" {
					return api.EndObserve(cmd.Context(), end)
				}
				s := set.Selector{All: all}
				if selector != "" {
					if s, err = set.ParseSelector(selector); err != nil {
						return err
					}
				}
				got, err := api.Observe(cmd.Context(), client.ObserveRequest{Selector: s, ExpiresIn: d, Note: note})
				if err != nil {
					return err
				}
				return c.show(got, func(w io.Writer) {
					_, _ = fmt.Fprintf(w, "observing as %s until %s; end it sooner with redoubt observe --end %s\n", got.ID, when(got.Expires), got.ID)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every workload")
	cmd.Flags().StringVar(&selector, "for", "", "some workloads")
	cmd.Flags().StringVar(&expires, "expires", "", "how long (default 1h, at most 7 days)")
	cmd.Flags().StringVar(&note, "note", "", "why, for the record")
	cmd.Flags().StringVar(&end, "end", "", "end this one now")
	return cmd
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
