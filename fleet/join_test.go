package fleet_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestJoinGivesTheMachineItsIdentity(t *testing.T) {
	w := newWorld(t, nil)
	k, j := w.join("m1")
	id, err := identity.IDFromCertificate(j.Chain[0])
	if err != nil || id.String() != "spiffe://example.org/machine/m1" || j.ID != id {
		t.Errorf("identity %v, %v", id, err)
	}
	if life := j.Chain[0].NotAfter.Sub(w.clock.now()); life < 23*time.Hour || life > 25*time.Hour {
		t.Errorf("certificate lives %s", life)
	}
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Error(err)
	}
	if w.records("machine.join") != 1 {
		t.Errorf("audit records: %v", w.store.Records())
	}
	m, err := w.fleet.Machine(t.Context(), "m1")
	if err != nil || m.SPKI != k.spki || m.State != fleet.MachineJoined || m.Lost {
		t.Errorf("machine %+v, %v", m, err)
	}
}

func TestJoinRefusals(t *testing.T) {
	w := newWorld(t, nil)
	join := func(secret, machine string) error {
		_, err := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: secret, Machine: machine, CSR: newKey(t).csr})
		return err
	}
	secret := w.token(fleet.TokenRequest{Machine: "m1"})
	other := w.token(fleet.TokenRequest{Machine: "m1"})
	early := w.token(fleet.TokenRequest{Machine: "m3", TTL: time.Minute})

	want(t, join("nonsense", "m1"), fleet.ErrTokenMalformed)
	want(t, join(secret.Reveal(), "m2"), fleet.ErrTokenMachine)
	// The id of one with the secret of the other: indistinguishable from a token that does not exist.
	a, b := strings.Split(secret.Reveal(), "."), strings.Split(other.Reveal(), ".")
	a[1] = b[1]
	wrong := join(strings.Join(a, "."), "m1")
	want(t, wrong, fleet.ErrTokenUnknown)
	a[1] = identity.Unique("t")
	missing := join(strings.Join(a, "."), "m1")
	want(t, missing, fleet.ErrTokenUnknown)
	if wrong.Error() != missing.Error() {
		t.Errorf("the refusals tell whether an id exists:\n%v\n%v", wrong, missing)
	}
	if err := join(secret.Reveal(), "m1"); err != nil {
		t.Fatal(err)
	}
	want(t, join(secret.Reveal(), "m1"), fleet.ErrTokenUsed)
	want(t, join(other.Reveal(), "m1"), fleet.ErrMachineExists)
	w.clock.add(time.Minute)
	want(t, join(early.Reveal(), "m3"), fleet.ErrTokenExpired)
	if _, err := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: other.Reveal(), Machine: "m1", CSR: []byte("x")}); err == nil {
		t.Error("a malformed CSR must be refused")
	}
	for _, code := range []*refusal.Error{
		fleet.ErrTokenMalformed, fleet.ErrTokenMachine, fleet.ErrTokenUnknown, fleet.ErrTokenUsed, fleet.ErrMachineExists, fleet.ErrTokenExpired,
	} {
		if w.meter.get("fleet_joins_refused code "+code.Code) == 0 {
			t.Errorf("refusal %s was not counted", code.Code)
		}
	}
	if n := w.meter.get("fleet_joins"); n != 1 {
		t.Errorf("%d machines joined", n)
	}
}

func TestOfAgentsRacingWithOneTokenExactlyOneJoins(t *testing.T) {
	w := newWorld(t, nil)
	secret := w.token(fleet.TokenRequest{Machine: "m1"}).Reveal()
	const agents = 16
	keys := make([]key, agents)
	errs := make([]error, agents)
	var wg sync.WaitGroup
	for i := range agents {
		keys[i] = newKey(t)
		wg.Go(func() {
			_, errs[i] = w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: secret, Machine: "m1", CSR: keys[i].csr})
		})
	}
	wg.Wait()
	joined := 0
	for i, err := range errs {
		if err == nil {
			joined++
			if err := w.fleet.Authenticate(t.Context(), "m1", keys[i].spki); err != nil {
				t.Errorf("the one that joined cannot speak: %v", err)
			}
			continue
		}
		want(t, err, fleet.ErrTokenUsed)
		want(t, w.fleet.Authenticate(t.Context(), "m1", keys[i].spki), fleet.ErrMachineKey)
	}
	if joined != 1 || w.records("machine.join") != 1 {
		t.Errorf("%d joined, %d records", joined, w.records("machine.join"))
	}
}

func TestAnAgentWhoseAnswerWasLostMayAskAgainWithTheSameKey(t *testing.T) {
	w := newWorld(t, nil)
	secret, k := w.token(fleet.TokenRequest{Machine: "m1"}).Reveal(), newKey(t)
	req := fleet.JoinRequest{Secret: secret, Machine: "m1", CSR: k.csr}
	for range 2 {
		if _, err := w.fleet.Join(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if w.records("machine.join") != 1 {
		t.Error("it joined twice")
	}
	w.clock.add(11 * time.Minute)
	_, err := w.fleet.Join(t.Context(), req)
	want(t, err, fleet.ErrTokenUsed)
}

func TestATokenThatReplacesPutsTheOldAgentOut(t *testing.T) {
	w := newWorld(t, nil)
	old, _ := w.join("m1")
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})
	_, _, err := w.fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: "m1"}, rec())
	want(t, err, fleet.ErrMachineExists)
	k := newKey(t)
	secret := w.token(fleet.TokenRequest{Machine: "m1", Replace: true})
	if _, err := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: secret.Reveal(), Machine: "m1", CSR: k.csr}); err != nil {
		t.Fatal(err)
	}
	want(t, w.fleet.Authenticate(t.Context(), "m1", old.spki), fleet.ErrMachineKey)
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Error(err)
	}
	if _, err := w.fleet.SignX509(t.Context(), "m1", "w-1", newKey(t).csr); !errors.Is(err, fleet.ErrWorkloadGone) {
		t.Errorf("what ran under the old agent must be gone: %v", err)
	}
	if w.records("machine.replace") != 1 {
		t.Error("not audited")
	}
}

func TestRenewal(t *testing.T) {
	w := newWorld(t, nil)
	k, j := w.join("m1")
	next, third := newKey(t), newKey(t)
	renew := func(proven key, csr key) error {
		_, err := w.fleet.Renew(t.Context(), fleet.RenewRequest{Machine: "m1", Proven: proven.spki, NotAfter: j.Chain[0].NotAfter, CSR: csr.csr})
		return err
	}
	want(t, renew(next, next), fleet.ErrMachineKey) // not registered, and proves nothing
	if err := renew(k, k); err != nil {
		t.Errorf("renewal with the same key: %v", err)
	}
	w.clock.add(3 * time.Hour)
	if err := renew(k, next); err != nil {
		t.Errorf("rotation: %v", err)
	}
	// The answer may have been lost: the old key is good, to speak and to renew, until the new one is used.
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Errorf("old key before the new one was used: %v", err)
	}
	want(t, renew(k, third), fleet.ErrRotation)
	w.clock.add(time.Minute)
	if err := renew(k, third); err != nil {
		t.Errorf("rotation, again: %v", err)
	}
	want(t, w.fleet.Authenticate(t.Context(), "m1", next.spki), fleet.ErrMachineKey)
	if err := w.fleet.Authenticate(t.Context(), "m1", third.spki); err != nil {
		t.Error(err)
	}
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrMachineKey)
	want(t, renew(k, k), fleet.ErrMachineKey)
	if n := w.records("machine.rotate-key"); n != 2 {
		t.Errorf("%d rotations audited", n)
	}

	w.clock.add(24*time.Hour + 29*24*time.Hour - 3*time.Hour - time.Minute)
	if err := renew(third, third); err != nil {
		t.Errorf("a machine that slept must come back: %v", err)
	}
	w.clock.add(2 * 24 * time.Hour)
	want(t, renew(third, third), fleet.ErrRenewLate)
	w.clock.add(-3 * 24 * time.Hour)
	if _, err := w.fleet.RevokeMachine(t.Context(), "m1", "stolen", rec()); err != nil {
		t.Fatal(err)
	}
	want(t, renew(third, third), fleet.ErrMachineRevoked)
}

func TestAKeyIsNotRotatedAgainAndAgain(t *testing.T) {
	w := newWorld(t, nil)
	k, j := w.join("m1")
	notAfter := j.Chain[0].NotAfter
	rotate := func() error {
		t.Helper()
		next := newKey(t)
		j, err := w.fleet.Renew(t.Context(), fleet.RenewRequest{Machine: "m1", Proven: k.spki, NotAfter: notAfter, CSR: next.csr})
		if err == nil {
			k, notAfter = next, j.Chain[0].NotAfter
			err = w.fleet.Authenticate(t.Context(), "m1", k.spki)
		}
		return err
	}
	want(t, rotate(), fleet.ErrRotation) // it has just joined
	if _, err := w.fleet.Renew(t.Context(), fleet.RenewRequest{Machine: "m1", Proven: k.spki, NotAfter: notAfter, CSR: k.csr}); err != nil {
		t.Errorf("renewal with the same key: %v", err)
	}
	for range 3 {
		w.clock.add(fleet.DefaultAgentTTL / 10)
		if err := rotate(); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			want(t, rotate(), fleet.ErrRotation)
		}
		w.open() // nor after a restart
		w.clock.add(time.Hour)
		want(t, rotate(), fleet.ErrRotation)
	}
	// One whose certificate is about to end may, but not more than once a minute.
	notAfter = w.clock.now().Add(time.Minute)
	if err := rotate(); err != nil {
		t.Errorf("with a certificate that is about to end: %v", err)
	}
	notAfter = w.clock.now().Add(-time.Hour)
	want(t, rotate(), fleet.ErrRotation)
	w.clock.add(time.Minute)
	if err := rotate(); err != nil {
		t.Errorf("with one that has ended: %v", err)
	}
	if n := w.records("machine.rotate-key"); n != 5 {
		t.Errorf("%d leaves", n)
	}
	if n := w.meter.get("fleet_renewals_refused code " + fleet.ErrRotation.Code); n != 1+3*6+1 {
		t.Errorf("%d counted", n)
	}
}

func TestTokenBounds(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.MaxTokens, c.MaxMachines = 3, 2 })
	for _, id := range []string{"", "server", "UPPER", "a b", "-a", "a-", "a/b", strings.Repeat("a", 64), "ü"} {
		_, _, err := w.fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: id}, rec())
		want(t, err, fleet.ErrMachineID)
	}
	_, _, err := w.fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: "m1", TTL: time.Second}, rec())
	want(t, err, fleet.ErrTokenTTL)
	var secrets []fleet.JoinSecret
	for i := range 3 {
		secrets = append(secrets, w.token(fleet.TokenRequest{Machine: fmt.Sprintf("m%d", i)}))
	}
	_, _, err = w.fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: "m9"}, rec())
	want(t, err, fleet.ErrTokens)
	for i, s := range secrets {
		_, err := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: s.Reveal(), Machine: fmt.Sprintf("m%d", i), CSR: newKey(t).csr})
		if i < 2 && err != nil {
			t.Error(err)
		}
		if i == 2 {
			want(t, err, fleet.ErrMachines)
		}
	}
	// A token that is deleted cannot be used.
	if err := w.fleet.DeleteToken(t.Context(), secrets[2].ID, rec()); err != nil {
		t.Fatal(err)
	}
	_, err = w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: secrets[2].Reveal(), Machine: "m2", CSR: newKey(t).csr})
	want(t, err, fleet.ErrTokenExpired)
	want(t, w.fleet.DeleteToken(t.Context(), secrets[0].ID, rec()), fleet.ErrTokenUsed)
	want(t, w.fleet.DeleteToken(t.Context(), "t-none", rec()), fleet.ErrUnknown)
	// Retention.
	w.clock.add(8 * 24 * time.Hour)
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := w.fleet.Tokens(t.Context(), "", 0); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestASecretIsNeitherStoredNorShownByChance(t *testing.T) {
	w := newWorld(t, nil)
	s := w.token(fleet.TokenRequest{Machine: "m1"})
	secret := strings.Split(s.Reveal(), ".")[2]
	tokens, err := w.fleet.Tokens(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := json.Marshal([]any{tokens, s, w.store.Records()})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(rendered), fmt.Sprintf("%v %+v %#v %s", s, s, s, s), fmt.Sprintf("%v %+v", tokens, &s)} {
		if strings.Contains(text, secret) || strings.Contains(text, "Hash\":") {
			t.Errorf("the secret or its hash is shown: %s", text)
		}
	}
}

func TestJoinStoresNothingIfTheCommitFails(t *testing.T) {
	w := newWorld(t, nil)
	secret, k := w.token(fleet.TokenRequest{Machine: "m1"}).Reveal(), newKey(t)
	full := errors.New("disk full")
	w.store.FailCommit = func() error { return full }
	req := fleet.JoinRequest{Secret: secret, Machine: "m1", CSR: k.csr}
	if _, err := w.fleet.Join(t.Context(), req); !errors.Is(err, full) {
		t.Fatalf("Join on a full disk: %v", err)
	}
	w.store.FailCommit = nil
	// What is cached is read again before it is relied on.
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrState)
	if _, err := w.fleet.Join(t.Context(), req); err != nil {
		t.Errorf("the token must still be good: %v", err)
	}
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Error(err)
	}
}

func TestMachineOfRefusesEverybodyElse(t *testing.T) {
	for _, s := range []string{
		"spiffe://example.org/service/m1", "spiffe://example.org/machine", "spiffe://other.org/machine/m1",
		"spiffe://example.org/machine/m1/x", "spiffe://example.org/machines/m1", "spiffe://example.org", "spiffe://example.org/machine/server",
	} {
		id, err := identity.ParseID(s)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := fleet.MachineOf(td, id); err == nil {
			t.Errorf("%s is taken for machine %s", s, m)
		}
	}
}

func TestLargeCSR(t *testing.T) {
	w := newWorld(t, nil)
	_, err := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: w.token(fleet.TokenRequest{Machine: "m1"}).Reveal(), Machine: "m1", CSR: bytes.Repeat([]byte{1}, fleet.MaxCSRBytes+1)})
	want(t, err, ca.ErrMalformedCSR)
}

func FuzzParseJoinSecret(f *testing.F) {
	good := "rj1." + identity.Unique("t") + "." + strings.Repeat("A", 43) + "." + strings.Repeat("0", 64)
	for _, s := range []string{good, "", "rj1...", good + ".", strings.ToUpper(good), strings.Replace(good, "AAA.", "AAB.", 1), "rj2" + good[3:]} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		secret, err := fleet.ParseJoinSecret(s)
		if err != nil {
			want(t, err, fleet.ErrTokenMalformed)
			if len(s) > 8 && strings.Contains(err.Error(), s) {
				t.Errorf("the refusal quotes the token: %v", err)
			}
			return
		}
		if secret.Reveal() != s {
			t.Errorf("%q reads as %q", s, secret.Reveal())
		}
	})
}
