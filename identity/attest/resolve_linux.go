package attest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Resolve returns what a name given by an operator stands for: a number is a process, a name with a slash is a cgroup
// (its path in the hierarchy or in the file system), anything else a systemd unit (".service" may be left out).
//
// Errors: matches [ErrName] if nothing bears the name, [ErrAmbiguous] if two do; those of Process.
func (a *Attestor) Resolve(ctx context.Context, name string) (Target, error) {
	if pid, err := strconv.Atoi(name); err == nil {
		return a.resolvePID(pid)
	}
	if strings.Contains(name, "/") {
		return a.resolveCgroup(ctx, name)
	}
	return a.resolveUnit(ctx, name)
}

func (a *Attestor) resolvePID(pid int) (Target, error) {
	p, err := a.open(pid)
	if err != nil {
		return Target{}, err
	}
	defer p.close()
	fd, s, err := a.snapshot(p)
	if err != nil {
		return Target{}, err
	}
	closeFD(fd)
	id, err := CgroupIDOf(a.dirOf(s.place.unified))
	if err != nil || !p.alive() {
		return Target{}, a.gone(pid, "it ended while it was read")
	}
	return Target{Kind: KindPID, Cgroup: s.place.unified, CgroupID: id, PIDs: []int{pid}, Unit: a.unitName(s.place.unified)}, nil
}

func (a *Attestor) unitName(cgroup string) string {
	unit, at := unitOf(cgroup)
	if unit == "" || !a.onlyRootAbove(at) {
		return ""
	}
	return unit
}

func (a *Attestor) resolveCgroup(ctx context.Context, name string) (Target, error) {
	path := filepath.Clean("/" + name)
	if inside, ok := strings.CutPrefix(path, a.config.CgroupRoot); ok && (inside == "" || inside[0] == '/') {
		path = filepath.Clean("/" + inside)
	}
	id, err := CgroupIDOf(a.dirOf(path))
	if err != nil {
		return Target{}, a.noTarget(name, "there is no such cgroup below "+a.config.CgroupRoot, "look at /proc/PID/cgroup of one of its processes")
	}
	pids, err := a.pidsOf(ctx, path)
	if err != nil {
		return Target{}, err
	}
	return Target{Kind: KindCgroup, Cgroup: path, CgroupID: id, PIDs: pids, Unit: a.unitName(path)}, nil
}

func (a *Attestor) resolveUnit(ctx context.Context, name string) (Target, error) {
	unit := name
	if !isUnit(unit) {
		unit += ".service"
	}
	if !isUnit(unit) {
		return Target{}, a.noTarget(name, "it is no number, no path and no name of a systemd unit", "give a unit, a process id or a cgroup path")
	}
	var found []string
	err := a.walk(ctx, "/", func(path string) bool {
		of, at := unitOf(path)
		if of == unit && at == path && a.onlyRootAbove(path) {
			found = append(found, path)
		}
		// Below a unit there are no other units of the system's.
		return of == ""
	})
	if err != nil {
		return Target{}, err
	}
	switch len(found) {
	case 0:
		return Target{}, a.noTarget(name, fmt.Sprintf("no unit %s runs here", unit), "see systemctl status; or give a process id or a cgroup path")
	case 1:
		t, err := a.resolveCgroup(ctx, found[0])
		t.Kind, t.Unit = KindUnit, unit
		return t, err
	default:
		a.config.Meter.Count("attest_refused", 1, "code", ErrAmbiguous.Code)
		return Target{}, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrAmbiguous.Code, What: fmt.Sprintf("target %q", name),
			Why: "more than one cgroup is that unit's: " + strings.Join(found, ", "), Do: "give the path of one of them",
		}
	}
}

func (a *Attestor) noTarget(name, why, do string) error {
	a.config.Meter.Count("attest_refused", 1, "code", ErrName.Code)
	return &refusal.Error{Kind: refusal.Unknown, Code: ErrName.Code, What: fmt.Sprintf("target %q", name), Why: why, Do: do}
}

// walk calls visit for every cgroup below and at path, parents first; visit says whether to go on below. Cgroups that
// are removed meanwhile are passed over.
func (a *Attestor) walk(ctx context.Context, path string, visit func(path string) bool) error {
	seen := 0
	top := a.dirOf(path)
	err := filepath.WalkDir(top, func(dir string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || ended(err) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if seen++; seen > maxCgroups {
			a.config.Meter.Count("attest_walk_cut", 1)
			return filepath.SkipAll
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		at := strings.TrimPrefix(dir, a.config.CgroupRoot)
		if at == "" {
			at = "/"
		}
		if !visit(at) {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("walk the cgroups: %w", err)
	}
	return nil
}

// pidsOf returns the processes in a cgroup and below, in order.
func (a *Attestor) pidsOf(ctx context.Context, cgroup string) ([]int, error) {
	var pids []int
	err := a.walk(ctx, cgroup, func(path string) bool {
		data, err := readFile(filepath.Join(a.dirOf(path), "cgroup.procs"))
		if err != nil {
			return true // removed meanwhile, or one of threads, whose processes are listed above it
		}
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 { // 0: of another pid namespace
				pids = append(pids, pid)
			}
		}
		if len(pids) > maxPIDs {
			a.config.Meter.Count("attest_walk_cut", 1)
			return false
		}
		return true
	})
	return sortedPIDs(pids), err
}

// Containers returns the first process of every container that runs now, in order of cgroup: those whose cgroup bears an
// engine's name, and those that runc has a record of. One that ends meanwhile is left out, with a line in the log.
func (a *Attestor) Containers(ctx context.Context) ([]Subject, error) {
	cgroups := map[string]bool{}
	err := a.walk(ctx, "/", func(path string) bool {
		c, ok := containerOf(path)
		if ok && c.at == path && a.onlyRootAbove(path) {
			cgroups[path] = true
		}
		return !ok // what a container makes below is the container's
	})
	if err != nil {
		return nil, err
	}
	for _, rec := range a.runcRecords() {
		if _, ok := containerOf(rec.cgroup); !ok {
			cgroups[rec.cgroup] = true
		}
	}
	var subjects []Subject
	for _, path := range slices.Sorted(maps.Keys(cgroups)) {
		s, err := a.firstOf(ctx, path)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			if !errors.Is(err, ErrGone) {
				a.config.Logger.WarnContext(ctx, "container not attested", "cgroup", path, "error", err)
			}
			continue
		}
		if s.Facts.Text(identity.FactContainerID) != "" { // else: a name that no engine vouches for
			subjects = append(subjects, s)
		}
	}
	return subjects, nil
}

// firstOf returns the subject of the oldest process in a cgroup and below.
func (a *Attestor) firstOf(ctx context.Context, cgroup string) (Subject, error) {
	pids, err := a.pidsOf(ctx, cgroup)
	if err != nil {
		return Subject{}, err
	}
	oldest, start := 0, uint64(0)
	for _, pid := range pids {
		p, err := a.open(pid)
		if err != nil {
			continue
		}
		st, err := p.stat()
		p.close()
		if err == nil && !st.ended() && (oldest == 0 || st.start < start) {
			oldest, start = pid, st.start
		}
	}
	if oldest == 0 {
		return Subject{}, &refusal.Error{Kind: refusal.Unknown, Code: ErrGone.Code, What: "cgroup " + cgroup, Why: "no process is in it"}
	}
	s, err := a.Process(ctx, oldest)
	if err == nil && (s.Start != start || !within(s.Cgroup, cgroup)) {
		return Subject{}, a.gone(oldest, "another process has its number by now, or it was moved")
	}
	return s, err
}
