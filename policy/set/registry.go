package set

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Config is what a [Registry] is made of.
type Config struct {
	Store     Store         // required
	Overrides OverrideStore // required
	// Machine is what decisions of [Registry.Decide] say of where they were made; default "server".
	Machine string
	Meter   event.Meter  // nil: counts nothing
	Logger  *slog.Logger // nil: logs nothing
}

// Registry holds the policy set in force and the overrides, and changes them.
//
// Concurrency: safe. Changes are made one after another. Durability: a change is in the store when its method returns.
type Registry struct {
	store     Store
	overrides OverrideStore
	machine   string
	meter     event.Meter
	log       *slog.Logger

	writing sync.Mutex // held by whoever changes the store

	mu      sync.RWMutex
	state   state         // guarded by mu; what it refers to is immutable
	changed chan struct{} // guarded by mu; closed and replaced at each change
}

// state is what is in force.
type state struct {
	set       *Set
	edition   Edition
	overrides []Override
}

// ErrCorruptEdition says that an edition in the store cannot be used; compare with errors.Is.
var ErrCorruptEdition = &refusal.Error{Code: "edition-corrupt"}

// Open reads the current edition and the overrides. Without an edition the built-in set is in force.
//
// Errors: matches [ErrCorruptEdition] if the stored edition does not parse or its digest differs; or the store's.
func Open(ctx context.Context, cfg Config) (*Registry, error) {
	r := &Registry{
		store: cfg.Store, overrides: cfg.Overrides, machine: cfg.Machine, meter: cfg.Meter, log: cfg.Logger, changed: make(chan struct{}),
	}
	if r.machine == "" {
		r.machine = "server"
	}
	if r.meter == nil {
		r.meter = event.NoMeter
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	edition, err := r.store.Current(ctx)
	if err != nil && !errors.Is(err, ErrNone) {
		return nil, fmt.Errorf("open policy sets: %w", err)
	}
	s, err := load(edition)
	if err != nil {
		return nil, err
	}
	edition.Digest = s.Digest()
	overrides, err := r.overrides.Overrides(ctx)
	if err != nil {
		return nil, fmt.Errorf("open overrides: %w", err)
	}
	r.state = state{set: s, edition: edition, overrides: overrides}
	return r, nil
}

// load parses an edition out of the store.
func load(e Edition) (*Set, error) {
	s, err := Parse(e.Files)
	what := fmt.Sprintf("policy set edition %d", e.Version)
	switch {
	case err != nil:
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrCorruptEdition.Code, What: what, Why: "it is in the store, but this version of Redoubt does not take it: " + firstOf(err),
			Do: "run the version that it was applied with, roll back there, and upgrade again; or restore a back-up", Err: err,
		}
	case e.Version != 0 && s.Digest() != e.Digest:
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: ErrCorruptEdition.Code, What: what, Why: "its files in the store are not those that were applied", Do: "restore a back-up",
		}
	}
	return s, nil
}

func firstOf(err error) string {
	if e := refusal.As(err); e != nil {
		return e.Error()
	}
	return "it cannot be read"
}

// Current returns the set in force and its edition, without files (see [Set.Files]). Version 0 is the built-in set.
func (r *Registry) Current() (*Set, Edition) {
	s := r.now()
	edition := s.edition
	edition.Files = nil
	return s.set, edition
}

// Overrides returns the overrides in force, in order of id.
func (r *Registry) Overrides() []Override {
	now := time.Now()
	return slices.DeleteFunc(slices.Clone(r.now().overrides), func(o Override) bool { return !now.Before(o.Expires) })
}

// Changed returns a channel that is closed when the edition or the overrides next change. Ask for it before reading what
// is in force, so that no change is missed.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.changed
}

// Decide answers a request by what is in force, at Config.Machine.
func (r *Registry) Decide(ctx context.Context, req *policy.Request) *policy.Decision {
	s := r.now()
	d := s.set.Decide(ctx, req, DecideOptions{Machine: r.machine, Edition: s.edition.Version, Overrides: s.overrides})
	r.meter.Count("policyset_decisions", 1, "verdict", string(d.Verdict), "mode", string(d.Mode), "reason", string(d.Explanation.Reason))
	return d
}

// Issue returns the identity that facts earn by what is in force; see [Set.Issue].
func (r *Registry) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, Issuance, error) {
	id, issuance, err := r.now().set.Issue(td, facts)
	if e := refusal.As(err); e != nil {
		r.meter.Count("policyset_issuance_refused", 1, "code", e.Code)
	}
	return id, issuance, err
}

// Editions lists editions without files, newest first, with versions below before (0: from the newest), at most limit.
func (r *Registry) Editions(ctx context.Context, before uint64, limit int) ([]Edition, error) {
	return r.store.Editions(ctx, before, limit)
}

// Edition returns one edition with its files; version 0 is the built-in set. Errors: [ErrUnknownEdition].
func (r *Registry) Edition(ctx context.Context, version uint64) (Edition, error) {
	if version == 0 {
		return Edition{Digest: digest(nil)}, nil
	}
	return r.store.Edition(ctx, version)
}

func (r *Registry) now() state {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.state
}

// publish puts what changed in force and tells those who wait. The caller holds writing.
func (r *Registry) publish(change func(*state)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.state)
	close(r.changed)
	r.changed = make(chan struct{})
}

// resync reads again what is in force after a change whose outcome is not known: a store may fail, or its caller give up,
// when the change is already made. The caller holds writing.
func (r *Registry) resync(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resyncTime)
	defer cancel()
	edition, err := r.store.Current(ctx)
	if errors.Is(err, ErrNone) {
		edition, err = Edition{}, nil
	}
	if err != nil {
		r.log.Error("policy set not read again after a failure", "error", err)
		return
	}
	overrides, err := r.overrides.Overrides(ctx)
	if err != nil {
		r.log.Error("overrides not read again after a failure", "error", err)
		return
	}
	current := r.now()
	s := current.set
	if edition.Version != current.edition.Version {
		if s, err = load(edition); err != nil {
			r.log.Error("policy set in the store cannot be used", "error", err)
			return
		}
		edition.Digest = s.Digest()
	} else {
		edition.Files, edition.Digest = current.edition.Files, current.edition.Digest
	}
	r.publish(func(st *state) { st.set, st.edition, st.overrides = s, edition, overrides })
}

// resyncTime bounds a reading again.
const resyncTime = 5 * time.Second

// wallClock returns the time as stores keep it: UTC, whole microseconds, and no monotonic reading, since deadlines follow
// the wall clock before and after a restart alike.
func wallClock() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }
