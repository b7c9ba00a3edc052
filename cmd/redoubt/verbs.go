package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

//go:generate go run . docs --to ../../docs/cli

// verbs are all commands, by group.
func (c *cli) verbs() map[string][]*cobra.Command {
	return map[string][]*cobra.Command{
		"roles":     {c.devVerb(), c.serverVerb(), c.agentVerb(), c.demoVerb()},
		"workloads": {c.runVerb(), c.enrollVerb(), c.workloadVerb(), c.identityVerb(), c.doctorVerb(), c.releaseVerb()},
		"policy": {
			c.applyVerb(), c.confirmVerb(), c.diffVerb(), c.rollbackVerb(), c.observeVerb(), c.policyVerb(), c.askVerb(), c.whyVerb(),
		},
		"domain": {
			c.getVerb(), c.statusVerb(), c.eventsVerb(), c.tokenVerb(), c.authorityVerb(), c.revokeVerb(), c.quarantineVerb(),
			c.auditVerb(), c.backupVerb(), c.restoreVerb(), c.docsVerb(),
		},
	}
}

// docsVerb writes the reference of the command line: docs/cli is its output.
func (c *cli) docsVerb() *cobra.Command {
	var to, format string
	cmd := &cobra.Command{
		Use:   "docs --to DIR [--format markdown|man]",
		Short: "Write the reference of the command line, as pages or as man pages",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := os.MkdirAll(to, 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			root.InitDefaultCompletionCmd()
			switch format {
			case "man":
				return doc.GenManTree(root, &doc.GenManHeader{Title: "REDOUBT", Section: "1", Source: "Redoubt"}, to)
			case "markdown":
				old, err := filepath.Glob(filepath.Join(to, "redoubt*.md"))
				if err != nil {
					return err
				}
				for _, name := range old {
					if err := os.Remove(name); err != nil {
						return err
					}
				}
				return doc.GenMarkdownTree(root, to)
			default:
				return usagef("--format %q is neither markdown nor man", format)
			}
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "directory to write to (required)")
	cmd.Flags().StringVar(&format, "format", "markdown", "markdown or man")
	_ = cmd.MarkFlagRequired("to")
	return cmd
}
