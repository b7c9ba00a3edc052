package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/refusal"
)

// The exit codes of docs/contracts.md.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
)

// exitStatus is an error that only carries an exit code: everything has been said.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// usageError is a command line that cannot be read.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// cli holds what all verbs share.
type cli struct {
	streams
	data   string
	server string
	json   bool
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "redoubt",
		Short: "May this identity do this, to that, now?",
		Long: "Redoubt gives every component of a system an identity and asks one question of everything that happens:\n" +
			"may this identity do this, to that, now?",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentPreRun = func(*cobra.Command, []string) {
		c.data, c.server = cmp.Or(c.data, os.Getenv("REDOUBT_DATA")), cmp.Or(c.server, os.Getenv("REDOUBT_SERVER"))
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&c.data, "data", "", "data directory (default /var/lib/redoubt, or below the home directory if not root; REDOUBT_DATA)")
	f.StringVar(&c.server, "server", "", "URL of the management API (default: that of the operator credential; REDOUBT_SERVER)")
	f.BoolVar(&c.json, "json", false, "print JSON")
	root.AddGroup(
		&cobra.Group{ID: "roles", Title: "Roles:"},
		&cobra.Group{ID: "workloads", Title: "Workloads and identities:"},
		&cobra.Group{ID: "policy", Title: "Policy and decisions:"},
		&cobra.Group{ID: "domain", Title: "The trust domain:"},
	)
	for group, commands := range c.verbs() {
		for _, command := range commands {
			command.GroupID = group
			root.AddCommand(command)
		}
	}
	strict(root)
	return root
}

// strict makes every command that takes a verb refuse an unknown one, with exit code 2.
func strict(cmd *cobra.Command) {
	if cmd.HasSubCommands() && cmd.RunE == nil && cmd.HasParent() {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("%s has no %q; see redoubt %s --help", cmd.CommandPath(), args[0], cmd.Name())
			}
			return cmd.Help()
		}
	}
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{fmt.Errorf("%s: %w; see %s --help", cmd.CommandPath(), err, cmd.CommandPath())}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		strict(sub)
	}
}

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func defaultData() string {
	if os.Geteuid() == 0 {
		return "/var/lib/redoubt"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "redoubt")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "redoubt-data"
	}
	return filepath.Join(home, ".local", "share", "redoubt")
}

// dir returns the data directory that was named, or the default.
func (c *cli) dir() string {
	if c.data != "" {
		return c.data
	}
	return defaultData()
}

// roleDir returns where a role keeps its data: below a directory that holds several roles, or the directory itself.
func (c *cli) roleDir(role, mark string) string {
	if _, err := os.Stat(filepath.Join(c.dir(), mark)); err == nil {
		return c.dir()
	}
	return filepath.Join(c.dir(), role)
}

// agentDir is the agent's data directory. Its mark is a file that stays when the agent does not.
func (c *cli) agentDir() string { return c.roleDir("agent", redoubt.MachineFile) }

// agent returns a client of this machine's agent.
func (c *cli) agent() *local.Client {
	return local.NewClient(filepath.Join(c.agentDir(), redoubt.AgentSocket))
}

// report prints an error as "what: why; what to do" (or as a problem document) and returns the exit code.
func (c *cli) report(err error) int {
	code := exitFailed
	r := refusal.As(err)
	switch {
	case errors.As(err, new(usageError)), strings.HasPrefix(err.Error(), "unknown command"), strings.HasPrefix(err.Error(), "required flag"):
		code = exitUsage
	case r != nil && r.Kind == refusal.Unavailable && (r.Code == "agent-away" || r.Code == client.ErrUnreachable.Code):
		code = exitUnreachable
	}
	if c.json {
		doc := map[string]any{"error": err.Error()}
		if r != nil {
			doc["kind"], doc["code"], doc["what"], doc["why"], doc["do"] = r.Kind, r.Code, r.What, r.Why, r.Do
			if r.Decision != "" {
				doc["decision"] = r.Decision
			}
		}
		_ = json.NewEncoder(c.err).Encode(doc)
		return code
	}
	_, _ = fmt.Fprintln(c.err, "redoubt: "+err.Error())
	if p, ok := errors.AsType[*client.Problem](err); ok {
		for _, d := range p.Refusals() {
			_, _ = fmt.Fprintln(c.err, "  "+d.Error())
		}
		for _, e := range p.Errors {
			_, _ = fmt.Fprintf(c.err, "  %s: %s\n", e.Location, e.Message)
		}
	}
	if r != nil && r.Decision != "" && !strings.Contains(err.Error(), r.Decision) { // it may say so itself
		_, _ = fmt.Fprintf(c.err, "  decision %s: see redoubt why %s\n", r.Decision, r.Decision)
	}
	return code
}

// show prints v as JSON, or text by the function given.
func (c *cli) show(v any, text func(w io.Writer)) error {
	if c.json {
		enc := json.NewEncoder(c.out)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	text(c.out)
	return nil
}

// table prints aligned columns.
func table(w io.Writer, header string, rows func(line func(cells ...any))) {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	_, _ = fmt.Fprintln(t, header)
	rows(func(cells ...any) {
		parts := make([]string, len(cells))
		for i, cell := range cells {
			parts[i] = printable(fmt.Sprint(cell))
			if parts[i] == "" {
				parts[i] = "-"
			}
		}
		_, _ = fmt.Fprintln(t, strings.Join(parts, "\t"))
	})
	_ = t.Flush()
}

// printable replaces what a terminal would act on: names of programs and labels may be an attacker's.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return '\ufffd'
		}
		return r
	}, s)
}

func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}
