package attest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
)

// containerKey names one run of one container: a cgroup that is made again has another inode.
//
// Shape: comparable.
type containerKey struct {
	id     string
	cgroup uint64
}

// runcFile is one state.json of runc, as it was read.
type runcFile struct {
	id     fileID
	record record
}

// container adds the facts of the container in which the process is, and returns its id if the engine vouches for it.
func (a *Attestor) container(ctx context.Context, r *reading, s snapshot) string {
	c, named := containerOf(s.place.unified)
	if !named {
		if rec, ok := a.runcOf(s.place.unified); ok && a.onlyRootAbove(rec.cgroup) {
			a.addContainer(r, container{engine: runc, id: rec.id, at: rec.cgroup}, rec)
			return rec.id
		}
		return ""
	}
	if !a.onlyRootAbove(c.at) {
		r.warn("container.id: the cgroup is in a subtree that was delegated to a user, who can give any name")
		return ""
	}
	if c.engine != podman {
		// The name was given by root, who runs the engine; its records are not read.
		a.addContainer(r, c, record{})
		return c.id
	}
	rec, err := a.podmanRecord(ctx, c)
	switch {
	case errors.Is(err, errUnknown):
		r.warn("container.id: the cgroup bears the name of a podman container, but " + err.Error())
		return ""
	case err != nil:
		a.addContainer(r, c, record{})
		r.warn("container.image, container.digest, container.label: " + err.Error())
		return c.id
	case rec.id != c.id, !within(s.place.unified, rec.cgroup):
		r.warn("container.id: podman says that the container is in another cgroup")
		return ""
	}
	a.addContainer(r, c, rec)
	return c.id
}

func (a *Attestor) addContainer(r *reading, c container, rec record) {
	evidence := c.engine + " " + c.id
	r.fact(identity.FactEngine, c.engine, identity.FromContainer, "cgroup "+c.at)
	r.fact(identity.FactContainerID, c.id, identity.FromContainer, "cgroup "+c.at)
	if rec.image != "" {
		r.fact(identity.FactImage, rec.image, identity.FromContainer, evidence)
	}
	if rec.digest != "" {
		r.fact(identity.FactImageDigest, rec.digest, identity.FromContainer, evidence)
	}
	keys := rec.labelKeys()
	if len(keys) < len(rec.labels) {
		a.config.Meter.Count("attest_labels_cut", int64(len(rec.labels)-len(keys)))
		r.warn(fmt.Sprintf("container.label: only the first %d of %d are listed", len(keys), len(rec.labels)))
	}
	for _, k := range keys {
		name := identity.FactImgLabPrefix + k
		if _, err := identity.NewFactSet(identity.Fact{Name: name, Value: ""}); err != nil || unfit(k) != "" {
			r.warn("container.label: a label's name is no name of a fact (too long, or with blanks)")
			continue
		}
		r.fact(name, rec.labels[k], identity.FromContainer, evidence)
	}
}

// podmanRecord asks podman about a container; an answer is remembered for as long as its cgroup lives.
func (a *Attestor) podmanRecord(ctx context.Context, c container) (record, error) {
	inode, err := CgroupIDOf(a.dirOf(c.at))
	if err != nil {
		return record{}, err
	}
	key := containerKey{id: c.id, cgroup: inode}
	if rec, ok := a.records.get(key); ok {
		return rec, nil
	}
	out, err := a.ask(ctx, "inspect", "--type", "container", c.id)
	if err != nil {
		return record{}, err
	}
	rec, err := parsePodman(out)
	if err != nil {
		return record{}, err
	}
	if rec.digest == "" && rec.imageID != "" { // a podman that does not tell it with the container
		if out, err := a.ask(ctx, "image", "inspect", rec.imageID); err == nil {
			rec.digest, _ = parsePodmanImage(out) // the image may be gone: the fact is absent then
		}
	}
	if a.records.put(key, rec) {
		a.config.Meter.Count("attest_records_evicted", 1)
	}
	return rec, nil
}

// ask runs podman. Errors: [errUnknown]; or why there is no answer, as the end of a warning.
func (a *Attestor) ask(ctx context.Context, args ...string) ([]byte, error) {
	if len(a.config.Podman) == 0 {
		return nil, errors.New("podman is not installed where the agent can find it")
	}
	if a.rest.resting() {
		return nil, errors.New("podman did not answer a moment ago and is left alone for now")
	}
	ctx, cancel := context.WithTimeout(ctx, a.config.EngineTimeout)
	defer cancel()
	select {
	case a.engines <- struct{}{}:
		defer func() { <-a.engines }()
	case <-ctx.Done():
		a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "busy")
		return nil, fmt.Errorf("podman was busy for %v", a.config.EngineTimeout)
	}
	line := append(slices.Clone(a.config.Podman), args...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, errOut := &capped{limit: maxRecordBytes}, &capped{limit: 4096}
	cmd.Stdout, cmd.Stderr = out, errOut
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "timeout")
		a.rest.rest(engineRest)
		return nil, fmt.Errorf("podman did not answer in %v", a.config.EngineTimeout)
	case out.cut:
		a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "too-large")
		return nil, fmt.Errorf("podman's answer is larger than %d bytes", maxRecordBytes)
	case err != nil && strings.Contains(strings.ToLower(errOut.b.String()), "no such"):
		a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "unknown")
		return nil, errUnknown
	case err != nil:
		a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "failed")
		a.config.Logger.WarnContext(ctx, "container engine failed", "engine", podman, "error", err, "stderr", errOut.b.String())
		return nil, errors.New("podman failed; the agent's log has its words")
	}
	a.config.Meter.Count("attest_engine", 1, "engine", podman, "result", "answered")
	return out.b.Bytes(), nil
}

// capped keeps the first limit bytes and remembers that there were more.
type capped struct {
	b     bytes.Buffer
	limit int
	cut   bool
}

// Write never fails: the program that writes must not be stopped by it.
func (c *capped) Write(p []byte) (int, error) {
	keep := min(len(p), c.limit-c.b.Len())
	c.b.Write(p[:keep])
	c.cut = c.cut || keep < len(p)
	return len(p), nil
}

// runcOf returns runc's record of the container in whose cgroup path is, the innermost of nested ones.
func (a *Attestor) runcOf(path string) (record, bool) {
	var best record
	if len(path) < 2 {
		return best, false
	}
	for _, rec := range a.runcRecords() {
		if within(path, rec.cgroup) && len(rec.cgroup) > len(best.cgroup) {
			best = rec
		}
	}
	return best, best.id != ""
}

// runcRecords returns the records of all containers that runc has now, in order of cgroup. Files that are not root's
// are passed over: they are no records of an engine of this machine.
func (a *Attestor) runcRecords() []record {
	var records []record
	for _, root := range a.config.RuncRoots {
		dirs, err := os.ReadDir(root)
		if err != nil {
			continue // no runc here
		}
		for _, d := range dirs {
			if len(records) == maxRuncs {
				a.config.Meter.Count("attest_runc_cut", 1)
				break
			}
			rec, err := a.runcRecord(filepath.Join(root, d.Name(), "state.json"))
			if errors.Is(err, errRecord) {
				a.config.Meter.Count("attest_engine", 1, "engine", runc, "result", "failed")
			}
			if err == nil && rec.cgroup != "" {
				records = append(records, rec)
			}
		}
	}
	slices.SortFunc(records, func(x, y record) int { return strings.Compare(x.cgroup, y.cgroup) })
	return records
}

func (a *Attestor) runcRecord(path string) (record, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return record{}, err
	}
	f := os.NewFile(uintptr(fd), path)
	s, err := statOf(fd)
	if err != nil || s.Uid != 0 || s.Mode&0o022 != 0 || s.Size > maxRecordBytes {
		_ = f.Close()
		return record{}, errors.Join(errRecord, err)
	}
	id := idOf(s)
	if known, ok := a.runcs.get(path); ok && known.id == id {
		_ = f.Close()
		return known.record, nil
	}
	data, err := readAll(f)
	if err != nil {
		return record{}, err
	}
	rec, err := parseRunc(data, a.config.CgroupRoot)
	if err != nil {
		return record{}, err
	}
	a.runcs.put(path, runcFile{id: id, record: rec})
	return rec, nil
}
