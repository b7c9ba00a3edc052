package machine

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// fullReportEvery is how often everything present is reported, so that the server forgets what a lost message left behind.
const fullReportEvery = 5 * time.Minute

// attest reads the facts of a workload's process and keeps them. It refuses a process that is not in the workload's
// cgroup: whoever names a pid does not thereby make it part of a workload.
func (m *Machine) attest(ctx context.Context, w *workload, pid int) error {
	subject, err := m.cfg.Attestor.Process(ctx, pid)
	if err != nil {
		return err
	}
	rootlike, known := false, false
	if m.cfg.Privileged != nil {
		rootlike, known = m.cfg.Privileged(w.Cgroup)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if subject.Cgroup != w.Cgroup && !strings.HasPrefix(subject.Cgroup, strings.TrimSuffix(w.Cgroup, "/")+"/") {
		return &refusal.Error{
			Kind: refusal.Denied, Code: "not-of-this-workload", What: "attest a process for workload " + w.Instance,
			Why: "the process is in cgroup " + subject.Cgroup + ", the workload is " + w.Cgroup, Do: "name a process of the workload",
		}
	}
	was := w.Privileged
	uid, ok := subject.Facts.Get(identity.FactUID)
	// Whatever was promised: what runs counts. What cannot be told stays as it was.
	w.Privileged = w.asked || rootlike || ok && uid.Value == int64(0) || !known && was
	facts, err := subject.Facts.With(declared(w)...)
	if err != nil {
		return err
	}
	changed := w.PID != subject.PID || w.Start != subject.Start || w.Privileged != was
	if facts.Digest() != w.Facts.Digest() {
		changed = true
		w.Facts, err = w.Facts.With(facts.All()...)
		if err != nil {
			return err
		}
		// What is no longer said is no longer true: a label of an image that an exec replaced, say.
		for _, f := range w.Facts.All() {
			if _, still := facts.Get(f.Name); !still {
				w.Facts = w.Facts.Without(f.Name)
			}
		}
		w.dirty = true
	}
	w.PID, w.Start, w.attestAt = subject.PID, subject.Start, time.Now().Add(attestEvery)
	select {
	case <-w.attested:
	default:
		close(w.attested)
	}
	if !changed {
		return nil // a look that found nothing new is no reason to write to the disk
	}
	return m.saveLocked()
}

// declared is what root of this machine said of the workload, and what the machine itself knows.
func declared(w *workload) []identity.Fact {
	facts := []identity.Fact{
		{Name: identity.FactInstance, Value: w.Instance, Source: identity.FromKernel},
		{Name: identity.FactHow, Value: string(w.How), Source: identity.FromKernel},
		{Name: identity.FactPrivileged, Value: w.Privileged, Source: identity.FromKernel},
	}
	if w.Service != "" {
		facts = append(facts, identity.Fact{Name: identity.FactService, Value: w.Service, Source: identity.FromOperator})
	}
	for _, k := range slices.Sorted(maps.Keys(w.Labels)) {
		facts = append(facts, identity.Fact{Name: identity.FactLabelPrefix + k, Value: w.Labels[k], Source: identity.FromOperator})
	}
	if len(w.Listen) > 0 {
		listen := make([]string, len(w.Listen))
		for i, l := range w.Listen {
			listen[i] = fmt.Sprintf("%d/%s", l.Port, l.Protocol)
		}
		facts = append(facts, identity.Fact{Name: identity.FactListen, Value: listen, Source: identity.FromOperator})
	}
	return facts
}

// discover registers the container or unit that a process belongs to, when nobody has registered it before.
func (m *Machine) discover(ctx context.Context, pid int, cgroup string) (*workload, error) {
	subject, err := m.cfg.Attestor.Process(ctx, pid)
	if err != nil {
		return nil, err
	}
	top := unitOf(subject)
	if top == "" || !m.within(top) {
		return nil, &refusal.Error{
			Kind: refusal.Denied, Code: "no-identity", What: "identity for process in cgroup " + cgroup,
			Why: "it belongs to no workload: not started by redoubt run, not enrolled, no container and no systemd unit",
			Do:  "start it with redoubt run --service NAME -- …, or enroll what runs with redoubt enroll PID --service NAME",
		}
	}
	id, err := cgroupID(m.dir(top))
	if err != nil {
		return nil, err
	}
	w := newWorkload(identity.Unique("w"), Registration{}, ByDiscovery, top, id)
	if err := m.add(w); err != nil {
		if other := m.lookup(cgroup); other != nil {
			return other, nil // another connection of the same workload was first
		}
		return nil, err
	}
	if err := m.attest(ctx, w, pid); err != nil {
		m.remove(ctx, w)
		return nil, err
	}
	m.emit(w, "workload.discovered")
	m.settle(ctx, w)
	return w, nil
}

// settle reports what is due and has the SVID of this workload signed, but does not wait long for a server that is away:
// whoever asked goes on, and the registry's own loop tries again. Nobody else's renewal hangs on the caller's patience.
func (m *Machine) settle(ctx context.Context, w *workload) {
	brief, cancel := context.WithTimeout(ctx, briefly)
	defer cancel()
	m.reportDue(brief, false)
	m.reported(brief)
	if m.claim(w, time.Now().Round(0)) {
		m.renew(brief, w)
	}
	m.wake()
}

// reported waits until a report that is on its way has been answered: this workload may be in it.
func (m *Machine) reported(ctx context.Context) {
	select {
	case m.reporting <- struct{}{}:
		<-m.reporting
	case <-ctx.Done():
	}
}

// unitOf returns the cgroup that bounds the container or systemd service of a process, or "" if it is in neither.
func unitOf(s Subject) string {
	mark := s.Facts.Text(identity.FactContainerID)
	container := mark != ""
	if !container {
		if mark = s.Facts.Text(identity.FactUnit); !strings.HasSuffix(mark, ".service") {
			return ""
		}
	}
	// From the top down, and only the very name: what a workload makes below its own cgroup is the workload.
	parts := strings.Split(strings.Trim(s.Cgroup, "/"), "/")
	for i, part := range parts {
		name := strings.TrimSuffix(part, ".scope")
		if part == mark || container && (name == mark || strings.HasSuffix(name, "-"+mark)) {
			return "/" + strings.Join(parts[:i+1], "/")
		}
	}
	return ""
}

// startWithin is how long a prepared workload may take until its first process runs.
const startWithin = time.Minute

// watch ends workloads whose cgroup has no process left, or is another than it was; attests those that run although nobody
// said so; and removes cgroups of ours that have become empty.
func (m *Machine) watch(ctx context.Context) {
	type look struct {
		*workload
		cgroup  string
		id      uint64
		pid     int
		waiting bool
	}
	m.mu.Lock()
	looks := make([]look, 0, len(m.workloads))
	for _, w := range m.workloads {
		looks = append(looks, look{w, w.Cgroup, w.CgroupID, w.PID, w.PID == 0 && time.Since(w.Since) < startWithin})
	}
	husks := m.husks
	m.husks = nil
	m.mu.Unlock()
	for _, l := range looks {
		dir := m.dir(l.cgroup)
		id, err := cgroupID(dir)
		busy, perr := populated(dir)
		switch {
		case err != nil || perr != nil || id != l.id || !busy && !l.waiting:
			m.remove(ctx, l.workload)
		case busy && l.pid == 0:
			m.attestUnsaid(ctx, l.workload, dir)
		}
	}
	for _, cgroup := range husks {
		m.sweep(cgroup)
	}
}

// unsaidAfter is how long whoever started a workload has to say so.
const unsaidAfter = 5 * time.Second

// attestUnsaid attests a prepared workload that runs although whoever started it could not say so (the agent was down, or
// busy): its processes are in its cgroup, so it is what was prepared.
func (m *Machine) attestUnsaid(ctx context.Context, w *workload, dir string) {
	m.mu.Lock()
	young, uid := time.Since(w.Since) < unsaidAfter, int64(w.UID)
	m.mu.Unlock()
	if young {
		return // its starter is about to say
	}
	for _, pid := range processes(dir) {
		// Until it has become the program, the launcher is in the cgroup, as root.
		s, err := m.cfg.Attestor.Process(ctx, pid)
		if err != nil {
			continue
		}
		if is, _ := s.Facts.Get(identity.FactUID); is.Value != uid {
			continue
		}
		if err := m.attest(ctx, w, pid); err == nil {
			m.emit(w, "workload.started")
			return
		}
	}
}

// attestDue looks again at workloads whose facts are due: an exec or a new label changes who they are.
func (m *Machine) attestDue(ctx context.Context) {
	m.mu.Lock()
	type look struct {
		*workload
		pid    int
		cgroup string
	}
	var due []look
	for _, w := range m.workloads {
		if w.PID != 0 && time.Now().After(w.attestAt) {
			w.attestAt = time.Now().Add(attestEvery)
			due = append(due, look{w, w.PID, w.Cgroup})
		}
	}
	m.mu.Unlock()
	for _, l := range due {
		err := m.attest(ctx, l.workload, l.pid)
		if err == nil {
			continue
		}
		// The first process has ended, or its pid is another's by now: the oldest of those that go on stands for them.
		for _, pid := range processes(m.dir(l.cgroup)) {
			if err = m.attest(ctx, l.workload, pid); err == nil {
				break
			}
		}
		if err != nil {
			m.log.Debug("a workload could not be attested again", "workload", l.Instance, "error", err)
		}
	}
}

// reportDue tells the server of workloads whose facts changed (all of them when full) and of those that ended, and takes
// its answers. It reports whether the server has been reached.
func (m *Machine) reportDue(ctx context.Context, full bool) bool {
	if !full && !m.anythingToReport() {
		return false
	}
	select {
	case m.reporting <- struct{}{}:
		defer func() { <-m.reporting }()
	case <-ctx.Done():
		return false
	}
	m.mu.Lock()
	report := fleet.Report{Full: full, Gone: m.ended}
	m.ended = nil
	var told []*workload
	for _, w := range m.workloads {
		if w.Facts.Len() > 0 && (w.dirty || full) {
			report.Present = append(report.Present, fleet.Observed{Instance: w.Instance, Facts: w.Facts, Listen: w.Listen})
			w.dirty = false
			told = append(told, w)
		}
	}
	m.mu.Unlock()
	if len(told) == 0 && len(report.Gone) == 0 && !full {
		return false
	}
	assigned, err := m.cfg.Upstream.Report(ctx, report)
	if err != nil {
		m.mu.Lock()
		for _, w := range told {
			w.dirty = true
		}
		// Beyond this the next full report tells it: what is not named there is gone.
		if len(m.ended)+len(report.Gone) <= MaxWorkloads {
			m.ended = append(m.ended, report.Gone...)
		}
		m.mu.Unlock()
		m.log.Debug("workloads were not reported; it will be tried again", "error", err)
		return false
	}
	for _, a := range assigned {
		m.assign(a)
	}
	return true
}

func (m *Machine) anythingToReport() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ended) > 0 {
		return true
	}
	for _, w := range m.workloads {
		if w.dirty && w.Facts.Len() > 0 {
			return true
		}
	}
	return false
}

// assign takes the server's answer about one workload.
func (m *Machine) assign(a fleet.Assigned) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w, ok := m.workloads[a.Instance]
	if !ok {
		return
	}
	w.Issuance = a.Issuance
	if a.ID == w.ID && (a.Refusal == nil) == (w.refused == nil) && !w.ID.IsZero() {
		return
	}
	if a.ID != w.ID {
		w.svid, w.renewAt, w.jwts = nil, time.Time{}, map[string]*cachedJWT{}
	}
	w.ID, w.refused, w.Refusal = a.ID, nil, ""
	if a.Refusal != nil {
		w.refused = a.Refusal.Err()
		w.Refusal = w.refused.Error()
	}
	w.touch()
	m.wake()
}

// controlEvent tells of the machine's own life.
func (m *Machine) controlEvent(kind, message string, attrs map[string]any) {
	e := event.New(event.Control, kind)
	e.Machine, e.Message, e.Attrs = m.cfg.ID, message, attrs
	m.cfg.Sink.Emit(e)
}
