package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// How says how a workload came to be known.
type How string

// The ways.
const (
	ByRun       How = "run"       // started by redoubt run, confined
	ByEnroll    How = "enroll"    // was running; adopted by an operator
	ByDiscovery How = "discovery" // a container or unit that asked for its identity
)

// Workload is what the machine knows of one workload; a copy, safe to keep.
type Workload struct {
	Instance   string            `json:"instance"`
	Service    string            `json:"service,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Listen     []fleet.Listen    `json:"listen,omitempty"`
	How        How               `json:"how"`
	Privileged bool              `json:"privileged,omitempty"`
	Cgroup     string            `json:"cgroup"`
	CgroupID   uint64            `json:"cgroup_id"`
	UID        uint32            `json:"uid"`
	GID        uint32            `json:"gid"`
	PID        int               `json:"pid,omitempty"` // first process
	Start      uint64            `json:"start,omitempty"`
	Facts      identity.FactSet  `json:"facts,omitzero"`
	ID         identity.ID       `json:"spiffe_id,omitzero"`
	Refusal    string            `json:"refusal,omitempty"`  // why it has no identity
	Issuance   json.RawMessage   `json:"issuance,omitempty"` // which rules matched, and why others did not
	Since      time.Time         `json:"since"`
	Expires    time.Time         `json:"svid_expires,omitzero"`
	Moved      int               `json:"moved,omitempty"` // processes that enroll moved into a cgroup of their own
}

// workload is the registry's own record; its fields are guarded by Machine.mu.
type workload struct {
	Workload
	ours     bool          // we made the cgroup, and remove it
	asked    bool          // an operator asked for privileges
	attested chan struct{} // closed once the first attestation is over, well or not
	changed  chan struct{} // closed and replaced when documents change
	dirty    bool          // to be reported
	attestAt time.Time
	refused  *refusal.Error

	svid     *identity.X509SVID
	renewAt  time.Time
	failures int
	jwts     map[string]*cachedJWT
}

func (w *workload) touch() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// Registration is what an operator says of a workload: root of this machine, whose word the service name and labels are.
type Registration struct {
	Service    string            `json:"service"`
	Labels     map[string]string `json:"labels,omitempty"`
	Listen     []fleet.Listen    `json:"listen,omitempty"`
	Privileged bool              `json:"privileged,omitempty"`
	UID        uint32            `json:"uid"`
	GID        uint32            `json:"gid"`
}

func (r *Registration) check() error {
	switch {
	case !validSegment(r.Service):
		return invalid("service", "a service name has 1 to 63 letters, digits, dots, hyphens and underscores", "give --service NAME")
	case len(r.Labels) > maxLabels:
		return invalid("labels", fmt.Sprintf("there are more than %d", maxLabels), "give fewer --label")
	case r.UID == 0 && !r.Privileged:
		return invalid("user", "a workload runs as uid 0 only when it is privileged, since uid 0 leaves its cgroup at will",
			"give another --user, or --privileged and accept that it is not enforceable")
	}
	for k, v := range r.Labels {
		if !validSegment(k) || len(v) > 253 {
			return invalid("label "+k, "a key has 1 to 63 letters, digits, dots, hyphens and underscores; a value at most 253 bytes",
				"correct --label")
		}
	}
	for _, l := range r.Listen {
		if l.Port == 0 || !slices.Contains(protocols, l.Protocol) {
			return invalid(fmt.Sprintf("listen %d/%s", l.Port, l.Protocol), "a port is 1 to 65535, a protocol http or tcp",
				"give --listen PORT/http or PORT/tcp")
		}
	}
	return nil
}

// protocols are those a workload may declare. Nothing is sniffed (docs/contracts.md).
var protocols = []string{"http", "tcp"}

func validSegment(s string) bool {
	if s == "" || len(s) > 63 || s == "." || s == ".." {
		return false
	}
	return !strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_'
	})
}

func invalid(what, why, do string) error {
	return &refusal.Error{Kind: refusal.Invalid, Code: "invalid-workload", What: what, Why: why, Do: do}
}

// Prepare makes room for a workload that is about to start: an instance id and a cgroup of its own. The caller starts the
// program in that cgroup and then calls Started, or Ended if it could not.
func (m *Machine) Prepare(ctx context.Context, r Registration) (Workload, error) {
	if err := r.check(); err != nil {
		return Workload{}, err
	}
	instance := identity.Unique("w")
	cgroup, id, err := m.makeCgroup(instance)
	if err != nil {
		return Workload{}, err
	}
	w := newWorkload(instance, r, ByRun, cgroup, id)
	w.ours = true
	if err := m.add(w); err != nil {
		m.removeCgroup(cgroup)
		return Workload{}, err
	}
	return m.snapshot(w), nil
}

// Started tells that the first process of a prepared workload runs: it is attested and reported.
// It returns once the workload is attested; its identity may follow later if the server is away.
func (m *Machine) Started(ctx context.Context, instance string, pid int) (Workload, error) {
	w, err := m.find(instance)
	if err != nil {
		return Workload{}, err
	}
	if err := m.attest(ctx, w, pid); err != nil {
		return Workload{}, err
	}
	m.emit(w, "workload.started")
	m.settle(ctx, w)
	return m.snapshot(w), nil
}

// Ended tells that the first process of a workload is over. What it left running keeps the identity until it ends, too:
// a program that becomes a daemon is still the workload.
func (m *Machine) Ended(ctx context.Context, instance string) error {
	w, err := m.find(instance)
	if err != nil {
		return err
	}
	if busy, err := populated(m.dir(w.Cgroup)); err == nil && busy {
		return nil
	}
	m.remove(ctx, w)
	return nil
}

// Forget ends the identity of a workload although it runs; its processes go on, as nobody.
func (m *Machine) Forget(ctx context.Context, instance string) error {
	w, err := m.find(instance)
	if err != nil {
		return err
	}
	m.remove(ctx, w)
	return nil
}

// Enrollment names what already runs: processes and the cgroup they share.
type Enrollment struct {
	Registration
	Cgroup   string
	CgroupID uint64
	PIDs     []int // the first is attested
	// Move, if not nil, tells which processes are to be moved into a cgroup of their own first; it is asked again until it
	// tells of nobody. nil adopts the cgroup as it is.
	Move func() []int
}

// Enroll adopts what already runs, without restarting it. Privileged is found, not asked: a workload that runs as uid 0 is.
func (m *Machine) Enroll(ctx context.Context, e Enrollment) (Workload, error) {
	if len(e.PIDs) == 0 {
		return Workload{}, invalid("cgroup "+e.Cgroup, "no process runs in it", "enroll something that runs")
	}
	first, err := m.cfg.Attestor.Process(ctx, e.PIDs[0])
	if err != nil {
		return Workload{}, err
	}
	if uid, ok := first.Facts.Get(identity.FactUID); ok {
		e.UID = uint32(uid.Value.(int64))
		e.Privileged = e.UID == 0 // more is found out of the workload's own cgroup, once it has one
	}
	if err := e.check(); err != nil {
		return Workload{}, err
	}
	instance := identity.Unique("w")
	cgroup, id, ours, moved := e.Cgroup, e.CgroupID, false, 0
	if e.Move == nil && !m.within(cgroup) {
		return Workload{}, invalid("cgroup "+cgroup, "it is outside this machine's subtree "+m.cfg.Subtree, "ask the agent that owns it")
	}
	if e.Move != nil {
		if cgroup, id, err = m.makeCgroup(instance); err != nil {
			return Workload{}, err
		}
		ours = true
		if moved, err = m.adopt(cgroup, e.Move); err != nil {
			return Workload{}, m.giveBack(cgroup, e.Cgroup, err)
		}
	}
	w := newWorkload(instance, e.Registration, ByEnroll, cgroup, id)
	w.ours, w.Moved = ours, moved
	if err = m.add(w); err == nil {
		if err = m.attest(ctx, w, e.PIDs[0]); err != nil {
			m.mu.Lock()
			w.ours = false // giving back removes the cgroup
			m.mu.Unlock()
			m.remove(ctx, w)
		}
	}
	if err != nil {
		if ours {
			err = m.giveBack(cgroup, e.Cgroup, err)
		}
		return Workload{}, err
	}
	m.emit(w, "workload.enrolled")
	m.settle(ctx, w)
	return m.snapshot(w), nil
}

func newWorkload(instance string, r Registration, how How, cgroup string, id uint64) *workload {
	return &workload{
		Workload: Workload{
			Instance: instance, Service: r.Service, Labels: maps.Clone(r.Labels), Listen: slices.Clone(r.Listen), How: how,
			Privileged: r.Privileged, Cgroup: cgroup, CgroupID: id, UID: r.UID, GID: r.GID, Since: time.Now().UTC(),
		},
		asked: how == ByRun && r.Privileged, attested: make(chan struct{}), changed: make(chan struct{}), jwts: map[string]*cachedJWT{},
	}
}

func (m *Machine) add(w *workload) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.workloads) >= MaxWorkloads {
		m.cfg.Meter.Count("machine_refused", 1, "reason", "too-many-workloads")
		return &refusal.Error{
			Kind: refusal.Exhausted, Code: "too-many-workloads", What: "register a workload",
			Why: fmt.Sprintf("this machine has %d, its limit", MaxWorkloads), Do: "end some, or spread them over more machines",
		}
	}
	if other, ok := m.byCgroup[w.Cgroup]; ok {
		return &refusal.Error{
			Kind: refusal.Conflict, Code: "already-enrolled", What: "enroll " + w.Cgroup,
			Why: fmt.Sprintf("it is workload %s of service %q already", other.Instance, other.Service),
			Do:  "end that one first with redoubt workload forget " + other.Instance,
		}
	}
	m.workloads[w.Instance], m.byCgroup[w.Cgroup] = w, w
	if err := m.saveLocked(); err != nil {
		delete(m.workloads, w.Instance)
		delete(m.byCgroup, w.Cgroup)
		return err
	}
	return nil
}

func (m *Machine) find(instance string) (*workload, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if w, ok := m.workloads[instance]; ok {
		return w, nil
	}
	return nil, &refusal.Error{
		Kind: refusal.Unknown, Code: "unknown-workload", What: "workload " + instance, Why: "no such workload is on this machine",
		Do: "list them with redoubt get workloads",
	}
}

func (m *Machine) remove(_ context.Context, w *workload) {
	m.mu.Lock()
	if m.workloads[w.Instance] != w {
		m.mu.Unlock()
		return
	}
	last := m.copyLocked(w) // who it was, for the record
	delete(m.workloads, w.Instance)
	delete(m.byCgroup, w.Cgroup)
	w.svid, w.ID = nil, identity.ID{}
	w.touch()
	select {
	case <-w.attested:
	default:
		close(w.attested)
	}
	ours := w.ours
	if err := m.saveLocked(); err != nil {
		m.log.Error("the machine's state was not written", "error", err)
	}
	m.mu.Unlock()
	if ours {
		m.sweep(w.Cgroup)
	}
	m.tell(last, "workload.ended")
	m.mu.Lock()
	m.ended = append(m.ended, w.Instance)
	m.mu.Unlock()
	m.wake()
}

// Workloads returns what is here, oldest first.
func (m *Machine) Workloads() []Workload {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Workload, 0, len(m.workloads))
	for _, instance := range slices.Sorted(maps.Keys(m.workloads)) {
		out = append(out, m.copyLocked(m.workloads[instance]))
	}
	return out
}

// Workload returns one by instance.
func (m *Machine) Workload(instance string) (Workload, error) {
	w, err := m.find(instance)
	if err != nil {
		return Workload{}, err
	}
	return m.snapshot(w), nil
}

// ByCgroup returns the workload whose cgroup this is, or lies above it.
func (m *Machine) ByCgroup(cgroup string) (Workload, bool) {
	w := m.lookup(cgroup)
	if w == nil {
		return Workload{}, false
	}
	return m.snapshot(w), true
}

func (m *Machine) lookup(cgroup string) *workload {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := cgroup; ; p = path.Dir(p) {
		if w, ok := m.byCgroup[p]; ok {
			return w
		}
		if p == "/" || p == "." || p == "" {
			return nil
		}
	}
}

func (m *Machine) snapshot(w *workload) Workload {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.copyLocked(w)
}

func (m *Machine) copyLocked(w *workload) Workload {
	c := w.Workload
	c.Labels, c.Listen = maps.Clone(c.Labels), slices.Clone(c.Listen)
	if w.svid != nil {
		c.Expires = w.svid.Expires()
	}
	// What the server alone says of it (its machine, a quarantine) comes with the identities it pushes.
	if peer, ok := m.view.Load().identities[w.Instance]; ok {
		for _, f := range peer.Facts.All() {
			if f.Source != identity.FromServer {
				continue
			}
			if with, err := c.Facts.With(f); err == nil {
				c.Facts = with
			}
		}
	}
	return c
}

func (m *Machine) emit(w *workload, kind string) { m.tell(m.snapshot(w), kind) }

func (m *Machine) tell(c Workload, kind string) {
	e := event.New(event.Runtime, kind)
	e.Machine, e.Workload, e.Identity, e.PID = m.cfg.ID, c.Instance, c.ID, c.PID
	e.Attrs = map[string]any{"service": c.Service, "how": string(c.How), "cgroup": c.Cgroup, "privileged": c.Privileged}
	m.cfg.Sink.Emit(e)
}
