package redoubt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/event/spool"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// The files of an agent's data directory.
const (
	AgentSocket    = "agent.sock"    // the agent's own socket, 0600
	WorkloadSocket = "workload.sock" // the Workload API, for everybody
	MachineFile    = "machine.json"  // what outlives the agent
	spoolDir       = "spool"
	bpffsDir       = "bpffs"
)

// Agent is the part on every machine: attests workloads, serves the Workload API, decides.
type Agent struct {
	cfg       Config
	telemetry *Telemetry
	log       *slog.Logger

	id       string // of the machine
	lock     *sqlite.Lock
	client   *agent.Client
	session  *agent.Session
	machine  *machine.Machine
	spool    *spool.Spool
	host     *host
	workload *workload.Server
	local    *local.Server

	workloadListener, localListener, metricsListener net.Listener
}

// NewAgent opens everything that an agent is made of. An agent that has not joined yet needs a join token, and joins with it
// as the machine named ("" is the host's name). It starts nothing: Run does.
func NewAgent(ctx context.Context, cfg Config, token, name string, t *Telemetry) (_ *Agent, err error) {
	a := &Agent{cfg: cfg, telemetry: t, log: t.Logger}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if err := makeDataDir(cfg.Data); err != nil {
		return nil, err
	}
	if a.lock, err = sqlite.LockDir(cfg.Data); err != nil {
		return nil, err
	}
	if a.spool, err = spool.Open(filepath.Join(cfg.Data, spoolDir), spool.Config{Meter: t, Logger: a.log}); err != nil {
		return nil, err
	}
	id, err := a.connect(ctx, token, name)
	if err != nil {
		return nil, err
	}
	attestor, err := attest.New(attest.Config{Meter: t, Logger: a.log})
	if err != nil {
		return nil, err
	}
	a.host = &host{id: a.id, attestor: attestor, meter: t, subtree: cfg.Agent.Machine.Cgroups, extra: a.extra, reserved: map[uint32]time.Time{}}
	bpffs := filepath.Join(cfg.Data, bpffsDir)
	if a.machine, err = machine.New(machine.Config{
		ID: a.id, TrustDomain: id.TrustDomain(), Attestor: a.host, CgroupRoot: attestor.CgroupRoot(),
		Subtree: cfg.Agent.Machine.Cgroups, StateDir: cfg.Data, Sink: a.spool, Meter: t, Logger: a.log,
		Unpin: func() ([]string, error) { return unpin(bpffs) }, Privileged: a.host.privileged,
	}); err != nil {
		return nil, err
	}
	a.host.machine = a.machine
	stream, err := streamName(filepath.Join(cfg.Data, spoolDir))
	if err != nil {
		return nil, err
	}
	a.session = a.client.Session(agent.SessionConfig{Receiver: a.machine, Spool: a.spool, Stream: stream})
	a.machine.SetUpstream(a.session)
	a.workload = workload.New(workload.Config{
		Source: source{a.machine}, CgroupRoot: attestor.CgroupRoot(), Meter: t, Logger: a.log,
	})
	a.local = local.New(local.Config{Machine: a.machine, Host: a.host, Socket: "unix://" + a.socket(), Meter: t, Logger: a.log})
	return a, a.listen(ctx)
}

// connect makes the client of the agent API, and joins the domain if a token was given. It returns the agent's identity.
func (a *Agent) connect(ctx context.Context, token, name string) (identity.ID, error) {
	client, err := agent.Dial(ctx, agent.Config{
		Server: a.cfg.Agent.Server, Credentials: agent.FileCredentials(a.cfg.Data), Version: Version(), Meter: a.telemetry, Logger: a.log,
	})
	if err != nil {
		return identity.ID{}, err
	}
	a.client = client
	if token != "" {
		if name == "" {
			name = hostName()
		}
		facts, err := identity.NewFactSet(identity.Fact{Name: "machine.hostname", Value: hostName(), Source: identity.FromKernel})
		if err != nil {
			return identity.ID{}, err
		}
		if err := client.Join(ctx, agent.Joining{Token: token, Machine: name, Facts: facts}); err != nil {
			return identity.ID{}, err
		}
	}
	machine, id, err := client.Identity()
	a.id = machine
	return id, err
}

// NotJoined reports whether an agent could not be made because it has not joined a domain yet.
func NotJoined(err error) bool { return errors.Is(err, agent.ErrNotJoined) }

// streamName names the event queue in this directory; a queue that was lost begins anew under another name.
func streamName(dir string) (string, error) {
	name := filepath.Join(dir, "stream")
	raw, err := os.ReadFile(name)
	if err == nil && identity.IsUnique("q", string(raw)) {
		return string(raw), nil
	}
	stream := identity.Unique("q")
	return stream, writePrivate(name, []byte(stream))
}

// socket is where the Workload API is: below /run for root, since workloads cannot pass through a 0700 data directory, and
// apart for each data directory, since a machine may have several agents in tests.
func (a *Agent) socket() string {
	path := a.cfg.Agent.Socket
	if path == "" {
		path = filepath.Join(a.cfg.Data, WorkloadSocket)
		if os.Geteuid() == 0 {
			abs, err := filepath.Abs(a.cfg.Data)
			if err != nil {
				abs = a.cfg.Data
			}
			sum := sha256.Sum256([]byte(abs))
			path = filepath.Join(runDir, hex.EncodeToString(sum[:6]), WorkloadSocket)
		}
	}
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

func (a *Agent) listen(ctx context.Context) (err error) {
	if a.localListener, err = local.Listen(ctx, filepath.Join(a.cfg.Data, AgentSocket)); err != nil {
		return err
	}
	path := a.socket()
	if len(path) > maxSocketPath {
		return &refusal.Error{
			Kind: refusal.Invalid, Code: "socket-path", What: "Workload API at " + path, Why: "a socket's path has at most 107 bytes",
			Do: "set agent.socket, or --data, to a shorter one",
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("directory of the Workload API: %w", err)
	}
	if a.cfg.Agent.Socket == "" && os.Geteuid() == 0 { // whatever the umask is
		for _, dir := range []string{runDir, filepath.Dir(path)} {
			if err := os.Chmod(dir, 0o755); err != nil {
				return fmt.Errorf("directory of the Workload API: %w", err)
			}
		}
	}
	// Every workload may connect: who it is, the kernel says.
	if a.workloadListener, err = workload.Listen(ctx, path); err != nil {
		return err
	}
	if a.cfg.Agent.Metrics != "off" {
		a.metricsListener, err = listenTCP(ctx, "agent.metrics", a.cfg.Agent.Metrics)
	}
	return err
}

// runDir holds a directory for each agent's Workload API.
const runDir = "/run/redoubt"

// maxSocketPath is what fits into a socket address (unix(7): 108 bytes with the final zero).
const maxSocketPath = 107

// AgentReady is what an agent says once it answers.
type AgentReady struct {
	Machine     string `json:"machine"`
	WorkloadAPI string `json:"workload_api"`
	Metrics     string `json:"metrics,omitempty"`
	Data        string `json:"data"`
}

// Ready returns where the agent answers.
func (a *Agent) Ready() AgentReady {
	r := AgentReady{Machine: a.id, WorkloadAPI: "unix://" + a.socket(), Data: a.cfg.Data}
	if a.metricsListener != nil {
		r.Metrics = "http://" + reachable(a.metricsListener.Addr()) + "/metrics"
	}
	return r
}

// Run serves until ctx ends, then drains: events are written, streams are told to come back.
func (a *Agent) Run(ctx context.Context) error {
	defer a.close()
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	lower := make(chan error, 1)
	go func() { lower <- a.spool.Run(below) }()

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.session.Run(ctx) })
	g.Go(func() error { return a.machine.Run(ctx) })
	g.Go(func() error { return a.workload.Serve(ctx, a.workloadListener) })
	g.Go(func() error { return a.local.Serve(ctx, a.localListener) })
	g.Go(func() error {
		a.host.prove(ctx, a.cfg.Agent.ProbeInterval, func(err error) {
			a.log.Error("the confinement could not be probed, so it is not called enforced", "error", err)
		})
		return nil
	})
	g.Go(func() error { a.tellProtections(ctx); return nil })
	if a.metricsListener != nil {
		g.Go(func() error { return a.telemetry.serveMetrics(ctx, a.metricsListener) })
	}
	err := g.Wait()
	stop()
	if spoolErr := <-lower; spoolErr != nil && err == nil {
		err = spoolErr
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// tellEvery bounds how often a whole round of protections goes to the server, however fast they change.
const tellEvery = 10 * time.Second

// tellProtections tells the server what is protected here whenever that changes, and now and then.
func (a *Agent) tellProtections(ctx context.Context) {
	var last any
	told := time.Time{}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		if a.host.proofs.Load() != nil {
			list := a.host.Protections()
			if !reflect.DeepEqual(last, any(list)) && time.Since(told) > tellEvery || time.Since(told) > time.Hour {
				events, err := protectionsEvents(list)
				if err != nil {
					a.log.Error("protections were not told", "error", err)
				}
				for _, e := range events {
					e.Machine = a.host.id
					a.spool.Emit(e)
				}
				last, told = list, time.Now()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// extra is what `doctor` shows of the agent itself.
func (a *Agent) extra() map[string]any {
	return map[string]any{"connection": a.session.Status(), "spool": a.spool.Status(), "workload_api": "unix://" + a.socket()}
}

func (a *Agent) close() {
	for _, l := range []net.Listener{a.workloadListener, a.localListener, a.metricsListener} {
		if l != nil {
			_ = l.Close()
		}
	}
	if a.spool != nil {
		if err := a.spool.Close(); err != nil {
			a.log.Error("the event spool was not closed cleanly", "error", err)
		}
	}
	if a.lock != nil {
		_ = a.lock.Unlock()
	}
}

// Reload takes what can change while the agent runs, and names what cannot.
func (a *Agent) Reload(_ context.Context, next Config) ([]string, error) {
	level, err := next.Log.level()
	if err != nil {
		return nil, err
	}
	later := NeedsRestart(a.cfg, next)
	a.telemetry.SetLevel(level)
	a.cfg.Log = next.Log
	return later, nil
}

// ReleaseOffline is the break-glass of a machine whose agent does not run: what is pinned is lifted now, and the agent finds
// the release when it starts. It is recorded in the agent's spool, which the server gets later.
func ReleaseOffline(ctx context.Context, dir, reason string, resume bool) (*machine.Release, error) {
	if _, err := os.Stat(filepath.Join(dir, MachineFile)); err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Unknown, Code: "no-agent", What: "release the machine", Why: "no agent was ever started with data directory " + dir,
			Do: "name the agent's data directory with --data", Err: err,
		}
	}
	lock, err := sqlite.LockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Unlock() }()
	events, err := spool.Open(filepath.Join(dir, spoolDir), spool.Config{})
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- events.Run(run) }()
	m, err := machine.New(machine.Config{
		StateDir: dir, Sink: events, Offline: true, Unpin: func() ([]string, error) { return unpin(filepath.Join(dir, bpffsDir)) },
	})
	var release *machine.Release
	if err == nil {
		const actor = `User::"root@machine"`
		if resume {
			err = m.Resume(ctx, actor)
		} else {
			release, err = m.Release(ctx, actor, reason)
		}
	}
	stop() // the spool writes what it has before it ends
	return release, errors.Join(err, <-done, events.Close())
}

// Cleanup removes what an agent with this configuration has left in the kernel: pins below its bpffs, and cgroups of workloads
// in which nothing runs any more. It refuses while the agent runs. It returns what was removed.
func Cleanup(cfg Config) ([]string, error) {
	if err := makeDataDir(cfg.Data); err != nil {
		return nil, err
	}
	lock, err := sqlite.LockDir(cfg.Data)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Unlock() }()
	removed, err := unpin(filepath.Join(cfg.Data, bpffsDir))
	if err != nil {
		return removed, err
	}
	root, err := attest.CgroupRoot()
	if err != nil {
		return removed, err
	}
	emptied, err := machine.RemoveEmptyCgroups(cfg.Data, root, filepath.Join(root, cfg.Agent.Machine.Cgroups))
	return append(removed, emptied...), err
}
