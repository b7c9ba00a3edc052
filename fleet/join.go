package fleet

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

// JoinRequest is an agent's first word. Trust: all of it is attacker-controlled; only Secret proves anything.
type JoinRequest struct {
	Secret  string // the text of a [JoinSecret]
	Machine string // who the agent means to be
	CSR     []byte // DER of a PKCS #10 request; only its key is read
	Version string
	Facts   identity.FactSet
}

// Joined is what a machine gets when it joins or renews: its certificate chain (leaf first) and the bundle.
type Joined struct {
	Machine Machine
	ID      identity.ID
	Chain   []*x509.Certificate
	Bundle  *identity.Bundle
}

// rejoinWindow is how long an agent whose answer was lost may ask again with the same token and the same key.
const rejoinWindow = 10 * time.Minute

const maxVersionBytes = 64

// Join redeems a token: the machine it is for joins with the key of the CSR. Of any number of agents that hold one token
// exactly one joins. An agent that did not get its answer may ask again, with the key it asked with, for ten minutes.
//
// Errors: [ErrTokenMalformed], [ErrTokenUnknown], [ErrTokenUsed], [ErrTokenExpired], [ErrTokenMachine],
// [ErrMachineExists], [ErrMachines], [ErrMachineRevoked], [ErrKeyRevoked], and the authority's of a CSR.
func (f *Fleet) Join(ctx context.Context, req JoinRequest) (Joined, error) {
	joined, err := f.join(ctx, req)
	if err != nil {
		f.meter.Count("fleet_joins_refused", 1, "code", codeOf(err))
		return Joined{}, err
	}
	f.meter.Count("fleet_joins", 1)
	return joined, nil
}

func (f *Fleet) join(ctx context.Context, req JoinRequest) (Joined, error) {
	secret, err := ParseJoinSecret(req.Secret)
	if err != nil {
		return Joined{}, err
	}
	pub, spki, err := parseCSR(req.CSR)
	if err != nil {
		return Joined{}, err
	}
	facts, err := machineFacts(req.Facts)
	if err != nil {
		return Joined{}, err
	}
	// What can be refused is refused before anything is signed; the transaction looks again.
	err = f.view(ctx, func(tx Tx) error {
		_, _, err := f.redeemable(ctx, tx, secret, req.Machine, spki)
		return err
	})
	if err != nil {
		return Joined{}, err
	}
	id, err := f.machineID(req.Machine)
	if err != nil {
		return Joined{}, err
	}
	chain, err := f.cfg.Authority.SignX509(ctx, id, pub, f.cfg.AgentTTL, ca.SignOptions{})
	if err != nil {
		return Joined{}, fmt.Errorf("sign for machine %s: %w", req.Machine, err)
	}
	var m Machine
	err = f.update(ctx, func(u *unit) error {
		t, old, err := f.redeemable(ctx, u.Tx, secret, req.Machine, spki)
		if err != nil {
			return err
		}
		if !t.Used.IsZero() { // the answer to this same agent was lost
			m = *old
			return nil
		}
		now := f.now()
		m = Machine{
			ID: t.Machine, Name: t.Machine, State: MachineJoined, SPKI: spki, Joined: now, LastSeen: now,
			Version: clip(req.Version, maxVersionBytes), Facts: facts,
		}
		action := "machine.join"
		if old != nil {
			action = "machine.replace"
			// Whatever ran under the old agent is not vouched for by the new one.
			if err := f.endWorkloads(ctx, u, m.ID); err != nil {
				return err
			}
			if err := u.Events.PutStream(ctx, EventStream{Machine: m.ID}); err != nil {
				return err
			}
		} else {
			n, err := u.Machines.CountMachines(ctx)
			if err != nil {
				return err
			}
			if n >= f.cfg.MaxMachines {
				return exhausted(ErrMachines, joinOf(m.ID), f.cfg.MaxMachines, "raise the server's limit of machines")
			}
		}
		t.Used = now
		if err := u.Tokens.PutToken(ctx, t); err != nil {
			return err
		}
		if err := u.Machines.PutMachine(ctx, m); err != nil {
			return err
		}
		u.then = append(u.then, func() { f.members[m.ID] = memberOf(m) })
		rec := event.NewRecord(machineUID(m.ID), action, id.String())
		rec.Detail = map[string]string{"token": t.ID, "author": t.Author, "spki": spki}
		return u.Audit.PutRecord(ctx, rec)
	})
	if err != nil {
		return Joined{}, err
	}
	f.log.InfoContext(ctx, "a machine joined", slog.String("machine", m.ID))
	f.note("machine.joined", m.ID, "machine "+m.ID+" joined", nil)
	return Joined{Machine: m, ID: id, Chain: chain, Bundle: f.cfg.Authority.Bundle()}, nil
}

// redeemable returns the token and the machine of its id (nil if there is none), or why it cannot be redeemed. A token
// that was used is returned only to the very agent that used it.
func (f *Fleet) redeemable(ctx context.Context, tx Tx, secret JoinSecret, machine, spki string) (JoinToken, *Machine, error) {
	what := joinOf(machine)
	t, err := tx.Tokens.Token(ctx, secret.ID)
	known := err == nil
	if err != nil && !errors.Is(err, ErrNotFound) {
		return JoinToken{}, nil, err
	}
	// One comparison whatever was found, so that its time does not tell whether the id exists.
	got := secret.hash()
	if match := subtle.ConstantTimeCompare(got[:], t.Hash[:]) == 1; !match || !known {
		return JoinToken{}, nil, refuse(ErrTokenUnknown, refusal.Unproven, what, "the server does not know this join token",
			"check that it is complete and meant for this server, or make a new one with redoubt token create")
	}
	var old *Machine
	m, err := tx.Machines.Machine(ctx, t.Machine)
	switch {
	case err == nil:
		old = &m
	case !errors.Is(err, ErrNotFound):
		return JoinToken{}, nil, err
	}
	now := f.now()
	if machine != t.Machine {
		return JoinToken{}, nil, refuse(ErrTokenMachine, refusal.Denied, what, "the join token is for another machine",
			"make one for this machine with redoubt token create, or start the agent as the machine that the token is for")
	}
	if err := f.withdrawn(identity.ID{}, t.Machine, spki); err != nil {
		return JoinToken{}, nil, err
	}
	if !t.Used.IsZero() {
		again := old != nil && old.State == MachineJoined && old.SPKI == spki && old.Joined.Equal(t.Used) && now.Before(t.Used.Add(rejoinWindow))
		if !again {
			return JoinToken{}, nil, refuse(ErrTokenUsed, refusal.Unproven, what, "the join token was used at "+stamp(t.Used),
				"if that was not you, revoke machine "+t.Machine+"; make a new token with redoubt token create")
		}
		return t, old, nil
	}
	if !now.Before(t.Expires) {
		return JoinToken{}, nil, refuse(ErrTokenExpired, refusal.Unproven, what,
			"the join token expired at "+stamp(t.Expires)+"; the server's time is "+stamp(now), "make a new one with redoubt token create")
	}
	if old != nil && !t.Replace {
		return JoinToken{}, nil, machineExists(what)
	}
	return t, old, nil
}

// RenewRequest asks for a new certificate. Trust: CSR, Version are attacker-controlled; Machine, Proven and NotAfter come
// from a certificate that the door verified (but for its end) and whose key the caller proved to hold.
type RenewRequest struct {
	Machine  string
	Proven   string    // SPKI of the key that the caller holds
	NotAfter time.Time // of the certificate it came with
	CSR      []byte
	Version  string
}

// Renew signs a new certificate for a machine that proves the key it is registered with, or the one before. A machine
// that slept may come with a certificate that ended up to [Config.RenewGrace] ago. The CSR may have a new key, which then
// is the registered one; the old one stays good until the machine first speaks with the new.
//
// Errors: [ErrMachineUnknown], [ErrMachineRevoked], [ErrMachineKey], [ErrKeyRevoked], [ErrRenewLate], [ErrRotation],
// and the authority's of a CSR.
func (f *Fleet) Renew(ctx context.Context, req RenewRequest) (Joined, error) {
	joined, err := f.renew(ctx, req)
	if err != nil {
		f.meter.Count("fleet_renewals_refused", 1, "code", codeOf(err))
		return Joined{}, err
	}
	f.meter.Count("fleet_renewals", 1)
	return joined, nil
}

func (f *Fleet) renew(ctx context.Context, req RenewRequest) (Joined, error) {
	if err := f.Trusted(req.Machine, req.Proven); err != nil {
		return Joined{}, err
	}
	if now := f.now(); now.After(req.NotAfter.Add(f.cfg.RenewGrace)) {
		return Joined{}, refuse(ErrRenewLate, refusal.Unproven, "renewal of machine "+req.Machine,
			"its certificate ended at "+stamp(req.NotAfter)+", longer ago than "+f.cfg.RenewGrace.String()+"; the server's time is "+stamp(now),
			"join again with a token made with redoubt token create --replace")
	}
	pub, spki, err := parseCSR(req.CSR)
	if err != nil {
		return Joined{}, err
	}
	if err := f.withdrawn(identity.ID{}, req.Machine, spki); err != nil {
		return Joined{}, err
	}
	id, err := f.machineID(req.Machine)
	if err != nil {
		return Joined{}, err
	}
	chain, err := f.cfg.Authority.SignX509(ctx, id, pub, f.cfg.AgentTTL, ca.SignOptions{})
	if err != nil {
		return Joined{}, fmt.Errorf("sign for machine %s: %w", req.Machine, err)
	}
	var m Machine
	err = f.update(ctx, func(u *unit) error {
		// The transaction looks again: a revocation or another rotation may have come first.
		if err := f.Trusted(req.Machine, req.Proven); err != nil {
			return err
		}
		var err error
		if m, err = u.Machines.Machine(ctx, req.Machine); err != nil {
			return err
		}
		rotated := spki != m.SPKI
		if rotated {
			if err := f.mayRotate(m, req); err != nil {
				return err
			}
			m.Previous, m.SPKI, m.Rotated = req.Proven, spki, f.now()
		}
		m.LastSeen, m.Version = f.now(), clip(req.Version, maxVersionBytes)
		if err := u.Machines.PutMachine(ctx, m); err != nil {
			return err
		}
		u.then = append(u.then, func() { f.members[m.ID] = memberOf(m) })
		if !rotated {
			return nil
		}
		rec := event.NewRecord(machineUID(m.ID), "machine.rotate-key", id.String())
		rec.Detail = map[string]string{"spki": spki, "proven": req.Proven}
		return u.Audit.PutRecord(ctx, rec)
	})
	if err != nil {
		return Joined{}, err
	}
	return Joined{Machine: m, ID: id, Chain: chain, Bundle: f.cfg.Authority.Bundle()}, nil
}

// rotateLeast is how old a key is at the least when another takes its place.
const rotateLeast = time.Minute

// mayRotate refuses a machine that changes its key again and again: each time is a leaf of the audit log. A key is kept for
// a tenth of [Config.AgentTTL], and a minute at the least; for no longer than that if the answer of the last rotation may
// have been lost, or the certificate is about to end, or has ended.
func (f *Fleet) mayRotate(m Machine, req RenewRequest) error {
	least := min(rotateLeast, f.cfg.AgentTTL/4) // of certificates that live for seconds
	now, keep := f.now(), max(f.cfg.AgentTTL/10, least)
	since := m.Rotated
	if since.IsZero() {
		since = m.Joined
	}
	lost := m.Previous != "" && req.Proven == m.Previous
	if lost || req.NotAfter.Sub(now) < keep {
		keep = least
	}
	if age := now.Sub(since); age >= keep || age < 0 { // the clock was set back
		return nil
	}
	return refuse(ErrRotation, refusal.Exhausted, "renewal of machine "+m.ID, "its key was changed at "+stamp(since)+", less than "+keep.String()+" ago",
		"renew with the same key, or later")
}

// Authenticate says whether a machine that proved to hold a key may speak: it joined, this is its key (or the one before
// its last rotation), and nothing of it is revoked. It is asked on every call and again while streams last, so it does no
// I/O, save once after a rotation. Errors: [ErrMachineUnknown], [ErrMachineRevoked], [ErrMachineKey], [ErrKeyRevoked].
func (f *Fleet) Authenticate(ctx context.Context, machine, spki string) error {
	if err := f.Trusted(machine, spki); err != nil {
		return err
	}
	f.mu.Lock()
	m := f.members[machine]
	m.seen, m.dirty = f.now(), true
	f.members[machine] = m
	f.mu.Unlock()
	if m.previous == "" || spki != m.spki {
		return nil
	}
	// It speaks with the new key: the old one has had its day.
	return f.update(ctx, func(u *unit) error {
		m, err := u.Machines.Machine(ctx, machine)
		if err != nil || m.SPKI != spki {
			return err
		}
		m.Previous, m.LastSeen = "", f.now()
		u.then = append(u.then, func() { f.members[m.ID] = memberOf(m) })
		return u.Machines.PutMachine(ctx, m)
	})
}

// Trusted is [Fleet.Authenticate] of a machine that has just not said anything: it is asked again while its streams last.
func (f *Fleet) Trusted(machine, spki string) error {
	what := "machine"
	if checkMachineID(machine) == nil {
		what = "machine " + machine
	}
	f.mu.Lock()
	m, ok := f.members[machine]
	stale := f.stale
	f.mu.Unlock()
	if stale {
		return refuse(ErrState, refusal.Unavailable, what, "the server's state is being read again", "try again")
	}
	if !ok {
		return refuse(ErrMachineUnknown, refusal.Unproven, what, "it has not joined this server, or was forgotten by it",
			"join it with a token made with redoubt token create")
	}
	if err := f.withdrawn(identity.ID{}, machine, spki); err != nil {
		return err
	}
	if m.state != MachineJoined {
		return machineRevoked(machine, "it was revoked")
	}
	if spki == "" || spki != m.spki && spki != m.previous {
		return refuse(ErrMachineKey, refusal.Unproven, what, "its certificate is of a key that is not the registered one: another agent took its place, or it is a copy",
			"find out which of them is the real one; join it with a token made with redoubt token create --replace")
	}
	return nil
}

func machineRevoked(machine, why string) *refusal.Error {
	return refuse(ErrMachineRevoked, refusal.Unproven, "machine "+machine, why, "lift the revocation, or join it anew with a token that replaces it")
}

func (f *Fleet) machineID(machine string) (identity.ID, error) {
	return MachineID(f.cfg.TrustDomain, machine)
}

// The paths of IDs that no workload is given.
const (
	machinePath = "/machine/"
	redoubtPath = "/redoubt/"
	serverPath  = "/server"
)

// MachineID returns the SPIFFE ID of a machine's agent: spiffe://<td>/machine/<id>. Errors: [ErrMachineID].
func MachineID(td identity.TrustDomain, machine string) (identity.ID, error) {
	if err := checkMachineID(machine); err != nil {
		return identity.ID{}, err
	}
	return identity.MakeID(td, machinePath+machine)
}

// MachineOf returns the machine that an ID of this trust domain is of. Errors: [ErrMachineID] of any other ID.
func MachineOf(td identity.TrustDomain, id identity.ID) (string, error) {
	path := id.Path()
	if id.TrustDomain() != td || len(path) <= len(machinePath) || path[:len(machinePath)] != machinePath {
		return "", refuse(ErrMachineID, refusal.Denied, "certificate", "its SPIFFE ID is not that of a machine of trust domain "+td.String(),
			"use the certificate that the agent got when it joined")
	}
	machine := path[len(machinePath):]
	return machine, checkMachineID(machine)
}

// ServerID returns the SPIFFE ID of the server: spiffe://<td>/redoubt/server.
func ServerID(td identity.TrustDomain) identity.ID {
	id, _ := identity.MakeID(td, redoubtPath+"server") // a constant path is well-formed
	return id
}

func parseCSR(der []byte) (crypto.PublicKey, string, error) {
	if len(der) > MaxCSRBytes {
		return nil, "", refuse(ca.ErrMalformedCSR, refusal.Invalid, "certificate request",
			fmt.Sprintf("it is longer than %d bytes", MaxCSRBytes), "send a PKCS #10 request of one key")
	}
	pub, err := ca.ParseCSR(der)
	if err != nil {
		return nil, "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, "", refuse(ca.ErrWeakKey, refusal.Invalid, "certificate request", "its key is of an unknown type", "use a P-256 key")
	}
	sum := sha256.Sum256(spki)
	return pub, hex.EncodeToString(sum[:]), nil
}

func machineUID(machine string) string { return `Machine::"` + machine + `"` }

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

func codeOf(err error) string {
	if e := refusal.As(err); e != nil {
		return e.Code
	}
	return "internal"
}
