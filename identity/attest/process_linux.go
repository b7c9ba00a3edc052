package attest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// snapshot is what must not change while the facts of a process are read.
//
// Shape: comparable.
type snapshot struct {
	start, flags uint64
	parent       int
	ids          ids
	place        place
	exe          executable
	mounts       string // mount namespace
}

// reading is one attempt at the facts of a process.
type reading struct {
	subject  Subject
	facts    []identity.Fact
	evidence string // "/proc/412"
}

func (r *reading) fact(name string, value any, source identity.Source, evidence string) {
	if s, ok := value.(string); ok {
		if why := unfit(s); why != "" {
			r.warn(name + ": " + why)
			return
		}
	}
	r.facts = append(r.facts, identity.Fact{Name: name, Value: value, Source: source, Evidence: evidence})
}

func (r *reading) warn(w string) { r.subject.Warnings = append(r.subject.Warnings, w) }

// maxText is the longest text that is a fact.
const maxText = 4096

// unfit says why a text is no fact: two texts that differ must not look alike once they are JSON.
func unfit(s string) string {
	switch {
	case len(s) > maxText:
		return fmt.Sprintf("it is longer than %d bytes", maxText)
	case !utf8.ValidString(s):
		return "it is not UTF-8"
	case strings.ContainsFunc(s, unicode.IsControl):
		return "it holds control characters"
	}
	return ""
}

// Process returns what is known of the process now. What could not be had is in its Warnings.
//
// Errors: matches [ErrGone] if the process ended meanwhile, whoever has its pid then; [ErrKernelThread], [ErrNotProcess],
// [ErrChanging], [ErrNoCgroup], [ErrProc], [ErrBusy]; or ctx's.
func (a *Attestor) Process(ctx context.Context, pid int) (Subject, error) {
	p, err := a.open(pid)
	if err != nil {
		return Subject{}, err
	}
	defer p.close()
	var first uint64
	for attempt := range maxReadings {
		if err := ctx.Err(); err != nil {
			return Subject{}, err
		}
		r, before, err := a.readOnce(ctx, p)
		if err != nil {
			return Subject{}, err
		}
		if attempt == 0 {
			first = before.start
		}
		a.between()
		fd, after, err := a.snapshot(p)
		if err != nil {
			return Subject{}, err
		}
		closeFD(fd)
		if !p.alive() || after.start != before.start || after.start != first {
			return Subject{}, a.gone(pid, "it ended while it was read")
		}
		if before != after {
			continue // it executed another program, changed its user or was moved: nothing read so far holds together
		}
		set, err := identity.NewFactSet(r.facts...)
		if err != nil {
			return Subject{}, fmt.Errorf("facts of process %d: %w", pid, err)
		}
		r.subject.Facts = set
		for range r.subject.Warnings {
			a.config.Meter.Count("attest_warnings", 1)
		}
		return r.subject, nil
	}
	return Subject{}, a.refuse(
		ErrChanging, refusal.Unavailable, pid,
		fmt.Sprintf("in %d readings it was never the same before and after (it executes programs, or changes its user or cgroup)", maxReadings),
		"try again when it has settled",
	)
}

// snapshot reads what must hold still, and opens the executable. fd is -1 if the executable may not be looked at.
func (a *Attestor) snapshot(p *process) (fd int, s snapshot, err error) {
	st, err := p.stat()
	if err != nil {
		return -1, s, a.readError(p, err)
	}
	if st.ended() || !p.alive() {
		return -1, s, a.gone(p.pid, "it has ended (a zombie is left until its parent takes note)")
	}
	if st.flags&kernelThread != 0 {
		return -1, s, a.refuse(ErrKernelThread, refusal.Invalid, p.pid, "it is a thread of the kernel", "name a process of a workload")
	}
	s.start, s.parent, s.flags = st.start, st.parent, st.flags&kernelThread
	status, err := p.read("status")
	if err == nil {
		s.ids, err = parseStatus(status)
	}
	if err != nil {
		return -1, s, a.readError(p, err)
	}
	cgroup, err := p.read("cgroup")
	if err == nil {
		s.place, err = parseCgroup(cgroup)
	}
	if errors.Is(err, errNoUnified) || errors.Is(err, errOutside) {
		return -1, s, noCgroup(err.Error())
	}
	if err != nil {
		return -1, s, a.readError(p, err)
	}
	if s.mounts, err = p.link("ns/mnt"); err != nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
		return -1, s, a.readError(p, err)
	}
	fd, s.exe, err = p.openExecutable()
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		s.exe = executable{none: true}
	case err != nil: // ENOENT: its memory is gone, it is ending
		return -1, s, a.readError(p, err)
	}
	return fd, s, nil
}

func (a *Attestor) readError(p *process, err error) error {
	switch {
	case errors.Is(err, errRemoved), ended(err), !p.alive():
		return a.gone(p.pid, "it ended while it was read")
	default:
		return a.unreadable(p.pid, err)
	}
}

func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// readOnce reads all facts once.
func (a *Attestor) readOnce(ctx context.Context, p *process) (*reading, snapshot, error) {
	fd, s, err := a.snapshot(p)
	if err != nil {
		return nil, s, err
	}
	defer func() { closeFD(fd) }()
	id, err := CgroupIDOf(a.dirOf(s.place.unified))
	if err != nil {
		return nil, s, a.gone(p.pid, "its cgroup was removed while it was read")
	}
	proc := fmt.Sprintf("/proc/%d", p.pid)
	r := &reading{evidence: proc, subject: Subject{PID: p.pid, Start: s.start, Cgroup: s.place.unified, CgroupID: id}}
	r.fact(identity.FactUID, int64(s.ids.uid[1]), identity.FromKernel, proc+"/status")
	r.fact(identity.FactGID, int64(s.ids.gid[1]), identity.FromKernel, proc+"/status")
	if s.ids.mixed() {
		r.warn("unix.uid, unix.gid: the effective ones; its real, effective and saved ids differ, so that it can change between them")
	}
	r.fact(identity.FactCgroup, s.place.unified, identity.FromKernel, proc+"/cgroup")
	a.unit(r, s.place)
	inContainer := a.container(ctx, r, s)
	if err := a.executable(ctx, r, p, fd, s, inContainer); err != nil {
		return nil, s, err
	}
	a.parents(ctx, r, s)
	return r, s, nil
}

// unit adds the systemd unit. In hybrid set-ups without systemd in the unified hierarchy, systemd's own is asked.
func (a *Attestor) unit(r *reading, at place) {
	name, cgroup := unitOf(at.unified)
	if name != "" {
		if !a.onlyRootAbove(cgroup) {
			r.warn("systemd.unit: the cgroup is in a subtree that was delegated to a user, who can give any name")
			return
		}
		r.fact(identity.FactUnit, name, identity.FromKernel, r.evidence+"/cgroup")
		return
	}
	if at.unified == "/" {
		if name, _ := unitOf(at.systemd); name != "" {
			r.fact(identity.FactUnit, name, identity.FromKernel, r.evidence+"/cgroup (name=systemd)")
		}
	}
}

// executable adds path and hash of the executable.
func (a *Attestor) executable(ctx context.Context, r *reading, p *process, fd int, s snapshot, inContainer string) error {
	if s.exe.none {
		r.warn("executable.path, executable.sha256: the agent may not look at this process (it needs CAP_SYS_PTRACE)")
		return nil
	}
	sameMounts := s.mounts == ownMounts()
	path, warning := a.pathOf(ctx, s.exe, sameMounts)
	if !sameMounts {
		path, warning = a.remembered(p.pid, s, path, warning)
	}
	switch {
	case path != "":
		r.fact(identity.FactExePath, path, identity.FromKernel, r.evidence+"/exe")
		if warning != "" {
			r.warn(warning)
		}
	case inContainer != "" && len(s.exe.link) > 1 && s.exe.link[0] == '/' && !strings.HasPrefix(s.exe.link, "/memfd:"):
		// Within a container that its engine vouches for, the path is one of the container's root.
		r.fact(identity.FactExePath, strings.TrimSuffix(s.exe.link, deletedMark), identity.FromContainer, r.evidence+"/exe, in the container's root")
	default:
		r.warn(warning)
	}
	sum, err := a.hash(ctx, p, fd, s.exe)
	var skipped errSkipped
	switch {
	case errors.As(err, &skipped):
		r.warn("executable.sha256: " + skipped.Error())
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		r.warn("executable.sha256: the file system did not answer in time")
	case err != nil:
		return err
	default:
		r.fact(identity.FactExeSHA256, sum, identity.FromKernel, r.evidence+"/exe")
	}
	return nil
}

// unknownParent stands in the chain for a parent whose executable cannot be believed or seen.
const unknownParent = "?"

// parents adds the executables of the parent, its parent and so on: at most maxParents, each read only while it is
// truly the parent of the one before.
func (a *Attestor) parents(ctx context.Context, r *reading, s snapshot) {
	var chain []string
	seen := map[int]bool{r.subject.PID: true}
	own := ownMounts()
	start, pid := s.start, s.parent
	for pid != 0 {
		if len(chain) == maxParents {
			a.config.Meter.Count("attest_parents_cut", 1)
			r.warn(fmt.Sprintf("process.parents: only the nearest %d are listed", maxParents))
			break
		}
		if seen[pid] {
			break
		}
		seen[pid] = true
		name, st, err := a.parent(ctx, pid, own)
		if err != nil || st.start > start { // a parent is never younger than its child: the pid is another's by now
			r.warn(fmt.Sprintf("process.parents: the chain changed while it was read, at process %d", pid))
			break
		}
		if st.flags&kernelThread != 0 {
			break
		}
		chain = append(chain, name)
		start, pid = st.start, st.parent
	}
	if len(chain) > 0 {
		r.facts = append(r.facts, identity.Fact{
			Name: identity.FactParents, Value: chain, Source: identity.FromKernel, Evidence: r.evidence + "/stat",
		})
	}
}

// parent reads one process of the chain.
func (a *Attestor) parent(ctx context.Context, pid int, own string) (string, stat, error) {
	p, err := a.open(pid)
	if err != nil {
		return "", stat{}, err
	}
	defer p.close()
	before, err := p.stat()
	if err != nil {
		return "", stat{}, err
	}
	name := unknownParent
	if fd, e, err := p.openExecutable(); err == nil {
		mounts, _ := p.link("ns/mnt") // unreadable: not the agent's
		path, _ := a.pathOf(ctx, e, mounts == own)
		closeFD(fd)
		if path != "" && unfit(path) == "" {
			name = path
		}
	}
	after, err := p.stat()
	if err != nil || !p.alive() || before.start != after.start || before.parent != after.parent {
		return "", stat{}, errors.Join(errOther, err)
	}
	return name, after, nil
}

// ownMounts names the agent's mount namespace.
func ownMounts() string {
	b := make([]byte, 64)
	n, err := unix.Readlink("/proc/self/ns/mnt", b)
	if err != nil {
		return "unknown"
	}
	return string(b[:n])
}

// sortedPIDs returns the numbers in order, each once.
func sortedPIDs(pids []int) []int {
	slices.Sort(pids)
	return slices.Compact(pids)
}
