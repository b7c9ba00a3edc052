package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
)

// stateFile is the one file of a machine's state, 0600. It holds no key.
const stateFile = "machine.json"

// state is what outlives the agent. Its shape is versioned; another version is set aside, not guessed at.
type state struct {
	Version   int              `json:"version"`
	Machine   string           `json:"machine"`
	Domain    string           `json:"trust_domain"`
	Revision  uint64           `json:"revision"`
	Policy    *fleet.PolicySet `json:"policy_set,omitempty"`
	Bundle    json.RawMessage  `json:"bundle,omitempty"`
	Released  *Release         `json:"released,omitempty"`
	Workloads []storedWorkload `json:"workloads"`
	Husks     []string         `json:"husks,omitempty"` // cgroups of ours without a workload, removed once they are empty
}

type storedWorkload struct {
	Workload
	Ours  bool `json:"ours"`
	Asked bool `json:"asked,omitempty"` // for privileges
}

const stateVersion = 1

func newReleaseID() string { return identity.Unique("rl") }

// saveLocked writes the state atomically. mu is held.
func (m *Machine) saveLocked() error {
	v := m.view.Load()
	s := state{
		Version: stateVersion, Machine: m.cfg.ID, Domain: string(m.cfg.TrustDomain), Revision: v.revision, Policy: v.source,
		Released: m.released, Husks: m.husks,
	}
	if v.bundle != nil {
		raw, err := json.Marshal(v.bundle)
		if err != nil {
			return err
		}
		s.Bundle = raw
	}
	s.Workloads = append(s.Workloads, m.kept...)
	for _, w := range m.workloads {
		s.Workloads = append(s.Workloads, storedWorkload{w.Workload, w.ours, w.asked})
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(m.cfg.StateDir, stateFile), raw)
}

// writeFile replaces a file as a whole: what a reader finds is the old or the new one, on disk.
func writeFile(name string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// load takes up what an earlier agent left.
func (m *Machine) load() error {
	if err := os.MkdirAll(m.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	name := filepath.Join(m.cfg.StateDir, stateFile)
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	var s state
	if err := json.Unmarshal(raw, &s); err != nil || s.Version != stateVersion {
		aside := fmt.Sprintf("%s.unreadable-%d", name, time.Now().Unix())
		m.log.Error("the machine's state cannot be read; it is set aside, and the server is asked for everything again",
			"file", aside, "version", s.Version, "error", err)
		return os.Rename(name, aside)
	}
	if m.cfg.ID == "" { // a release without the agent: the machine is who it was
		m.cfg.ID, m.cfg.TrustDomain = s.Machine, identity.TrustDomain(s.Domain)
	}
	v := emptyView(m.cfg.TrustDomain)
	if s.Policy != nil {
		if err := v.takePolicySet(s.Policy); err != nil {
			m.log.Error("the stored policy set cannot be read; the built-in one is in force until the server answers", "error", err)
		}
	}
	if len(s.Bundle) > 0 {
		if v.bundle, err = identity.ParseBundle(m.cfg.TrustDomain, s.Bundle); err != nil {
			m.log.Error("the stored bundle cannot be read; the server is asked for it", "error", err)
		}
	}
	// Identities and endpoints of others are not kept: without them a resumed stream would have holes, so it begins anew.
	m.view.Store(v)
	m.released, m.husks = s.Released, s.Husks
	if m.cfg.Offline {
		m.kept = s.Workloads
		return nil
	}
	for _, stored := range s.Workloads {
		m.readopt(stored)
	}
	return nil
}

// readopt takes up a workload that was here before the agent was restarted, if its cgroup is still the same one.
func (m *Machine) readopt(stored storedWorkload) {
	w := newWorkload(stored.Instance, Registration{
		Service: stored.Service, Labels: stored.Labels, Listen: stored.Listen, Privileged: stored.Privileged,
		UID: stored.UID, GID: stored.GID,
	}, stored.How, stored.Cgroup, stored.CgroupID)
	w.asked = stored.Asked
	w.ours, w.PID, w.Start, w.Facts, w.Since = stored.Ours, stored.PID, stored.Start, stored.Facts, stored.Since
	id, err := cgroupID(m.dir(w.Cgroup))
	busy, perr := populated(m.dir(w.Cgroup))
	starting := w.PID == 0 && time.Since(w.Since) < startWithin // prepared, and about to start
	if err != nil || perr != nil || id != w.CgroupID || !busy && !starting {
		if w.ours && err == nil && !busy {
			m.removeCgroup(w.Cgroup)
		}
		return
	}
	if w.PID != 0 {
		w.dirty = true
		close(w.attested)
	}
	m.workloads[w.Instance], m.byCgroup[w.Cgroup] = w, w
}
