package machine

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

type cachedJWT struct {
	svid    *identity.JWTSVID
	renewAt time.Time
}

// errAway matches the refusal by which an [Upstream] says that it has no connection.
var errAway = &refusal.Error{Code: "server-unreachable"}

// renewDue has every SVID signed that is missing or past its half-life, a few at a time.
func (m *Machine) renewDue(ctx context.Context) {
	m.mu.Lock()
	now := time.Now().Round(0)
	var due []*workload
	for _, w := range m.workloads {
		if m.claimLocked(w, now) {
			due = append(due, w)
		}
	}
	m.mu.Unlock()
	work := make(chan *workload)
	var wg sync.WaitGroup
	for range min(renewWorkers, len(due)) {
		wg.Go(func() {
			for w := range work {
				m.renew(ctx, w)
			}
		})
	}
	for _, w := range due {
		work <- w
	}
	close(work)
	wg.Wait()
}

// claim reports whether the workload's SVID is to be renewed now, by the caller: until it has the answer, nobody else tries.
func (m *Machine) claim(w *workload, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.claimLocked(w, now)
}

func (m *Machine) claimLocked(w *workload, now time.Time) bool {
	if w.ID.IsZero() || now.Before(w.renewAt) {
		return false
	}
	w.renewAt = now.Add(time.Minute)
	return true
}

// renew makes a fresh key and has it signed. The old SVID stays until the new one is there.
func (m *Machine) renew(ctx context.Context, w *workload) {
	m.mu.Lock()
	id, instance := w.ID, w.Instance
	m.mu.Unlock()
	svid, err := m.sign(ctx, instance, id)
	m.mu.Lock()
	if w.ID != id { // assigned anew meanwhile: what was signed is another's name
		m.mu.Unlock()
		m.wake()
		return
	}
	if err != nil && ctx.Err() != nil {
		w.renewAt = time.Time{} // the caller left, or would not wait: that says nothing about the server
		m.mu.Unlock()
		return
	}
	if err != nil {
		away := errors.Is(err, errAway)
		if w.failures++; away {
			w.failures = min(w.failures, 2) // asking costs nobody anything, and who waits long misses the server's return
		}
		w.renewAt = time.Now().Add(backoff(w.failures))
		m.mu.Unlock()
		m.cfg.Meter.Count("svid_renewal_failed", 1)
		level := slog.LevelWarn
		if away {
			level = slog.LevelDebug // the connection says it once, for all workloads
		}
		m.log.Log(ctx, level, "an SVID was not renewed; it will be tried again", "workload", instance, "spiffe.id", id.String(), "error", err)
		return
	}
	w.svid, w.failures = svid, 0
	w.renewAt = halfLife(svid.Chain[0].NotBefore, svid.Expires())
	w.touch()
	m.mu.Unlock()
	m.cfg.Meter.Count("svid_issued", 1)
	e := event.New(event.Control, "svid.issued")
	e.Machine, e.Workload, e.Identity = m.cfg.ID, instance, id
	e.Attrs = map[string]any{"expires": svid.Expires().UTC().Format(time.RFC3339)}
	m.cfg.Sink.Emit(e)
}

func (m *Machine) sign(ctx context.Context, instance string, id identity.ID) (*identity.X509SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: instance}}, key)
	if err != nil {
		return nil, err
	}
	chain, err := m.cfg.Upstream.SignX509(ctx, instance, csr)
	if err != nil {
		return nil, err
	}
	got, err := identity.IDFromCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	if got != id || !key.PublicKey.Equal(chain[0].PublicKey) {
		return nil, &refusal.Error{
			Kind: refusal.Conflict, Code: "wrong-svid", What: "SVID of workload " + instance,
			Why: "the server signed " + got.String() + " where " + id.String() + " was assigned", Do: "nothing: it is asked again",
		}
	}
	return &identity.X509SVID{ID: id, Chain: chain, Key: key}, nil
}

// halfLife is when to renew: half of the life of a document after now, give or take a tenth, so that many do not come at once.
func halfLife(from, to time.Time) time.Time {
	now := time.Now()
	if from.Before(now) {
		from = now
	}
	life := to.Sub(from)
	// Round drops the monotonic reading: the clock that counts is the wall's, which goes on while the machine sleeps.
	return from.Add(time.Duration(float64(life) * (0.45 + 0.1*mathrand.Float64()))).Round(0) //nolint:gosec // jitter is no secret
}

// backoff is how long to wait after n failures: from one second up to one minute, with full jitter above half a second.
func backoff(n int) time.Duration {
	limit := min(time.Minute, time.Second<<min(n, 6))
	return 500*time.Millisecond + mathrand.N(limit) //nolint:gosec // jitter is no secret
}

// jwt returns a JWT-SVID for an audience, from the cache while it is in the first half of its life. While the server is
// away an older one serves until it expires.
func (m *Machine) jwt(ctx context.Context, w *workload, audience []string) (*identity.JWTSVID, error) {
	key := strings.Join(slices.Sorted(slices.Values(audience)), "\x00")
	m.mu.Lock()
	cached, id := w.jwts[key], w.ID
	m.mu.Unlock()
	if cached != nil && time.Now().Before(cached.renewAt) {
		return cached.svid, nil
	}
	svid, err := m.cfg.Upstream.SignJWT(ctx, w.Instance, audience)
	if err != nil {
		if cached != nil && time.Now().Before(cached.svid.Expires.Add(-5*time.Second)) {
			return cached.svid, nil
		}
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if w.ID != id {
		return nil, &refusal.Error{
			Kind: refusal.Conflict, Code: "identity-changed", What: "JWT-SVID of workload " + w.Instance,
			Why: "its identity changed while the token was signed", Do: "ask again",
		}
	}
	if len(w.jwts) >= maxJWTs {
		m.cfg.Meter.Count("jwt_cache_dropped", int64(len(w.jwts)))
		clear(w.jwts)
	}
	w.jwts[key] = &cachedJWT{svid: svid, renewAt: halfLife(time.Now(), svid.Expires)}
	return svid, nil
}
