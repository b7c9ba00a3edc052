package fleet

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

// Authority signs. [ca.Authority] is one.
type Authority interface {
	Bundle() *identity.Bundle
	// Changed is closed when Bundle next changes.
	Changed() <-chan struct{}
	SignX509(ctx context.Context, id identity.ID, pub crypto.PublicKey, ttl time.Duration, opts ca.SignOptions) ([]*x509.Certificate, error)
	SignJWT(ctx context.Context, id identity.ID, audience []string, ttl time.Duration) (*identity.JWTSVID, error)
}

// Rules is the policy set, as far as the fleet needs it. The roof adapts set.Registry to it.
type Rules interface {
	// Issue evaluates the issuance rules: the ID, or a refusal, and how it came about. It must be quick and do no I/O: it is
	// called within transactions.
	Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, json.RawMessage, error)
	// PolicySet is what agents are sent.
	PolicySet() PolicySet
	// Changed is closed when either of the above next changes. Ask for it first, then for them.
	Changed() <-chan struct{}
}

// Config is what a [Fleet] is made of. TrustDomain, Store, Authority and Rules are needed; zero means the default.
type Config struct {
	TrustDomain identity.TrustDomain
	Store       Store
	Authority   Authority
	Rules       Rules

	AgentTTL   time.Duration // life of a machine's certificate; default 24 h
	RenewGrace time.Duration // how long after its end it still renews; default 30 days
	LostAfter  time.Duration // a machine not heard of for so long is lost; default 2 min
	KeepGone   time.Duration // workloads that are gone, revocations and quarantines that ended; default 1 h
	KeepTokens time.Duration // tokens that were used or expired; default 7 days

	MaxMachines  int // default 10,000
	MaxWorkloads int // per machine, those gone but kept included; default 4,096
	MaxBytes     int // of the JSON of the workloads of one machine, those gone but kept included; default 8 MiB
	MaxTokens    int // outstanding; default 1,000
	MaxWithdrawn int // revocations, and as many quarantines; default 10,000
	KeepChanges  int // revisions that an agent may be behind before it gets a snapshot; default 16,384
	KeepEvents   int // of all machines, which share them; default 200,000

	Meter  event.Meter      // nil: event.NoMeter
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now
}

// The defaults of [Config], and the fixed bounds.
const (
	DefaultAgentTTL     = 24 * time.Hour
	DefaultRenewGrace   = 30 * 24 * time.Hour
	DefaultLostAfter    = 2 * time.Minute
	DefaultKeepGone     = time.Hour
	DefaultKeepTokens   = 7 * 24 * time.Hour
	DefaultMaxMachines  = 10_000
	DefaultMaxWorkloads = 4_096
	DefaultMaxBytes     = 8 << 20
	DefaultMaxTokens    = 1_000
	DefaultMaxWithdrawn = 10_000
	DefaultKeepChanges  = 16_384
	DefaultKeepEvents   = 200_000

	// MaxPage is the most that one query answers.
	MaxPage = 1_000
	// MaxFacts and MaxFactBytes (of JSON) bound the facts of one workload or machine.
	MaxFacts     = 256
	MaxFactBytes = 32 << 10
	// MaxListen is how many ports a workload may declare.
	MaxListen = 64
	// MaxCSRBytes bounds a certificate request.
	MaxCSRBytes = 16 << 10
	// MaxAudiences and MaxAudienceBytes bound what a JWT-SVID is asked for.
	MaxAudiences     = 16
	MaxAudienceBytes = 256
	// MaxEventBatch bounds one call of Ingest.
	MaxEventBatch = 1_000
	// MaxPayloadBytes bounds one change: four times what a policy set may have, since JSON escapes. One that is larger still
	// is not pushed ([Fleet.PublishProblem]).
	MaxPayloadBytes = 32 << 20
	// MaxReasonBytes bounds the reason of a revocation or quarantine.
	MaxReasonBytes = 512

	tailChanges   = 4_096    // changes kept in memory for agents that follow closely
	tailBytes     = 64 << 20 // of payload
	reissuePage   = 200      // workloads re-evaluated in one transaction
	sweepEvery    = 20 * time.Second
	touchWorkload = 5 * time.Minute // how stale Workload.Seen may be
)

// Fleet is the registry. Concurrency: safe. One process writes to a store at a time.
type Fleet struct {
	cfg   Config
	meter event.Meter
	log   *slog.Logger

	emit    chan event.Event // the server's own events, waiting to be stored
	routine chan event.Event // and those that may not crowd them out
	dropped atomic.Uint64

	// write serializes updates of what is cached and followed, so that both are in the order of commits. Taken before mu.
	write sync.Mutex

	mu       sync.Mutex // guards what follows
	stale    bool       // a commit failed in doubt: reload before going on
	tail     tail
	changed  chan struct{}           // closed at the next change
	told     chan struct{}           // closed at the next event stored
	current  map[ChangeKind][32]byte // hash of the payload last published, of policy set and bundle
	members  map[string]member       // machines
	revoked  withdrawals[Revocation]
	isolate  withdrawals[Quarantine]
	accused  map[string]time.Time  // machine → when an overreach of it was last put into the audit log
	problems map[ChangeKind]string // why it is not pushed
	shot     *Snapshot             // the last one taken
	buckets  map[string]bucket     // of events, by machine
	due      map[subject]string    // whose workloads must follow a withdrawal → the instance after which to go on

	shoot    sync.Mutex    // one snapshot is taken at a time
	hurry    chan struct{} // something became due
	catching chan struct{} // held while what is due is done
}

// member is what is needed to believe a machine, without asking the store.
type member struct {
	spki, previous string
	state          MachineState
	seen           time.Time
	dirty          bool // seen is later than what is stored
	lost           bool
}

// Open returns the fleet of a store, with what revocations and machines it holds. It starts nothing: [Fleet.Run] does.
// Errors: a field of cfg is missing; the store fails.
func Open(ctx context.Context, cfg Config) (*Fleet, error) {
	switch {
	case cfg.TrustDomain == "":
		return nil, errors.New("fleet: Config.TrustDomain is missing")
	case cfg.Store == nil, cfg.Authority == nil, cfg.Rules == nil:
		return nil, errors.New("fleet: Config.Store, Authority and Rules are needed")
	}
	cfg.AgentTTL = cmp.Or(cfg.AgentTTL, DefaultAgentTTL)
	cfg.RenewGrace = cmp.Or(cfg.RenewGrace, DefaultRenewGrace)
	cfg.LostAfter = cmp.Or(cfg.LostAfter, DefaultLostAfter)
	cfg.KeepGone = cmp.Or(cfg.KeepGone, DefaultKeepGone)
	cfg.KeepTokens = cmp.Or(cfg.KeepTokens, DefaultKeepTokens)
	cfg.MaxMachines = cmp.Or(cfg.MaxMachines, DefaultMaxMachines)
	cfg.MaxWorkloads = cmp.Or(cfg.MaxWorkloads, DefaultMaxWorkloads)
	cfg.MaxBytes = cmp.Or(cfg.MaxBytes, DefaultMaxBytes)
	cfg.MaxTokens = cmp.Or(cfg.MaxTokens, DefaultMaxTokens)
	cfg.MaxWithdrawn = cmp.Or(cfg.MaxWithdrawn, DefaultMaxWithdrawn)
	cfg.KeepChanges = cmp.Or(cfg.KeepChanges, DefaultKeepChanges)
	cfg.KeepEvents = cmp.Or(cfg.KeepEvents, DefaultKeepEvents)
	if cfg.Meter == nil {
		cfg.Meter = event.NoMeter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	f := &Fleet{
		cfg: cfg, meter: cfg.Meter, log: cfg.Logger, emit: make(chan event.Event, emitQueue), routine: make(chan event.Event, emitQueue),
		changed: make(chan struct{}), told: make(chan struct{}), accused: map[string]time.Time{},
		problems: map[ChangeKind]string{}, buckets: map[string]bucket{}, due: map[subject]string{}, hurry: make(chan struct{}, 1), catching: make(chan struct{}, 1),
	}
	if err := f.load(ctx); err != nil {
		return nil, fmt.Errorf("open fleet: %w", err)
	}
	return f, nil
}

func (f *Fleet) now() time.Time { return f.cfg.Now().UTC() }

// load fills the caches from the store.
func (f *Fleet) load(ctx context.Context) error {
	members := map[string]member{}
	var revoked withdrawals[Revocation]
	var isolate withdrawals[Quarantine]
	current := map[ChangeKind][32]byte{}
	var latest uint64
	err := f.cfg.Store.View(ctx, func(tx Tx) error {
		if err := each(ctx, tx.Machines.Machines, func(m Machine) string {
			members[m.ID] = memberOf(m)
			return m.ID
		}); err != nil {
			return err
		}
		if err := each(ctx, tx.Revocations.Revocations, func(r Revocation) string { revoked.put(r); return r.ID }); err != nil {
			return err
		}
		if err := each(ctx, tx.Quarantines.Quarantines, func(q Quarantine) string { isolate.put(q); return q.ID }); err != nil {
			return err
		}
		for _, kind := range []ChangeKind{KindPolicySet, KindBundle} {
			live, err := tx.Changes.Live(ctx, Position{Kind: kind}, 1)
			if err != nil {
				return err
			}
			if len(live) == 1 && live[0].Kind == kind {
				current[kind] = hashOf(live[0].Payload)
			}
		}
		var err error
		_, latest, err = tx.Changes.Bounds(ctx)
		return err
	})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, m := range members { // what was heard since is not stored yet
		if old, ok := f.members[id]; ok && old.seen.After(m.seen) {
			m.seen, m.dirty = old.seen, true
			members[id] = m
		}
	}
	if f.stale { // what was committed is known now, what it made due is not
		f.mark(everything)
	}
	f.members, f.revoked, f.isolate, f.current = members, revoked, isolate, current
	for of := range revoked.of {
		if of.machine != "" {
			f.mark(of)
		}
	}
	f.tail = tail{floor: latest, latest: latest}
	f.shot, f.stale = nil, false
	f.wake()
	return nil
}

func memberOf(m Machine) member {
	return member{spki: m.SPKI, previous: m.Previous, state: m.State, seen: m.LastSeen}
}

// each calls fn for everything that a list of the store has; fn returns the id to go on after.
func each[T any](ctx context.Context, list func(context.Context, string, int) ([]T, error), fn func(T) string) error {
	after := ""
	for {
		page, err := list(ctx, after, MaxPage)
		if err != nil {
			return err
		}
		for _, x := range page {
			after = fn(x)
		}
		if len(page) < MaxPage {
			return nil
		}
	}
}

// unit is one transaction in the making: what must follow once it is committed.
type unit struct {
	Tx
	changes []Change
	then    []func() // run under f.mu after the commit
	stock   *stock   // of the machine whose report it is
}

// push appends a change. payload nil means that the thing is no more.
func (u *unit) push(ctx context.Context, kind ChangeKind, key string, payload any) error {
	c := Change{Kind: kind, Key: key, Deleted: payload == nil}
	if payload != nil {
		raw, err := encode(payload)
		if err != nil {
			return fmt.Errorf("render change of %s: %w", kind, err)
		}
		c.Payload = raw
	}
	c, err := u.Changes.Append(ctx, c)
	if err != nil {
		return err
	}
	u.changes = append(u.changes, c)
	return nil
}

// encode renders a payload. What HTML would need escaped is common in policies, and is left as it is.
func encode(payload any) (json.RawMessage, error) {
	if raw, ok := payload.(json.RawMessage); ok {
		return raw, nil
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	if err := e.Encode(payload); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// update runs fn as one transaction and, when it is committed, brings caches and followers up to it.
func (f *Fleet) update(ctx context.Context, fn func(u *unit) error) error {
	f.write.Lock()
	defer f.write.Unlock()
	if err := f.fresh(ctx); err != nil {
		return err
	}
	u := &unit{}
	var refused error
	err := f.cfg.Store.Update(ctx, func(tx Tx) error {
		*u = unit{Tx: tx}
		refused = fn(u)
		return refused
	})
	switch {
	case refused != nil:
		return refused
	case err != nil:
		// Whether it was committed is not known: read again what is.
		f.mu.Lock()
		f.stale = true
		f.mu.Unlock()
		f.log.ErrorContext(ctx, "a transaction of the fleet failed", slog.Any("error", err))
		return fmt.Errorf("fleet: commit: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tail.add(u.changes)
	for _, fn := range u.then {
		fn()
	}
	if len(u.changes) > 0 || len(u.then) > 0 {
		f.wake()
	}
	return nil
}

// fresh reloads the caches if a commit failed in doubt. The caller holds f.write.
func (f *Fleet) fresh(ctx context.Context) error {
	f.mu.Lock()
	stale := f.stale
	f.mu.Unlock()
	if !stale {
		return nil
	}
	if err := f.load(ctx); err != nil {
		f.meter.Count("fleet_reload_failed", 1)
		e := refuse(ErrState, refusal.Unavailable, "server state", "the store cannot be read", "look at the server's log, and try again")
		e.Err = err
		return e
	}
	return nil
}

// wake tells followers that something changed. The caller holds f.mu.
func (f *Fleet) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *Fleet) view(ctx context.Context, fn func(tx Tx) error) error {
	return f.cfg.Store.View(ctx, fn)
}
