package machine

import (
	"context"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Documents are what a workload may hold: its SVIDs and the bundles to verify others. Changed is closed when either is
// replaced.
type Documents struct {
	SVIDs   []*identity.X509SVID
	Bundles []*identity.Bundle
	Changed <-chan struct{}
}

// Documents returns the documents of the workload that a process belongs to, by the cgroup the kernel says it is in. A
// workload that has just started is waited for, ten seconds at most.
//
// Errors: refusals with code "no-identity" (not a workload), the issuance rules' own refusal, or "svid-pending" while the
// server is away. Trust: pid and cgroup come from the kernel, not from the caller.
func (m *Machine) Documents(ctx context.Context, pid int, cgroup string) (Documents, error) {
	w, err := m.owner(ctx, pid, cgroup)
	if err != nil {
		return Documents{}, err
	}
	deadline := time.NewTimer(attestWait)
	defer deadline.Stop()
	for {
		m.mu.Lock()
		svid, refused, changed := w.svid, w.refused, w.changed
		_, present := m.workloads[w.Instance]
		m.mu.Unlock()
		view := m.view.Load()
		switch {
		case !present:
			return Documents{}, &refusal.Error{
				Kind: refusal.Denied, Code: "no-identity", What: "identity of workload " + w.Instance, Why: "the workload has ended",
				Do: "nothing: it is over",
			}
		case refused != nil:
			return Documents{}, refused
		case svid != nil && time.Now().Before(svid.Expires()) && view.bundle != nil:
			if by := view.revoked(svid); by != nil {
				return Documents{}, by
			}
			return Documents{SVIDs: []*identity.X509SVID{svid}, Bundles: []*identity.Bundle{view.bundle}, Changed: changed}, nil
		}
		select {
		case <-ctx.Done():
			return Documents{}, ctx.Err()
		case <-changed:
		case <-deadline.C:
			return Documents{}, &refusal.Error{
				Kind: refusal.Unavailable, Code: "svid-pending", What: "identity of workload " + w.Instance,
				Why: "the server has not signed it yet, or cannot be reached", Do: "ask again; redoubt get machines shows the connection",
			}
		}
	}
}

// Bundle returns the bundle of the trust domain and a channel that is closed when the caller's documents change. Only a
// workload may ask. Errors: as [Machine.Documents].
func (m *Machine) Bundle(ctx context.Context, pid int, cgroup string) (*identity.Bundle, <-chan struct{}, error) {
	w, err := m.owner(ctx, pid, cgroup)
	if err != nil {
		return nil, nil, err
	}
	m.mu.Lock()
	refused, changed := w.refused, w.changed
	m.mu.Unlock()
	if refused != nil {
		return nil, nil, refused
	}
	bundle := m.view.Load().bundle
	if bundle == nil {
		return nil, nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: "bundle-pending", What: "the trust bundle", Why: "the server has not sent it yet",
			Do: "ask again",
		}
	}
	return bundle, changed, nil
}

// JWT returns a JWT-SVID for the audience. only, if not zero, is the identity the caller insists on: another's is refused.
func (m *Machine) JWT(ctx context.Context, pid int, cgroup string, audience []string, only identity.ID) (*identity.JWTSVID, error) {
	docs, err := m.Documents(ctx, pid, cgroup)
	if err != nil {
		return nil, err
	}
	if !only.IsZero() && only != docs.SVIDs[0].ID {
		m.cfg.Meter.Count("workloadapi_impostor", 1)
		return nil, &refusal.Error{
			Kind: refusal.Denied, Code: "not-your-identity", What: "JWT-SVID of " + only.String(),
			Why: "this workload is " + docs.SVIDs[0].ID.String(), Do: "ask without an identity, or for your own",
		}
	}
	w, err := m.owner(ctx, pid, cgroup)
	if err != nil {
		return nil, err
	}
	return m.jwt(ctx, w, audience)
}

// owner finds the workload of a process, discovering containers and units, and waits for its first attestation.
func (m *Machine) owner(ctx context.Context, pid int, cgroup string) (*workload, error) {
	w := m.lookup(cgroup)
	if w == nil {
		var err error
		if w, err = m.discover(ctx, pid, cgroup); err != nil {
			m.cfg.Meter.Count("workloadapi_no_identity", 1)
			return nil, err
		}
	}
	m.mu.Lock()
	dir, id, first, attestAt := m.dir(w.Cgroup), w.CgroupID, w.PID, w.attestAt
	m.mu.Unlock()
	// A cgroup of the same path that is not the same cgroup is another workload.
	if now, err := cgroupID(dir); err != nil || now != id {
		m.remove(ctx, w)
		return nil, &refusal.Error{
			Kind: refusal.Denied, Code: "no-identity", What: "identity for process in cgroup " + cgroup,
			Why: "the cgroup was made anew since the workload was registered", Do: "enroll or start the workload again",
		}
	}
	select {
	case <-w.attested:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(attestWait):
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: "attestation-pending", What: "identity of workload " + w.Instance,
			Why: "its first process has not been attested yet", Do: "ask again",
		}
	}
	if first != 0 && time.Until(attestAt) < attestEvery-2*time.Second {
		// The first process may have replaced its program since: whoever asks, its facts are read again before they are
		// relied on. One that has ended left the workload to the others.
		before := m.digest(w)
		if err := m.attest(ctx, w, first); err != nil && first == pid {
			return nil, err
		}
		if m.digest(w) != before {
			m.settle(ctx, w)
		}
	}
	return w, nil
}

// digest is that of the workload's facts now.
func (m *Machine) digest(w *workload) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return w.Facts.Digest()
}
