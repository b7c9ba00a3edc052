package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

// sign has the authority sign one of each kind, and verifies both against the bundle that is given out now.
func sign(t testing.TB, w *world) (chain []*x509.Certificate, token string) {
	t.Helper()
	chain, err := w.SignX509(t.Context(), id(t, "/service/a"), newKey(t).Public(), 0, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := w.SignJWT(t.Context(), id(t, "/service/a"), []string{"b"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, w, chain, svid.Token)
	return chain, svid.Token
}

func verify(t testing.TB, w *world, chain []*x509.Certificate, token string) {
	t.Helper()
	inter := x509.NewCertPool()
	inter.AddCert(chain[1])
	now := w.cfg.Now()
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: w.Bundle().Pool(), Intermediates: inter, CurrentTime: now}); err != nil {
		t.Error(err)
	}
	if _, err := ca.VerifyJWT(w.Bundle(), token, "b", now); err != nil {
		t.Error(err)
	}
}

func changed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// TestRotationByHand takes every step, and tries each that is out of order.
func TestRotationByHand(t *testing.T) {
	w := open(t)
	oldChain, oldToken := sign(t, w)
	refuses := func(s step, name string, want *refusal.Error) {
		t.Helper()
		before := len(w.store.Records())
		_, err := s(t.Context(), audit(name))
		wantRefusal(t, err, want)
		if len(w.store.Records()) != before {
			t.Errorf("%s was refused, and stored", name)
		}
	}
	refuses(w.Publish, "publish", ca.ErrStep)
	refuses(w.Activate, "activate", ca.ErrStep)
	refuses(w.Retire, "retire", ca.ErrStep)

	w.clock.add(24 * time.Hour)
	ch, seq := w.Changed(), w.Bundle().Sequence
	st := take(t, w.Prepare, "prepare")
	if d := cmp.Diff(map[string]int{"root active": 1, "x509 active": 1, "jwt active": 1, "x509 prepared": 1, "jwt prepared": 1}, states(st)); d != "" {
		t.Errorf("prepared (-want +got):\n%s", d)
	}
	if changed(ch) || len(w.Bundle().JWTAuthorities) != 1 {
		t.Error("a prepared key is in the bundle")
	}
	refuses(w.Prepare, "prepare", ca.ErrStep)
	refuses(w.Activate, "activate", ca.ErrStep)

	take(t, w.Publish, "publish")
	if !changed(ch) || len(w.Bundle().JWTAuthorities) != 2 || w.Bundle().Sequence <= seq {
		t.Error("a published key is not in the bundle, or nobody was told")
	}
	ch, seq = w.Changed(), w.Bundle().Sequence
	if chain, token := sign(t, w); !chain[1].Equal(oldChain[1]) || header(t, token) != header(t, oldToken) {
		t.Error("a published key signs already")
	}
	refuses(w.Publish, "publish", ca.ErrStep)
	w.clock.add(ca.DefaultRefreshHint - time.Second)
	refuses(w.Activate, "activate", ca.ErrEarly) // not before relying parties have it
	w.clock.add(time.Second)

	// Tokens and SVIDs of the old keys, signed at the last moment.
	lastChain, lastToken := sign(t, w)
	take(t, w.Activate, "activate")
	newChain, newToken := sign(t, w)
	if newChain[1].Equal(oldChain[1]) || header(t, newToken) == header(t, oldToken) {
		t.Error("an active key does not sign")
	}
	refuses(w.Activate, "activate", ca.ErrStep)
	verify(t, w, lastChain, lastToken)
	w.clock.add(ca.DefaultJWTTTL)
	verify(t, w, lastChain, lastToken) // the token's last second
	refuses(w.Retire, "retire", ca.ErrEarly)
	w.clock.add(ca.Leeway)
	if _, err := ca.VerifyJWT(w.Bundle(), lastToken, "b", w.clock.now()); err != nil {
		t.Errorf("the last verifier still takes it: %v", err)
	}
	if changed(ch) {
		t.Error("activation changed the bundle")
	}
	st = take(t, w.Retire, "retire")
	if d := cmp.Diff(map[string]int{"root active": 1, "x509 active": 1, "jwt active": 1, "x509 retired": 1, "jwt retired": 1}, states(st)); d != "" {
		t.Errorf("retired (-want +got):\n%s", d)
	}
	if !changed(ch) || len(w.Bundle().JWTAuthorities) != 1 || w.Bundle().Sequence <= seq {
		t.Error("a retired key is in the bundle, or nobody was told")
	}
	_, err := ca.VerifyJWT(w.Bundle(), lastToken, "b", w.clock.now())
	wantRefusal(t, err, ca.ErrTokenKey)
	// X509-SVIDs of the old issuing key live on: the root is what is trusted.
	inter := x509.NewCertPool()
	inter.AddCert(lastChain[1])
	if _, err := lastChain[0].Verify(x509.VerifyOptions{Roots: w.Bundle().Pool(), Intermediates: inter, CurrentTime: w.clock.now()}); err != nil {
		t.Error(err)
	}
	keys, err := w.store.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.State == ca.Retired && len(k.Sealed) != 0 {
			t.Errorf("the private half of retired %s key is kept", k.Use)
		}
	}

	var actions []string
	for _, r := range w.store.Records() {
		actions = append(actions, r.Action)
	}
	if d := cmp.Diff([]string{"ca.create", "ca.prepare", "ca.publish", "ca.activate", "ca.retire"}, actions); d != "" {
		t.Errorf("audit (-want +got):\n%s", d)
	}
	seq = w.Bundle().Sequence
	w.reopen(t)
	if w.Bundle().Sequence != seq {
		t.Error("the sequence is another after a reopen")
	}
	sign(t, w)
}

func header(t testing.TB, token string) string {
	t.Helper()
	h, _, _ := strings.Cut(token, ".")
	return h
}

// TestANearlyExpiredKeyIsNotActivated is SPIRE's issue 7199: a key that was prepared long ago must not begin to sign.
func TestANearlyExpiredKeyIsNotActivated(t *testing.T) {
	w := open(t)
	take(t, w.Prepare, "prepare")
	take(t, w.Publish, "publish")
	w.clock.add(ca.DefaultIssuingTTL - 47*time.Hour)
	_, err := w.Activate(t.Context(), audit("activate"))
	wantRefusal(t, err, ca.ErrTooShort)
	// The way out: prepare again, and the old ones make way.
	st := take(t, w.Prepare, "prepare")
	if got := states(st); got["x509 prepared"] != 1 || got["x509 published"] != 0 || got["x509 retired"] != 1 || got["jwt retired"] != 1 {
		t.Errorf("keys: %v", got)
	}
	take(t, w.Publish, "publish")
	w.clock.add(ca.DefaultRefreshHint)
	take(t, w.Activate, "activate")
	sign(t, w)
}

// TestTheRootBoundsItsChildren goes to the end of the root's life.
func TestTheRootBoundsItsChildren(t *testing.T) {
	w := open(t)
	end := w.Bundle().X509Authorities[0].NotAfter
	w.clock.set(end.Add(-10 * 24 * time.Hour))
	st := take(t, w.Prepare, "prepare")
	for _, k := range st.Keys {
		if k.Use == ca.X509 && k.NotAfter.After(end) {
			t.Errorf("issuing key %s outlives the root", k.ID)
		}
	}
	if !strings.Contains(strings.Join(st.Problems, "\n"), "the root ends at") {
		t.Errorf("nobody is warned of the end of the root: %v", st.Problems)
	}
	w = open(t)
	w.clock.set(end.Add(-47 * time.Hour))
	_, err := w.Prepare(t.Context(), audit("prepare"))
	wantRefusal(t, err, ca.ErrTooShort)
	w.clock.set(end.Add(time.Hour))
	_, err = w.Prepare(t.Context(), audit("prepare"))
	wantRefusal(t, err, ca.ErrExpired)
	w.clock.set(start.Add(-2 * time.Hour))
	_, err = w.Prepare(t.Context(), audit("prepare"))
	wantRefusal(t, err, ca.ErrNotYetValid)
}

// TestAStepThatIsNotStoredDidNotHappen fills the disk in the midst of a rotation.
func TestAStepThatIsNotStoredDidNotHappen(t *testing.T) {
	w := open(t)
	full := errors.New("disk full")
	before := w.Status()
	w.store.Fail(full)
	if _, err := w.Prepare(t.Context(), audit("prepare")); !errors.Is(err, full) {
		t.Errorf("Prepare: %v", err)
	}
	if d := cmp.Diff(before, w.Status()); d != "" {
		t.Errorf("status (-before +after):\n%s", d)
	}
	sign(t, w)
	w.store.Fail(nil)
	rec := audit("prepare")
	if _, err := w.Prepare(t.Context(), rec); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Publish(t.Context(), rec); err == nil {
		t.Error("one audit record served two steps")
	}
	_, err := w.Publish(t.Context(), event.Record{})
	wantRefusal(t, err, ca.ErrStep)
}

// TestRunRotatesByItself lives through 100 days in a bubble of time: every SVID asked is signed in full length, verifies
// against the bundle of its moment, and each token does so to its end.
func TestRunRotatesByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, func(c *ca.Config) { c.Now = time.Now })
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() {
			if err := w.Run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
		issuers, kids := map[string]bool{}, map[string]bool{}
		end := time.Now().Add(100 * 24 * time.Hour)
		for time.Now().Before(end) {
			chain, err := w.SignX509(ctx, id(t, "/machine/m"), newKey(t).Public(), 24*time.Hour, ca.SignOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(chain[0].NotAfter); left < 24*time.Hour-time.Second {
				t.Fatalf("an SVID was cut to %s", left)
			}
			svid, err := w.SignJWT(ctx, id(t, "/machine/m"), []string{"b"}, 0)
			if err != nil {
				t.Fatal(err)
			}
			verify(t, w, chain, svid.Token)
			time.Sleep(ca.DefaultJWTTTL)
			verify(t, w, chain, svid.Token)
			issuers[chain[1].Subject.CommonName], kids[header(t, svid.Token)] = true, true
			time.Sleep(3*time.Hour - time.Minute)
			if n := len(w.Bundle().JWTAuthorities); n > 2 {
				t.Fatalf("%d JWT keys in the bundle", n)
			}
		}
		cancel()
		run.Wait()
		if len(issuers) != 7 || len(kids) != 7 { // every 15 days
			t.Errorf("%d issuing and %d JWT keys in 100 days, want 7", len(issuers), len(kids))
		}
		if got := w.meter.get(); got["ca_rotation_failures step prepare"] != 0 || got["ca_rotation_steps step retire"] != 6 {
			t.Errorf("counts: %v", got)
		}
		if st := w.Status(); len(st.Keys) > 3+2+8 {
			t.Errorf("a status of %d keys", len(st.Keys))
		}
	})
}

// TestAServerThatSleptGetsNewKeysAtOnce is off for longer than its keys live.
func TestAServerThatSleptGetsNewKeysAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, func(c *ca.Config) { c.Now = time.Now })
		take(t, w.Prepare, "prepare")
		_, old := sign(t, w)
		time.Sleep(40 * 24 * time.Hour)
		w.reopen(t)
		_, err := w.SignX509(t.Context(), id(t, "/service/a"), newKey(t).Public(), 0, ca.SignOptions{})
		wantRefusal(t, err, ca.ErrExpired)
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = w.Run(ctx) })
		synctest.Wait()
		if _, token := sign(t, w); header(t, token) == header(t, old) {
			t.Error("the old key signs")
		}
		if got := w.meter.get()["ca_rotation_steps step replace"]; got != 1 {
			t.Errorf("replaced %d times", got)
		}
		cancel()
		run.Wait()
	})
}

// TestRunTriesAgain has a full disk at the time of rotation.
func TestRunTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, func(c *ca.Config) { c.Now = time.Now })
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = w.Run(ctx) })
		w.store.Fail(errors.New("disk full"))
		time.Sleep(ca.DefaultIssuingTTL/2 + time.Hour)
		failed := w.meter.get()["ca_rotation_failures step prepare"]
		if failed < 55 || failed > 65 || !strings.Contains(w.log.String(), "key rotation failed") {
			t.Errorf("%d failures in an hour, want one a minute, logged", failed)
		}
		sign(t, w) // meanwhile it signs
		w.store.Fail(nil)
		time.Sleep(time.Hour)
		if got := states(w.Status()); got["x509 retired"] != 1 || got["x509 active"] != 1 {
			t.Errorf("keys: %v", got)
		}
		cancel()
		run.Wait()
	})
}

// TestRunLeavesAHandsRotationToIt until half of the life of the active keys is over.
func TestRunLeavesAHandsRotationToIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, func(c *ca.Config) { c.Now = time.Now })
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = w.Run(ctx) })
		time.Sleep(10 * 24 * time.Hour)
		take(t, w.Prepare, "prepare")
		time.Sleep(4 * 24 * time.Hour)
		if got := states(w.Status()); got["jwt prepared"] != 1 {
			t.Errorf("keys: %v", got)
		}
		time.Sleep(25 * time.Hour)
		if got := states(w.Status()); got["jwt prepared"] != 0 || got["jwt retired"] != 1 || got["jwt active"] != 1 {
			t.Errorf("keys: %v", got)
		}
		cancel()
		run.Wait()
	})
}

// TestSigningWhileRotating runs both at once, for the race detector.
func TestSigningWhileRotating(t *testing.T) {
	w := open(t)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := w.SignJWT(t.Context(), id(t, "/service/a"), []string{"b"}, 0); err != nil {
					t.Error(err)
					return
				}
				_, _ = w.Status(), w.Changed()
			}
		})
	}
	for range 5 {
		take(t, w.Prepare, "prepare")
		take(t, w.Publish, "publish")
		w.clock.add(ca.DefaultRefreshHint)
		take(t, w.Activate, "activate")
		w.clock.add(ca.DefaultJWTTTL + ca.Leeway)
		take(t, w.Retire, "retire")
	}
	close(stop)
	all.Wait()
}
