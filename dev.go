package redoubt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// Dev is a server and an agent in one process, each with its own data directory, joined as two processes would be: by a
// single-use token over TLS.
type Dev struct {
	server *Server
	agent  *Agent
	stop   context.CancelFunc
	served chan error
	data   string
}

// DevConfig is the configuration of both roles below one data directory, on free ports of loopback.
func DevConfig(data string) (Config, error) {
	c, err := ParseConfig("dev", nil)
	if err != nil {
		return Config{}, err
	}
	c.Data = data
	c.Server.API, c.Server.Agents, c.Server.Metrics = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	c.Agent.Metrics = "off" // one process has one set of counters, which the server shows
	return c, nil
}

// NewDev opens and starts the server, lets the agent join it, and opens the agent. Run serves both.
func NewDev(ctx context.Context, cfg Config, logs io.Writer) (_ *Dev, err error) {
	d := &Dev{data: cfg.Data, served: make(chan error, 1)}
	telemetry, err := NewTelemetry(ctx, "dev", cfg, logs)
	if err != nil {
		return nil, err
	}
	if err := makeDataDir(cfg.Data); err != nil {
		return nil, err
	}
	serverConfig := cfg
	serverConfig.Data = filepath.Join(cfg.Data, "server")
	if d.server, err = NewServer(ctx, serverConfig, telemetry); err != nil {
		return nil, err
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.stop = stop
	go func() { d.served <- d.server.Run(serving) }()
	defer func() {
		if err != nil {
			stop()
			err = errors.Join(err, <-d.served)
		}
	}()
	agentConfig := cfg
	agentConfig.Data = filepath.Join(cfg.Data, "agent")
	agentConfig.Agent.Server = d.server.Ready().Agents
	if d.agent, err = NewAgent(ctx, agentConfig, "", "", telemetry); err == nil {
		return d, nil
	}
	if !NotJoined(err) {
		return nil, err
	}
	name := hostName()
	rec := event.NewRecord(`User::"dev"`, "join-token.create", name)
	_, secret, err := d.server.fleet.CreateToken(ctx, fleet.TokenRequest{Machine: name, TTL: time.Minute, Replace: true}, rec)
	if err != nil {
		return nil, fmt.Errorf("join token for the agent: %w", err)
	}
	d.agent, err = NewAgent(ctx, agentConfig, secret.Reveal(), name, telemetry)
	return d, err
}

// DevReady is dev's one line of JSON; the keys are fixed in docs/contracts.md. Gateway and issuer are empty until those rooms
// are built.
type DevReady struct {
	Ready       bool   `json:"ready"`
	API         string `json:"api"`
	Issuer      string `json:"issuer"`
	Gateway     string `json:"gateway"`
	WorkloadAPI string `json:"workload_api"`
	Metrics     string `json:"metrics"`
	Data        string `json:"data"`
}

// Ready returns where both answer.
func (d *Dev) Ready() DevReady {
	s, a := d.server.Ready(), d.agent.Ready()
	return DevReady{Ready: true, API: s.API, WorkloadAPI: a.WorkloadAPI, Metrics: s.Metrics, Data: d.data}
}

// Run serves until ctx ends: the agent drains first, then the server.
func (d *Dev) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	ended := make(chan struct{})
	g.Go(func() error {
		defer close(ended)
		return d.agent.Run(ctx)
	})
	g.Go(func() error {
		select {
		case err := <-d.served:
			if err == nil && ctx.Err() == nil {
				err = errors.New("the server stopped")
			}
			return err
		case <-ended:
			d.stop()
			return <-d.served
		}
	})
	return g.Wait()
}
