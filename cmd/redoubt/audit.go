package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/store/backup"
)

func (c *cli) auditVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "The tamper-evident record, and its proofs"}
	cmd.AddCommand(c.auditVerify(), &cobra.Command{
		Use:   "checkpoint",
		Short: "Print the log's signed checkpoint; keep one elsewhere, for audit verify --since",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withAPI(func(api *client.Client) error {
				log, err := api.Audit(cmd.Context())
				if err != nil {
					return err
				}
				return c.show(log, func(w io.Writer) { _, _ = fmt.Fprint(w, log.Checkpoint) })
			})
		},
	})
	return cmd
}

func (c *cli) auditVerify() *cobra.Command {
	var dir, key, since string
	cmd := &cobra.Command{
		Use:   "verify [--dir DIR] [--key VKEY] [--since CHECKPOINT]",
		Short: "Prove from the files alone that the audit log was not altered",
		Long: "Checks the signed checkpoint, that every leaf is included and is a record, and, with --since and a checkpoint that was kept\n" +
			"elsewhere, that the log has only grown. Needs no server. Without --key the verifier key beside the log is used, which proves\n" +
			"nothing against whoever owns both; the report says so. Exit 1 if anything is found.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				dir = filepath.Join(c.roleDir("server", redoubt.DatabaseFile), redoubt.AuditDir)
			}
			var opts audit.Options
			var err error
			if since != "" {
				if opts.Since, err = os.ReadFile(since); err != nil {
					return err
				}
			}
			report, err := audit.Verify(cmd.Context(), dir, strings.TrimSpace(key), opts)
			if err != nil {
				return err
			}
			if err := c.show(report, func(w io.Writer) { printReport(w, &report) }); err != nil {
				return err
			}
			if !report.OK() {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "audit directory (default: that of --data)")
	cmd.Flags().StringVar(&key, "key", "", "verifier key that was kept elsewhere")
	cmd.Flags().StringVar(&since, "since", "", "file with a checkpoint that was kept elsewhere")
	return cmd
}

func printReport(w io.Writer, r *audit.Report) {
	line := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	for _, f := range r.Findings {
		line("FOUND %s at %d: %s", f.Code, f.Index, printable(f.Detail))
	}
	if r.Unlisted > 0 {
		line("FOUND %d more", r.Unlisted)
	}
	for _, n := range r.Notes {
		line("note %s at %d: %s", n.Code, n.Index, printable(n.Detail))
	}
	line("log %s: %d leaves under the checkpoint, %d checked, from %s to %s", r.Origin, r.Size, r.Checked, when(r.First), when(r.Last))
	if r.Since > 0 {
		line("grown from %d leaves since the checkpoint given", r.Since)
	}
	line("unpublished tail: %d leaves", r.Unpublished)
	if r.OwnKey {
		line("verified with the key beside the log: keep it, and a checkpoint, elsewhere to prove more")
	}
	if r.OK() {
		line("nothing found")
	}
}

func (c *cli) backupVerb() *cobra.Command {
	var to, passphrase string
	cmd := &cobra.Command{
		Use:   "backup --to FILE --passphrase-file FILE",
		Short: "Back up the server's state, authority and audit log into one encrypted file, while it runs",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			secret, err := c.secret(passphrase)
			if err != nil {
				return err
			}
			f, err := createPrivate(to)
			if err != nil {
				return err
			}
			defer func() {
				err = errors.Join(err, f.Close())
				if err != nil {
					_ = os.Remove(to)
				}
			}()
			m, err := redoubt.Backup(cmd.Context(), c.serverDir(), f, secret)
			if err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			return c.show(m, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "backed up %d files to %s\n", len(m.Files), to)
				sayIfKeyless(w, m)
			})
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "file to write; it must not exist (required)")
	cmd.Flags().StringVar(&passphrase, "passphrase-file", "", "file with the passphrase, or - for standard input (required)")
	_ = cmd.MarkFlagRequired("to")
	_ = cmd.MarkFlagRequired("passphrase-file")
	return cmd
}

// sayIfKeyless warns of an archive without the key that its authority is sealed with.
func sayIfKeyless(w io.Writer, m backup.Manifest) {
	if !slices.ContainsFunc(m.Files, func(e backup.Entry) bool { return e.Name == redoubt.KEKName }) {
		_, _ = fmt.Fprintln(w, "the key-encryption key is not in it (authority.kek_file keeps it elsewhere): without that file it is of no use")
	}
}

func (c *cli) restoreVerb() *cobra.Command {
	var from, passphrase string
	cmd := &cobra.Command{
		Use:   "restore --from FILE --passphrase-file FILE --data DIR",
		Short: "Restore a back-up into an empty data directory",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			secret, err := c.secret(passphrase)
			if err != nil {
				return err
			}
			f, err := os.Open(from)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			m, err := redoubt.Restore(cmd.Context(), f, c.dir(), secret)
			if err != nil {
				return err
			}
			return c.show(m, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "restored %d files of %s into %s; its audit log verifies\n", len(m.Files), when(m.Created), c.dir())
				_, _ = fmt.Fprintln(w, "what happened since is forgotten: join tokens were deleted; make revocations of that time again")
				sayIfKeyless(w, m)
			})
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "the back-up (required)")
	cmd.Flags().StringVar(&passphrase, "passphrase-file", "", "file with the passphrase, or - for standard input (required)")
	_ = cmd.MarkFlagRequired("from")
	_ = cmd.MarkFlagRequired("passphrase-file")
	return cmd
}
