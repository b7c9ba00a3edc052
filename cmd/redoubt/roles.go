package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt"
)

// role is what server and agent have in common.
type role interface {
	Run(ctx context.Context) error
	Reload(ctx context.Context, next redoubt.Config) ([]string, error)
}

// drainLimit bounds how long a role may take to end after SIGTERM.
const drainLimit = 20 * time.Second

func (c *cli) serverVerb() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "server [--config FILE]",
		Short: "Run the control plane",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, t, err := c.prepare(cmd.Context(), "server", config)
			if err != nil {
				return err
			}
			defer closeTelemetry(t)
			s, err := redoubt.NewServer(cmd.Context(), cfg, t)
			if err != nil {
				return err
			}
			ready := s.Ready()
			return c.serve(cmd.Context(), s, "server", config, t, ready, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "ready: management API %s, agents %s, metrics %s, data %s\n", ready.API, ready.Agents, orDash(ready.Metrics), ready.Data)
			})
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file (docs/configuration.md)")
	return cmd
}

func (c *cli) agentVerb() *cobra.Command {
	var config, tokenFile, name, server string
	var cleanup bool
	cmd := &cobra.Command{
		Use:   "agent [--config FILE] [--join-token-file FILE]",
		Short: "Run the agent of this machine",
		Long: "Runs the agent of this machine. The first time it needs a join token, read from a file or from standard input (-), so\n" +
			"that it never stands in a process list; afterwards it comes back with its own identity.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, t, err := c.prepare(cmd.Context(), "agent", config)
			if err != nil {
				return err
			}
			defer closeTelemetry(t)
			if cleanup {
				return c.cleanup(cfg)
			}
			if server != "" {
				cfg.Agent.Server = server
			}
			token, err := c.secret(tokenFile)
			if err != nil {
				return err
			}
			a, err := redoubt.NewAgent(cmd.Context(), cfg, token, name, t)
			if err != nil {
				return err
			}
			ready := a.Ready()
			return c.serve(cmd.Context(), a, "agent", config, t, ready, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "ready: machine %s, Workload API %s, data %s\n", ready.Machine, ready.WorkloadAPI, ready.Data)
			})
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file (docs/configuration.md)")
	cmd.Flags().StringVar(&tokenFile, "join-token-file", "", "file with the join token, or - for standard input")
	cmd.Flags().StringVar(&name, "machine", "", "machine to join as (default: the host's name)")
	cmd.Flags().StringVar(&server, "join", "", "host:port of the server's agent API (default: agent.server of the configuration)")
	cmd.Flags().BoolVar(&cleanup, "cleanup", false, "remove what an agent with this data directory has pinned in the kernel, and end")
	return cmd
}

func (c *cli) cleanup(cfg redoubt.Config) error {
	lifted, err := redoubt.Cleanup(cfg)
	if err != nil {
		return err
	}
	return c.show(map[string]any{"removed": lifted}, func(w io.Writer) {
		_, _ = fmt.Fprintf(w, "removed %d things that an agent had left behind\n", len(lifted))
		for _, l := range lifted {
			_, _ = fmt.Fprintln(w, "  "+l)
		}
	})
}

func (c *cli) devVerb() *cobra.Command {
	return &cobra.Command{
		Use:   "dev",
		Short: "Run server and agent on this machine, with defaults, in one command",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := redoubt.DevConfig(c.dir())
			if err != nil {
				return err
			}
			d, err := redoubt.NewDev(cmd.Context(), cfg, c.err)
			if err != nil {
				return err
			}
			ready := d.Ready()
			return c.serve(cmd.Context(), d, "dev", "", nil, ready, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "ready: management API %s, Workload API %s, metrics %s, data %s\n", ready.API, ready.WorkloadAPI, ready.Metrics, ready.Data)
			})
		},
	}
}

// prepare reads the configuration of a role and makes its telemetry.
func (c *cli) prepare(ctx context.Context, name, config string) (redoubt.Config, *redoubt.Telemetry, error) {
	cfg, err := redoubt.LoadConfig(config)
	if err != nil {
		return cfg, nil, err
	}
	switch {
	case c.data != "":
		cfg.Data = c.data
	case cfg.Data == "":
		cfg.Data = filepath.Join(defaultData(), name)
	}
	t, err := redoubt.NewTelemetry(ctx, name, cfg, c.err)
	return cfg, t, err
}

// serve says that the role is ready and runs it until SIGTERM; SIGHUP reads the configuration again.
func (c *cli) serve(ctx context.Context, r interface{ Run(context.Context) error }, name, config string, t *redoubt.Telemetry, ready any, text func(io.Writer)) error {
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	if c.json {
		if err := json.NewEncoder(c.out).Encode(ready); err != nil {
			return err
		}
	} else {
		text(c.out)
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	ending := ctx.Done()
	var late <-chan time.Time
	for {
		select {
		case err := <-done:
			return err
		case <-ending:
			ending, late = nil, time.After(drainLimit)
		case <-late:
			return errors.New(name + " did not drain within " + drainLimit.String() + " and was ended")
		case <-hup:
			c.reload(ctx, r, config, t)
		}
	}
}

// reload reads the configuration again; a bad one changes nothing and is said.
func (c *cli) reload(ctx context.Context, r any, config string, t *redoubt.Telemetry) {
	reloading, ok := r.(role)
	if !ok || t == nil {
		return
	}
	next, err := redoubt.LoadConfig(config)
	var later []string
	if err == nil {
		if c.data != "" {
			next.Data = c.data
		} else if next.Data == "" {
			next.Data = filepath.Join(defaultData(), "")
		}
		later, err = reloading.Reload(ctx, next)
	}
	switch {
	case err != nil:
		t.Logger.Error("the configuration was read again and refused; the former one stays in force", "error", err)
	case len(later) > 0:
		t.Logger.Warn("the configuration was read again; some keys take effect at the next start", "keys", strings.Join(later, ", "))
	default:
		t.Logger.Log(ctx, slog.LevelInfo, "the configuration was read again")
	}
}

// secret reads one line from a file, or from standard input for "-"; "" is no secret.
func (c *cli) secret(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	var raw []byte
	var err error
	if file == "-" {
		raw, err = io.ReadAll(io.LimitReader(c.in, 64<<10))
	} else {
		raw, err = os.ReadFile(file)
	}
	if err != nil {
		return "", fmt.Errorf("read the secret: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

func closeTelemetry(t *redoubt.Telemetry) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = t.Close(ctx)
}
