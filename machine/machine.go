// Package machine is the agent's view: the workloads present on this machine, the keys and SVIDs they hold, the policy in
// force here, and the decisions made here. It goes on deciding, and serving what it has, when the server is away.
//
// Life of a workload: [Machine.Prepare] gives it an instance id, a cgroup and a user before it runs; [Machine.Started]
// attests its first process and reports it; the server answers with a SPIFFE ID or a refusal; the machine makes a key,
// has it signed, and renews at half-life. [Machine.Enroll] enters at the second step with a cgroup that already runs. A
// container or unit that asks for its SVID without either is found by its cgroup and enters the same way.
//
// Trust: workloads are not trusted; what is believed of them comes from the kernel and the container engine through the
// [Attestor]. Root of this machine is trusted for this machine (docs/threat-model.md). Keys live in memory only.
package machine

import (
	"context"
	"crypto/x509"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
)

// Upstream is what a machine asks of the server. Errors are refusals; code "server-unreachable" while the server is away.
type Upstream interface {
	Report(ctx context.Context, r fleet.Report) ([]fleet.Assigned, error)
	SignX509(ctx context.Context, instance string, csr []byte) ([]*x509.Certificate, error)
	SignJWT(ctx context.Context, instance string, audience []string) (*identity.JWTSVID, error)
}

// Subject is one attested process.
type Subject struct {
	PID      int
	Start    uint64 // start time in clock ticks since boot: with PID it names the process
	Cgroup   string // path within the unified hierarchy
	CgroupID uint64
	Facts    identity.FactSet
}

// Attestor reads what the kernel and the container engine say of a process.
type Attestor interface {
	Process(ctx context.Context, pid int) (Subject, error)
}

// Config is what a machine is made of. CgroupRoot is where the unified hierarchy is mounted; Subtree is the cgroup, below
// it, under which workloads get theirs and outside of which the machine looks at nothing ("/" is all).
type Config struct {
	ID          string
	TrustDomain identity.TrustDomain
	Upstream    Upstream
	Attestor    Attestor
	CgroupRoot  string
	Subtree     string
	StateDir    string
	Sink        event.Sink
	Meter       event.Meter
	Logger      *slog.Logger
	// Privileged reports whether any process of a cgroup is root, or holds a capability, or could take root back, and whether
	// that could be told; nil: the uid of the first process decides alone.
	Privileged func(cgroup string) (privileged, known bool)
	// Offline keeps the workloads of the state as they are, unlooked at: for a release while no agent runs.
	Offline bool
	// Unpin lifts what the sensor has pinned in the kernel and returns what it lifted; nil where nothing is.
	Unpin func() ([]string, error)
}

// The bounds of one machine.
const (
	MaxWorkloads  = 2000
	maxJWTs       = 64   // cached JWT-SVIDs a workload
	maxDecisions  = 4096 // decisions kept for `why` without the server
	maxLabels     = 64
	watchInterval = time.Second
	attestEvery   = 30 * time.Second
	renewWorkers  = 8
	// briefly bounds how long a caller waits for the server's answer about it; the registry's own loop tries again.
	briefly = 3 * time.Second
	// attestWait bounds how long a workload that asks at once waits for its own attestation.
	attestWait = 10 * time.Second
)

// Machine is the agent's registry. Concurrency: safe.
type Machine struct {
	cfg  Config
	log  *slog.Logger
	view atomic.Pointer[view] // swapped whole by the receiver

	// reporting holds one token, taken from the moment a report is drawn up until it is answered: a full report that
	// overtook the report of a newer workload would say that it is gone. Taken before mu.
	reporting chan struct{}

	mu        sync.Mutex
	ended     []string             // instances whose end the server has not heard; guarded by mu
	husks     []string             // cgroups of ours that were still busy when their workload was forgotten; guarded by mu
	kept      []storedWorkload     // of an offline machine; guarded by mu
	workloads map[string]*workload // by instance; guarded by mu
	byCgroup  map[string]*workload // by cgroup path; guarded by mu
	released  *Release             // guarded by mu

	decisions *history
	kick      chan struct{} // wakes Run: something is due
}

// New returns a machine with the state that an earlier one left in StateDir: its workloads that still run, the policy set
// in force, a release. It starts nothing. Errors: the state directory cannot be used; a state file that cannot be read is
// set aside under another name and said so in the log, since a machine without state still protects new workloads.
func New(cfg Config) (*Machine, error) {
	if cfg.Sink == nil {
		cfg.Sink = event.NoSink
	}
	if cfg.Meter == nil {
		cfg.Meter = event.NoMeter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Subtree == "" {
		cfg.Subtree = "/"
	}
	m := &Machine{
		cfg: cfg, log: cfg.Logger,
		workloads: map[string]*workload{}, byCgroup: map[string]*workload{},
		decisions: newHistory(maxDecisions), kick: make(chan struct{}, 1), reporting: make(chan struct{}, 1),
	}
	m.view.Store(emptyView(cfg.TrustDomain))
	if err := m.load(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m, m.saveLocked() // a directory that cannot be written is found out now
}

// Run watches workloads, reports them, and renews their SVIDs until ctx ends. It returns nil when ctx has ended.
func (m *Machine) Run(ctx context.Context) error {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var lastFull time.Time
	for {
		m.watch(ctx)
		m.attestDue(ctx)
		if m.reportDue(ctx, time.Since(lastFull) > fullReportEvery) {
			lastFull = time.Now()
		}
		m.renewDue(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-m.kick:
		}
	}
}

func (m *Machine) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// SetUpstream replaces the server connection, for wiring: the session and the machine need one another.
func (m *Machine) SetUpstream(u Upstream) { m.cfg.Upstream = u }
