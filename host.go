package redoubt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sandbox"
	"github.com/redoubtsec/redoubt/sensor"
)

// host plugs the doors that look at this machine (attest, sandbox, sensor) into those that need them.
type host struct {
	id        string
	attestor  *attest.Attestor
	machine   *machine.Machine
	meter     event.Meter
	subtree   string
	userMu    sync.Mutex
	reserved  map[uint32]time.Time // dynamic users given out and not registered yet, until when; guarded by userMu
	proofs    atomic.Pointer[[]policy.Protection]
	ledger    atomic.Pointer[sensor.Ledger]
	doubtMu   sync.Mutex
	doubted   map[string]string     // guarded by doubtMu
	doubtedAt time.Time             // guarded by doubtMu
	extra     func() map[string]any // what `doctor` shows of the agent itself
}

// Process implements machine.Attestor.
func (h *host) Process(ctx context.Context, pid int) (machine.Subject, error) {
	s, err := h.attestor.Process(ctx, pid)
	if err != nil {
		return machine.Subject{}, err
	}
	return machine.Subject{PID: s.PID, Start: s.Start, Cgroup: s.Cgroup, CgroupID: s.CgroupID, Facts: s.Facts}, nil
}

// Resolve implements local.Host. A pid stands for itself and for those of its descendants that share its cgroup; the cgroup
// is its own if nothing else is in it.
func (h *host) Resolve(ctx context.Context, name string) (local.Target, error) {
	t, err := h.attestor.Resolve(ctx, name)
	if err != nil {
		return local.Target{}, err
	}
	out := local.Target{Cgroup: t.Cgroup, CgroupID: t.CgroupID, PIDs: t.PIDs, Unit: t.Unit, Kind: string(t.Kind), Alone: true}
	refuse := func(code, why, do string) (local.Target, error) {
		return local.Target{}, &refusal.Error{Kind: refusal.Invalid, Code: code, What: "enroll " + name, Why: why, Do: do}
	}
	if t.Kind == attest.KindCgroup && t.Cgroup == "/" {
		return refuse("root-cgroup", "it holds the whole machine, not one workload", "name a unit, a process, or a cgroup below it")
	}
	if t.Kind == attest.KindPID {
		out.PIDs = h.Family(out)
		if t.Unit == "" || !strings.HasSuffix(t.Unit, ".service") {
			// A unit is a workload as a whole: moving one of its processes would tear it apart.
			whole, err := h.attestor.Resolve(ctx, t.Cgroup)
			out.Alone = err == nil && t.Cgroup != "/" && subset(whole.PIDs, out.PIDs)
		}
	}
	if slices.Contains(out.PIDs, os.Getpid()) || slices.Contains(out.PIDs, 1) {
		return refuse("never-touch", "the agent itself, or the machine's first process, is among its processes", "name the program that you mean, not what started it")
	}
	return out, nil
}

// Family implements local.Host: the target's processes and their descendants, as far as they are in the target's cgroup.
func (h *host) Family(t local.Target) []int {
	tree := scan()
	seen := map[int]bool{}
	out := []int{}
	for queue := slices.Clone(t.PIDs); len(queue) > 0; queue = queue[1:] {
		pid := queue[0]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		if unifiedCgroup(pid) == t.Cgroup {
			out = append(out, pid)
		}
		queue = append(queue, tree[pid]...)
	}
	return out
}

// scan returns the children of every process.
func scan() map[int][]int {
	children := map[int][]int{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile(path.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		// The command name may hold blanks and parentheses: the fields begin after the last one.
		fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
		if len(fields) < 2 {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	return children
}

// unifiedCgroup returns the path of a process in the unified hierarchy, or "" once it is gone.
func unifiedCgroup(pid int) string {
	raw, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	for line := range strings.Lines(string(raw)) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return p
		}
	}
	return ""
}

func subset(all, of []int) bool {
	in := map[int]bool{}
	for _, p := range of {
		in[p] = true
	}
	for _, p := range all {
		if !in[p] {
			return false
		}
	}
	return true
}

// User implements local.Host.
func (h *host) User(_ context.Context, name string) (uint32, uint32, error) {
	if name != "" {
		return sandbox.LookupUser(name)
	}
	h.userMu.Lock()
	defer h.userMu.Unlock()
	taken := map[uint32]bool{}
	for uid, until := range h.reserved {
		if time.Now().Before(until) {
			taken[uid] = true
		} else {
			delete(h.reserved, uid)
		}
	}
	for _, w := range h.machine.Workloads() {
		taken[w.UID] = true
	}
	uid, err := sandbox.DynamicUser(identity.Unique("u"), taken)
	if err == nil {
		h.reserved[uid] = time.Now().Add(time.Minute) // until it is registered, or was not used
	}
	return uid, uid, err
}

// Explain implements local.Host: what a workload, or anything that runs, is attested as, and which rules gave it its name.
func (h *host) Explain(ctx context.Context, name string) (json.RawMessage, error) {
	type explanation struct {
		Workload *machine.Workload `json:"workload,omitempty"`
		Facts    identity.FactSet  `json:"facts"`
		Warnings []string          `json:"warnings,omitempty"`
		Issuance json.RawMessage   `json:"issuance,omitempty"`
		Identity identity.ID       `json:"identity,omitzero"`
		Refusal  string            `json:"refusal,omitempty"`
	}
	fill := func(w machine.Workload) (json.RawMessage, error) {
		return json.Marshal(explanation{Workload: &w, Facts: w.Facts, Issuance: w.Issuance, Identity: w.ID, Refusal: w.Refusal})
	}
	_, notNumber := strconv.Atoi(name) // a number is a pid, whatever services are called
	for _, w := range h.machine.Workloads() {
		if notNumber != nil && (w.Instance == name || w.Service == name && name != "") {
			return fill(w)
		}
	}
	t, err := h.attestor.Resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	if w, ok := h.machine.ByCgroup(t.Cgroup); ok {
		return fill(w)
	}
	if len(t.PIDs) == 0 {
		return nil, &refusal.Error{
			Kind: refusal.Unknown, Code: "no-process", What: "explain " + name, Why: "no process runs there", Do: "name something that runs",
		}
	}
	s, err := h.attestor.Process(ctx, t.PIDs[0])
	if err != nil {
		return nil, err
	}
	return json.Marshal(explanation{Facts: s.Facts, Warnings: s.Warnings, Refusal: "it is no workload: start it with redoubt run, or enroll it"})
}

// Protections implements local.Host.
func (h *host) Protections() []policy.Protection {
	var proofs []policy.Protection
	if p := h.proofs.Load(); p != nil {
		proofs = *p
	}
	out := make([]policy.Protection, 0, len(proofs))
	out = append(out, proofs...)
	return append(out, h.machine.Protections(proofs, h.doubts())...)
}

// doubtsFor is how long an answer of doubts stands: it reads every process of the machine.
const doubtsFor = 5 * time.Second

// doubts looks at every process of the machine and says of workloads why what was proved of confinement in general does not
// hold of them: a process that is not confined, or one outside that runs as the same user and may therefore trace it.
func (h *host) doubts() map[string]string {
	h.doubtMu.Lock()
	defer h.doubtMu.Unlock()
	if h.doubted == nil || time.Since(h.doubtedAt) > doubtsFor {
		h.doubted, h.doubtedAt = h.look(), time.Now()
	}
	return h.doubted
}

func (h *host) look() map[string]string {
	workloads := map[string]machine.Workload{} // confined ones, by cgroup
	byUID := map[uint32]machine.Workload{}
	for _, w := range h.machine.Workloads() {
		if w.How == machine.ByRun && !w.Privileged && w.PID != 0 {
			workloads[w.Cgroup], byUID[w.UID] = w, w
		}
	}
	out := map[string]string{}
	if len(workloads) == 0 {
		return out
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		uids := usersOf(pid)
		cgroup := unifiedCgroup(pid)
		inside, is := workloads[cgroup]
		for p := cgroup; !is && len(p) > 1; p = path.Dir(p) {
			inside, is = workloads[p]
		}
		// Reasons name no pid: what is shown must not change with every short-lived process.
		if is {
			if c, err := sandbox.Confinement(pid); err == nil {
				if lacks := c.Lacks(); len(lacks) > 0 {
					out[inside.Instance] = "a process of it is not confined: " + strings.Join(lacks, ", ")
				}
			}
		}
		for _, uid := range uids {
			if w, shared := byUID[uid]; shared && (!is || inside.Instance != w.Instance) {
				out[w.Instance] = "its user is shared with processes outside of it, which may trace it"
				if is {
					out[inside.Instance] = "its user is shared with another workload"
				}
			}
		}
	}
	return out
}

// usersOf returns the real, effective, saved and file system user of a process, or none once it is gone.
func usersOf(pid int) []uint32 {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(raw)) {
		rest, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		var out []uint32
		for field := range strings.FieldsSeq(rest) {
			if uid, err := strconv.ParseUint(field, 10, 32); err == nil {
				out = append(out, uint32(uid))
			}
		}
		return out
	}
	return nil
}

// privileged implements machine.Config.Privileged.
func (h *host) privileged(cgroup string) (privileged, known bool) {
	t, err := h.attestor.Resolve(context.Background(), cgroup)
	if err != nil {
		return false, false
	}
	known = true
	for _, pid := range t.PIDs {
		c, err := sandbox.Confinement(pid)
		switch {
		case errors.Is(err, sandbox.ErrGone):
		case err != nil:
			known = false
		case slices.Contains(c.UIDs[:], 0) || c.Permitted|c.Effective != 0:
			return true, true
		}
	}
	return false, known
}

// Doctor implements local.Host.
func (h *host) Doctor(ctx context.Context) (json.RawMessage, error) {
	ledger := h.ledger.Load()
	if ledger == nil {
		var err error
		if ledger, err = sensor.Probe(ctx, h.attestor.CgroupRoot()); err != nil {
			return nil, err
		}
		h.ledger.Store(ledger)
	}
	doc := map[string]any{
		"machine": h.id, "ledger": ledger, "summary": ledger.Summary(), "protections": h.Protections(), "status": h.machine.Status(),
		"when_unsure": whenUnsure,
	}
	maps.Copy(doc, h.extra())
	return json.Marshal(doc)
}

// whenUnsure is what each part does when another is gone (docs/contracts.md, "When unsure").
var whenUnsure = []string{
	"server gone: this agent decides with its last policy set and serves the SVIDs it has until they expire; new workloads get none until it is back",
	"agent gone: running workloads keep their confinement and the SVIDs they hold; no SVID is renewed and nothing new is started",
	"policy set not readable: the former one stays in force, and the event stream says so",
	"point in enforce that cannot decide: refuses, except what the never-touch list protects",
}

// prove attacks a throw-away workload again and again, so that nothing is called enforced without a recent proof.
func (h *host) prove(ctx context.Context, every time.Duration, report func(error)) {
	for {
		taken := map[uint32]bool{}
		for _, w := range h.machine.Workloads() {
			taken[w.UID] = true
		}
		root := path.Join(h.attestor.CgroupRoot(), h.subtree)
		proofs, err := sandbox.Prove(ctx, sandbox.ProveConfig{CgroupRoot: root, Machine: h.id, Taken: taken, Meter: h.meter})
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			report(err)
			proofs = []policy.Protection{{
				Machine: h.id, Name: machine.Confinement, State: policy.NotEnforceable, Reason: err.Error(),
				Change: "see redoubt doctor for what this machine lacks",
			}}
		}
		h.proofs.Store(&proofs)
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

// source gives the Workload API its documents. It is a type of its own because only the roof knows both rooms.
type source struct{ machine *machine.Machine }

// X509 implements workload.Source.
func (s source) X509(ctx context.Context, c *workload.Caller) (workload.Update, error) {
	docs, err := s.machine.Documents(ctx, c.PID, c.Cgroup)
	return workload.Update{SVIDs: docs.SVIDs, Bundles: docs.Bundles, Changed: docs.Changed}, err
}

// Bundles implements workload.Source.
func (s source) Bundles(ctx context.Context, c *workload.Caller) (workload.Update, error) {
	bundle, changed, err := s.machine.Bundle(ctx, c.PID, c.Cgroup)
	if err != nil {
		return workload.Update{}, err
	}
	return workload.Update{Bundles: []*identity.Bundle{bundle}, Changed: changed}, nil
}

// JWT implements workload.Source.
func (s source) JWT(ctx context.Context, c *workload.Caller, audience []string, only identity.ID) ([]*identity.JWTSVID, error) {
	svid, err := s.machine.JWT(ctx, c.PID, c.Cgroup, audience, only)
	if err != nil {
		return nil, err
	}
	return []*identity.JWTSVID{svid}, nil
}

// hostName is the machine's name, made into one that a SPIFFE ID can carry.
func hostName() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "machine"
	}
	return strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, strings.ToLower(name)), "-.")
}

// unpin lifts everything below a bpffs directory; a directory that is none holds nothing of ours.
func unpin(dir string) ([]string, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, nil //nolint:nilerr // no directory, nothing pinned
	}
	lifted, err := sensor.Unpin(dir)
	if err != nil {
		return lifted, fmt.Errorf("unpin %s: %w", dir, err)
	}
	return lifted, nil
}
