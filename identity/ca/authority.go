package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// actor is who rotates keys when nobody asked: the server itself, in the audit log's terms.
const actor = `Service::"redoubt"`

// Authority signs for one trust domain.
//
// Concurrency: safe. Signing takes no lock; steps of rotation are one after another.
type Authority struct {
	cfg    Config
	sealer *sealer
	now    func() time.Time
	meter  event.Meter
	log    *slog.Logger

	current atomic.Pointer[ring]

	stepping sync.Mutex // held through a step of rotation

	mu      sync.Mutex    // guards changed
	changed chan struct{} // closed at the next change of the bundle
}

// Open returns the authority whose keys are in cfg.Store; on an empty store it makes them: a root, an issuing and a JWT
// key, which sign at once. It starts nothing; see [Authority.Run].
//
// Errors: matches [ErrConfig], [ErrLifetimes], [ErrWrongKEK], [ErrCorruptKey] or [ErrForeignKey]. A clock outside the
// validity of the keys is no error here, since an authority that has slept must be able to rotate: signing refuses.
func Open(ctx context.Context, cfg Config) (*Authority, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s, err := newSealer(cfg.KEK)
	if err != nil {
		return nil, err
	}
	cfg.KEK = nil
	a := &Authority{
		cfg: cfg, sealer: s, now: cfg.Now, meter: cfg.Meter, log: cfg.Logger, changed: make(chan struct{}),
	}
	records, err := cfg.Store.Keys(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the authority's keys: %w", err)
	}
	if len(records) == 0 {
		if records, err = a.create(ctx); err != nil {
			return nil, err
		}
	}
	r, err := s.newRing(cfg.TrustDomain, records, cfg.RefreshHint)
	if err != nil {
		return nil, err
	}
	a.current.Store(r)
	return a, nil
}

// check fills in the defaults and refuses what is missing or of a wrong shape.
func (c *Config) check() error {
	if _, err := identity.ParseTrustDomain(string(c.TrustDomain)); err != nil {
		return badConfig("TrustDomain", refusal.As(err).Why)
	}
	if c.Store == nil {
		return badConfig("Store", "there is none")
	}
	if c.ServerID.IsZero() {
		c.ServerID, _ = identity.MakeID(c.TrustDomain, "/server") // a constant path below a checked trust domain
	}
	if c.ServerID.TrustDomain() != c.TrustDomain || c.ServerID.Path() == "" {
		return badConfig("ServerID", "it is not below the trust domain "+c.TrustDomain.String())
	}
	if c.Meter == nil {
		c.Meter = event.NoMeter
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c.checkLifetimes()
}

// create makes the first keys and stores them.
func (a *Authority) create(ctx context.Context) ([]KeyRecord, error) {
	now, td := a.now(), a.cfg.TrustDomain
	life := rootSpan(now, a.cfg.RootTTL)
	root, private, err := a.sealer.newRoot(td, now, life)
	if err != nil {
		return nil, err
	}
	cert, err := readAuthority(td, root, nil)
	if err != nil {
		return nil, fmt.Errorf("read back the new root: %w", err)
	}
	issuingLife, err := within(life, now, a.cfg.IssuingTTL, a.cfg.leastIssuing(), "issuing certificate", "the root")
	if err != nil {
		return nil, err
	}
	issuing, err := a.sealer.newIssuing(td, Active, now, issuingLife, cert, private)
	if err != nil {
		return nil, err
	}
	jwt, err := a.sealer.newJWT(Active, now, rootSpan(now, a.cfg.IssuingTTL))
	if err != nil {
		return nil, err
	}
	rec := event.NewRecord(actor, "ca.create", td.String())
	rec.Time = now.UTC()
	rec.Detail = map[string]string{"root": root.ID, "x509": issuing.ID, "jwt": jwt.ID}
	keys := []KeyRecord{root, issuing, jwt}
	if err := a.cfg.Store.PutKeys(ctx, keys, rec); err != nil {
		return nil, fmt.Errorf("store the authority's first keys: %w", err)
	}
	a.log.InfoContext(ctx, "made a certificate authority", slog.String("trust_domain", td.String()), slog.String("root", root.ID))
	return keys, nil
}

// Bundle returns the trust domain's public keys as they are now. The caller must not change it.
func (a *Authority) Bundle() *identity.Bundle { return a.current.Load().bundle }

// Changed returns a channel that is closed at the next change of the bundle. Take it before [Authority.Bundle], and no
// change is missed.
func (a *Authority) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// refused counts a refusal by its code, and returns it.
func (a *Authority) refused(err error) error {
	code := "internal"
	if e := refusal.As(err); e != nil {
		code = e.Code
	} else if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		code = "canceled"
	}
	a.meter.Count("ca_refused", 1, "code", code)
	return err
}
