package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func (c *cli) tokenVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Join tokens: each lets one machine join once"}
	var machine, ttl, file string
	var replace bool
	create := &cobra.Command{
		Use:   "create --machine NAME [--ttl 1h]",
		Short: "Make a join token; it is shown once",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := duration("ttl", ttl)
			if err != nil {
				return err
			}
			return c.withAPI(func(api *client.Client) (err error) {
				var secretFile *os.File
				if file != "" {
					// Before the token is made, and never into a file that is there: it might be readable for others.
					if secretFile, err = createPrivate(file); err != nil {
						return err
					}
					defer func() {
						if err = errors.Join(err, secretFile.Close()); err != nil {
							_ = os.Remove(file)
						}
					}()
				}
				t, err := api.CreateToken(cmd.Context(), client.TokenRequest{Machine: machine, ExpiresIn: d, Replace: replace})
				if err != nil {
					return err
				}
				if secretFile != nil {
					if _, err := secretFile.WriteString(t.Secret + "\n"); err != nil {
						return err
					}
					t.Secret = ""
				}
				return c.show(t, func(w io.Writer) {
					if file == "" {
						_, _ = fmt.Fprintln(w, t.Secret)
					}
					_, _ = fmt.Fprintf(c.err, "one machine may join with it as %s until %s: redoubt agent --machine %s --join-token-file FILE\n",
						t.Machine, when(t.Expires), t.Machine)
				})
			})
		},
	}
	create.Flags().StringVar(&machine, "machine", "", "id of the machine that may join with it (required)")
	create.Flags().StringVar(&ttl, "ttl", "", "how long it may be used (default 1h)")
	create.Flags().BoolVar(&replace, "replace", false, "it may take the place of a machine of that id")
	create.Flags().StringVar(&file, "write", "", "write the token to this file, which must not exist, 0600, instead of printing it")
	_ = create.MarkFlagRequired("machine")
	cmd.AddCommand(create, &cobra.Command{
		Use:   "delete ID",
		Short: "Delete a join token; nobody joins with it any more",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withAPI(func(api *client.Client) error { return api.DeleteToken(cmd.Context(), args[0]) })
		},
	})
	return cmd
}

// createPrivate makes a file that only its owner reads; one that is there, be it a link, is refused.
func createPrivate(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Conflict, Code: "file-exists", What: "write " + name, Why: err.Error(), Do: "name a file that does not exist yet", Err: err,
		}
	}
	return f, nil
}

func (c *cli) authorityVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "authority", Short: "The trust domain's keys, and their rotation"}
	step := func(use, short string, call func(*client.Client, context.Context) (ca.Status, error)) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return c.withAPI(func(api *client.Client) error {
					s, err := call(api, cmd.Context())
					if err != nil {
						return err
					}
					return c.show(s, func(w io.Writer) { printAuthority(w, s) })
				})
			},
		}
	}
	cmd.AddCommand(
		step("status", "Show the keys and the next step", (*client.Client).Authority),
		step("prepare", "Rotation, step 1: make the next keys", (*client.Client).PrepareAuthority),
		step("publish", "Rotation, step 2: publish them in the bundle", (*client.Client).PublishAuthority),
		step("activate", "Rotation, step 3: sign with them", (*client.Client).ActivateAuthority),
		step("retire", "Rotation, step 4: forget the former ones", (*client.Client).RetireAuthority),
	)
	return cmd
}

func printAuthority(w io.Writer, s ca.Status) {
	_, _ = fmt.Fprintf(w, "trust domain %s, bundle %d\n", s.TrustDomain, s.Sequence)
	table(w, "KEY\tUSE\tSTATE\tFROM\tUNTIL", func(line func(...any)) {
		for _, k := range s.Keys {
			line(k.ID, k.Use, k.State, when(k.NotBefore), when(k.NotAfter))
		}
	})
	_, _ = fmt.Fprintf(w, "next: %s at %s (%s)\n", s.Next.Step, when(s.Next.At), s.Next.Why)
	for _, p := range s.Problems {
		_, _ = fmt.Fprintln(w, "problem: "+p)
	}
}

func (c *cli) statusVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the server: version, policy set, audit log, what to look at",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAPI(func(api *client.Client) error {
				s, err := api.Status(cmd.Context())
				if err != nil {
					return err
				}
				return c.show(s, func(w io.Writer) {
					_, _ = fmt.Fprintf(w, "server %s of %s, since %s\n", s.Version, s.TrustDomain, when(s.Started))
					_, _ = fmt.Fprintf(w, "policy set %d, %d overrides in force\n", s.PolicySet.Version, s.Overrides)
					_, _ = fmt.Fprintf(w, "audit log: %d leaves, %d published, %d waiting\n", s.Audit.Size, s.Audit.Published, s.Audit.Pending)
					for _, p := range s.Problems {
						_, _ = fmt.Fprintln(w, "look at: "+p)
					}
				})
			})
		},
	}
}

// withdrawal is what revoke and quarantine share.
func (c *cli) withdrawal(use, short string, run func(api *client.Client, ctx context.Context, target, reason string, d client.Duration) (id string, expires string, err error), lift func(*client.Client, context.Context, string) error) *cobra.Command {
	var reason, expires, end string
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (end != "") == (len(args) == 1) {
				return usagef("%s takes either what to withdraw, or --lift ID", cmd.CommandPath())
			}
			return c.withAPI(func(api *client.Client) error {
				if end != "" {
					return lift(api, cmd.Context(), end)
				}
				if reason == "" {
					return usagef("%s needs --reason, for the record", cmd.CommandPath())
				}
				d, err := duration("expires", expires)
				if err != nil {
					return err
				}
				id, until, err := run(api, cmd.Context(), args[0], reason, d)
				if err != nil {
					return err
				}
				return c.show(map[string]string{"id": id, "expires": until}, func(w io.Writer) {
					_, _ = fmt.Fprintf(w, "%s, until %s; lift it with %s --lift %s\n", id, until, cmd.CommandPath(), id)
				})
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record")
	cmd.Flags().StringVar(&expires, "expires", "", "how long (default: until it is lifted)")
	cmd.Flags().StringVar(&end, "lift", "", "end this one")
	return cmd
}

func (c *cli) revokeVerb() *cobra.Command {
	return c.withdrawal("revoke SPIFFE-ID|MACHINE|SPKI", "Withdraw trust from an identity, a machine or a key",
		func(api *client.Client, ctx context.Context, target, reason string, d client.Duration) (string, string, error) {
			r := client.RevocationRequest{Reason: reason, ExpiresIn: d}
			switch {
			case strings.HasPrefix(target, "spiffe://"):
				r.Identity = target
			case len(target) == 64:
				r.SPKI = target
			default:
				r.Machine = target
			}
			got, err := api.Revoke(ctx, r)
			return got.ID, orLifted(when(got.Expires)), err
		}, (*client.Client).LiftRevocation)
}

func (c *cli) quarantineVerb() *cobra.Command {
	return c.withdrawal("quarantine SPIFFE-ID|INSTANCE", "Mark an identity with the fact risk.quarantined, which policies forbid on",
		func(api *client.Client, ctx context.Context, target, reason string, d client.Duration) (string, string, error) {
			q := client.QuarantineRequest{Reason: reason, ExpiresIn: d}
			if strings.HasPrefix(target, "spiffe://") {
				q.Identity = target
			} else {
				q.Instance = target
			}
			got, err := api.Quarantine(ctx, q)
			return got.ID, orLifted(when(got.Expires)), err
		}, (*client.Client).LiftQuarantine)
}

func orLifted(s string) string {
	if s == "-" {
		return "it is lifted"
	}
	return s
}

func (c *cli) eventsVerb() *cobra.Command {
	var f client.EventFilter
	var follow bool
	var limit int
	cmd := &cobra.Command{
		Use:   "events [--follow] [--workload INSTANCE] [--layer LAYER]",
		Short: "Show what happened, newest first; with --follow, as it happens",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAPI(func(api *client.Client) error {
				seq, n := api.Events(cmd.Context(), f), 0
				if follow {
					seq, limit = api.Follow(cmd.Context(), f, 0), 0
				}
				for e, err := range seq {
					if err != nil {
						if follow && errors.As(err, new(*client.Gap)) {
							_, _ = fmt.Fprintln(c.err, "redoubt: "+err.Error())
							continue
						}
						return err
					}
					if err := c.line(e, func(w io.Writer) {
						_, _ = fmt.Fprintf(w, "%s  %-8s %-22s %-12s %s %s\n", when(e.Event.Time), e.Event.Layer, printable(e.Event.Kind),
							printable(e.Machine), printable(string(e.Event.Decision)), printable(describe(e.Event.Message, e.Event.Identity.String(), e.Event.Workload)))
					}); err != nil {
						return err
					}
					if n++; limit > 0 && n >= limit {
						return nil
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&follow, "follow", false, "go on as they happen")
	cmd.Flags().IntVar(&limit, "limit", 100, "at most so many; 0 is all")
	cmd.Flags().StringVar(&f.Workload, "workload", "", "only about this instance")
	cmd.Flags().StringVar(&f.Machine, "machine", "", "only from this machine")
	cmd.Flags().StringVar(&f.Layer, "layer", "", "only of this layer: runtime, network, api, access, control")
	cmd.Flags().StringVar(&f.Kind, "kind", "", "only of this kind")
	cmd.Flags().StringVar(&f.Verdict, "verdict", "", "only with this verdict: permit, deny")
	return cmd
}

func describe(parts ...string) (out string) {
	for _, p := range parts {
		if p != "" {
			return p
		}
	}
	return out
}

// ask evaluates a request on the server, by its policy set, and records it.
func (c *cli) askVerb() *cobra.Command {
	var context, instance string
	var local bool
	cmd := &cobra.Command{
		Use:   "ask PRINCIPAL ACTION RESOURCE [--context JSON]",
		Short: "Ask for a decision: may this identity do this, to that, now?",
		Long: "Asks the policy set in force, records the decision and prints it. Entities are TYPE:ID (Service:payments) or Cedar's\n" +
			"TYPE::\"ID\"; Workload:NAME may name a service or an instance that is present: its facts are then those known. Actions are\n" +
			"Net::connect. Exit 0 if it would go through, 1 if it is refused or cannot be decided.",
		Args: cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := c.ask(cmd.Context(), args, context, instance, local)
			if err != nil {
				return err
			}
			if err := c.show(d, func(w io.Writer) { explain(w, d) }); err != nil {
				return err
			}
			if !d.Allowed() || d.Explanation.Reason == policy.ReasonError {
				return exitStatus(exitFailed) // what could not be decided is no permission, whatever the mode lets through
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&context, "context", "", "the circumstances, a JSON object")
	cmd.Flags().StringVar(&instance, "instance", "", "workload whose facts are the principal's")
	cmd.Flags().BoolVar(&local, "local", false, "ask this machine's agent, which answers without the server")
	return cmd
}
