package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sensor"
)

// demoStep is one thing that the demo tried. Got and Evidence come from the attacker's side: errno, exit codes, what it was
// answered; never from what Redoubt says of itself. The shape is fixed in docs/contracts.md.
type demoStep struct {
	Name        string      `json:"name"`
	Phase       string      `json:"phase"`
	Layer       string      `json:"layer"`
	Mode        policy.Mode `json:"mode"`
	Expected    string      `json:"expected"`
	Got         string      `json:"got"`
	Evidence    string      `json:"evidence"`
	Decision    policy.ID   `json:"decision,omitempty"`
	Policy      string      `json:"policy,omitempty"`
	Explanation string      `json:"explanation,omitempty"`
}

// demoReport is the demo's JSON. Incidents and shoppers stay empty until the rooms that make them are built.
type demoReport struct {
	Machine     *sensor.Ledger      `json:"machine"`
	Steps       []demoStep          `json:"steps"`
	Incidents   []json.RawMessage   `json:"incidents"`
	Shoppers    map[string]int      `json:"shoppers"`
	Protections []policy.Protection `json:"protections"`
}

func (c *cli) demoVerb() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "demo [--once]",
		Short: "Attack workloads on this machine, for real, and show what was refused",
		Long: "Starts a server and an agent of its own in a fresh directory, runs workloads, attacks from within them, and compares what\n" +
			"the attacker saw with what redoubt doctor promises for this machine. Exit 0 if every step ended as promised. Without --once\n" +
			"it serves on until Ctrl-C. redoubt demo down removes what an interrupted demo left behind.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.demo(cmd.Context(), once) },
	}
	cmd.Flags().BoolVar(&once, "once", false, "end after the story")
	attack := &cobra.Command{
		Use: "attack NAME [ARG]", Short: "One attempt, from within a workload; used by the demo itself", Hidden: true, Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.attackInWorkload(cmd.Context(), args[0], strings.Join(args[1:], ""))
		},
	}
	down := &cobra.Command{
		Use: "down", Short: "Remove every trace of a demo that was interrupted", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return c.demoDown() },
	}
	cmd.AddCommand(attack, down)
	return cmd
}

// demoPrefix names the directories of demos, so that `down` finds them.
const demoPrefix = "redoubt-demo-"

func (c *cli) demo(ctx context.Context, once bool) (err error) {
	if os.Geteuid() != 0 {
		return &refusal.Error{
			Kind: refusal.Unsupported, Code: "demo-needs-root", What: "the demo", Why: "workloads get cgroups and users of their own, which only root can give",
			Do: "run sudo make demo; redoubt doctor says what this machine offers without root",
		}
	}
	data, err := os.MkdirTemp("", demoPrefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(data)) }()
	cfg, err := redoubt.DevConfig(data)
	if err != nil {
		return err
	}
	cfg.Log.Level = "error"
	dev, err := redoubt.NewDev(ctx, cfg, c.err)
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() { served <- dev.Run(serving) }()
	defer func() {
		stop()
		err = errors.Join(err, <-served)
	}()
	c.data = data
	story := &story{cli: c, data: data, out: c.out}
	if c.json {
		story.out = io.Discard
	}
	if err := story.tell(ctx); err != nil {
		return err
	}
	if c.json {
		if err := json.NewEncoder(c.out).Encode(story.report); err != nil {
			return err
		}
	}
	if !once && ctx.Err() == nil {
		_, _ = fmt.Fprintf(c.err, "serving on; look deeper with redoubt get workloads, get decisions, doctor, audit verify (all with --data %s); Ctrl-C ends it\n", data)
		<-ctx.Done()
	}
	if story.failed != "" {
		_, _ = fmt.Fprintf(c.err, "redoubt: the demo did not end as promised at step %q\n", story.failed)
		return exitStatus(exitFailed)
	}
	return nil
}

func (c *cli) demoDown() error {
	left, err := filepath.Glob(filepath.Join(os.TempDir(), demoPrefix+"*"))
	if err != nil {
		return err
	}
	removed := []string{}
	for _, dir := range left {
		cfg, err := redoubt.DevConfig(filepath.Join(dir, "agent"))
		if err != nil {
			return err
		}
		lifted, err := redoubt.Cleanup(cfg)
		if err != nil {
			return err // it runs: that demo is not ours to remove
		}
		removed = append(append(removed, lifted...), dir)
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return c.show(map[string][]string{"removed": removed}, func(w io.Writer) {
		_, _ = fmt.Fprintf(w, "removed %d things\n", len(removed))
	})
}

// ready waits until the agent has proved its protections once, and no longer than a few seconds.
func (s *story) ready(ctx context.Context) error {
	agent := s.cli.agent()
	defer agent.Close()
	for deadline := time.Now().Add(15 * time.Second); ; {
		list, err := agent.Protections(ctx)
		if err == nil && len(list) > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the agent has not proved its protections within 15s: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
