package ca_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestAnEmptyStoreIsGivenKeysThatSignAtOnce(t *testing.T) {
	w := open(t)
	if d := cmp.Diff(map[string]int{"root active": 1, "x509 active": 1, "jwt active": 1}, states(w.Status())); d != "" {
		t.Errorf("keys (-want +got):\n%s", d)
	}
	b := w.Bundle()
	if b.TrustDomain != domain || len(b.X509Authorities) != 1 || len(b.JWTAuthorities) != 1 || b.Sequence == 0 || b.RefreshHint != ca.DefaultRefreshHint {
		t.Errorf("bundle: %+v", b)
	}
	if root := b.X509Authorities[0]; !root.IsCA || root.CheckSignatureFrom(root) != nil || root.URIs[0].String() != "spiffe://example.org" {
		t.Errorf("root: %+v", root)
	}
	if recs := w.store.Records(); len(recs) != 1 || recs[0].Action != "ca.create" || recs[0].Detail["root"] == "" {
		t.Errorf("audit records: %+v", recs)
	}
	if _, err := w.SignX509(t.Context(), id(t, "/service/a"), newKey(t).Public(), 0, ca.SignOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := w.SignJWT(t.Context(), id(t, "/service/a"), []string{"b"}, 0); err != nil {
		t.Error(err)
	}
}

func TestKeysSurviveAReopen(t *testing.T) {
	w := open(t)
	before, status := w.Bundle(), w.Status()
	token, err := w.SignJWT(t.Context(), id(t, "/service/a"), []string{"b"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.reopen(t)
	if d := cmp.Diff(status, w.Status()); d != "" {
		t.Errorf("status (-before +after):\n%s", d)
	}
	if !before.X509Authorities[0].Equal(w.Bundle().X509Authorities[0]) || before.Sequence != w.Bundle().Sequence {
		t.Error("the bundle is another after a reopen")
	}
	if _, err := ca.VerifyJWT(w.Bundle(), token.Token, "b", start); err != nil {
		t.Error(err)
	}
	if n := len(w.store.Records()); n != 1 {
		t.Errorf("a reopen wrote %d audit records", n-1)
	}
}

func TestOpenRefusesWhatCannotWork(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*ca.Config)
		want *refusal.Error
	}{
		"no trust domain":          {func(c *ca.Config) { c.TrustDomain = "" }, ca.ErrConfig},
		"malformed trust domain":   {func(c *ca.Config) { c.TrustDomain = "Example.org" }, ca.ErrConfig},
		"no store":                 {func(c *ca.Config) { c.Store = nil }, ca.ErrConfig},
		"no KEK":                   {func(c *ca.Config) { c.KEK = nil }, ca.ErrConfig},
		"short KEK":                {func(c *ca.Config) { c.KEK = make([]byte, 16) }, ca.ErrConfig},
		"server elsewhere":         {func(c *ca.Config) { c.ServerID, _ = identity.ParseID("spiffe://other.org/server") }, ca.ErrConfig},
		"server without path":      {func(c *ca.Config) { c.ServerID = domain.ID() }, ca.ErrConfig},
		"negative SVID":            {func(c *ca.Config) { c.SVIDTTL = -time.Hour }, ca.ErrLifetimes},
		"SVID of a second":         {func(c *ca.Config) { c.SVIDTTL = time.Second }, ca.ErrLifetimes},
		"agents below workloads":   {func(c *ca.Config) { c.SVIDTTL, c.AgentTTL = 2*time.Hour, time.Hour }, ca.ErrLifetimes},
		"issuing below SVIDs":      {func(c *ca.Config) { c.IssuingTTL = 47 * time.Hour }, ca.ErrLifetimes},
		"issuing of two SVIDs":     {func(c *ca.Config) { c.IssuingTTL = 48 * time.Hour }, ca.ErrLifetimes}, // no time to rotate
		"issuing below JWTs":       {func(c *ca.Config) { c.JWTTTL = 400 * time.Hour }, ca.ErrLifetimes},
		"hint above issuing":       {func(c *ca.Config) { c.RefreshHint = 15 * 24 * time.Hour }, ca.ErrLifetimes},
		"root below issuing":       {func(c *ca.Config) { c.RootTTL = 59 * 24 * time.Hour }, ca.ErrLifetimes},
		"root beyond all reason":   {func(c *ca.Config) { c.RootTTL = 200 * 365 * 24 * time.Hour }, ca.ErrLifetimes},
		"issuing close to forever": {func(c *ca.Config) { c.IssuingTTL = 1<<63 - 1 }, ca.ErrLifetimes},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := ca.Config{TrustDomain: domain, Store: &catest.Store{}, KEK: kek}
			c.edit(&cfg)
			_, err := ca.Open(t.Context(), cfg)
			wantRefusal(t, err, c.want)
			if s, ok := cfg.Store.(*catest.Store); ok && len(s.Records()) != 0 {
				t.Error("it made keys all the same")
			}
		})
	}
}

func TestAWrongKEKIsSaidToBeOne(t *testing.T) {
	w := open(t)
	w.cfg.KEK = bytes.Repeat([]byte{8}, 32)
	_, err := ca.Open(t.Context(), w.cfg)
	wantRefusal(t, err, ca.ErrWrongKEK)
}

// TestDamageIsFound changes the store behind the authority's back, one thing at a time.
func TestDamageIsFound(t *testing.T) {
	other := open(t)
	foreign, err := other.store.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pick := func(keys []ca.KeyRecord, use ca.Use) *ca.KeyRecord {
		for i := range keys {
			if keys[i].Use == use {
				return &keys[i]
			}
		}
		panic("none")
	}
	for name, damage := range map[string]func([]ca.KeyRecord) []ca.KeyRecord{
		"sealed bit of root": func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.Root).Sealed[20] ^= 1; return k },
		"sealed bit of jwt":  func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.JWT).Sealed[20] ^= 1; return k },
		"sealed cut":         func(k []ca.KeyRecord) []ca.KeyRecord { r := pick(k, ca.X509); r.Sealed = r.Sealed[:5]; return k },
		"sealed lost":        func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.X509).Sealed = nil; return k },
		"sealed swapped": func(k []ca.KeyRecord) []ca.KeyRecord {
			x, j := pick(k, ca.X509), pick(k, ca.JWT)
			x.Sealed, j.Sealed = j.Sealed, x.Sealed
			return k
		},
		"certificate cut": func(k []ca.KeyRecord) []ca.KeyRecord {
			r := pick(k, ca.X509)
			r.Certificate = r.Certificate[:50]
			return k
		},
		"certificate by another": func(k []ca.KeyRecord) []ca.KeyRecord {
			pick(k, ca.X509).Certificate = pick(foreign, ca.X509).Certificate
			return k
		},
		"root by another": func(k []ca.KeyRecord) []ca.KeyRecord {
			pick(k, ca.Root).Certificate = pick(foreign, ca.Root).Certificate
			return k
		},
		"root in issuing's place": func(k []ca.KeyRecord) []ca.KeyRecord {
			pick(k, ca.X509).Certificate = pick(k, ca.Root).Certificate
			return k
		},
		"certificate by a root of another's making": func(k []ca.KeyRecord) []ca.KeyRecord {
			rec := pick(k, ca.X509)
			rec.Certificate = resign(t, rec.Certificate)
			return k
		},
		"jwt key by another": func(k []ca.KeyRecord) []ca.KeyRecord {
			pick(k, ca.JWT).Certificate = pick(foreign, ca.JWT).Certificate
			return k
		},
		"jwt key no key": func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.JWT).Certificate = []byte("x"); return k },
		"validity stretched": func(k []ca.KeyRecord) []ca.KeyRecord {
			r := pick(k, ca.X509)
			r.NotAfter = r.NotAfter.Add(time.Hour)
			return k
		},
		"unknown state":     func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.X509).State = "asleep"; return k },
		"unknown use":       func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.X509).Use = "ssh"; return k },
		"no active issuing": func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.X509).State = ca.Superseded; return k },
		"no root":           func(k []ca.KeyRecord) []ca.KeyRecord { pick(k, ca.Root).State = ca.Retired; return k },
		"root gone":         func(k []ca.KeyRecord) []ca.KeyRecord { *pick(k, ca.Root) = *pick(k, ca.JWT); return k },
		"two roots":         func(k []ca.KeyRecord) []ca.KeyRecord { return append(k, *pick(k, ca.Root)) },
		"two active":        func(k []ca.KeyRecord) []ca.KeyRecord { return append(k, *pick(k, ca.JWT)) },
		"next without its pair": func(k []ca.KeyRecord) []ca.KeyRecord {
			next := *pick(k, ca.JWT)
			next.State = ca.Published
			return append(k, next)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := open(t)
			keys, err := w.store.Keys(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			w.cfg.Store = fixed(damage(keys))
			_, err = ca.Open(t.Context(), w.cfg)
			wantRefusal(t, err, ca.ErrCorruptKey)
		})
	}
}

// resign returns the same certificate, for the same key, signed by a stranger under the same name.
func resign(t *testing.T, der []byte) []byte {
	t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{RawSubject: cert.RawIssuer, SubjectKeyId: cert.AuthorityKeyId}
	der, err = x509.CreateCertificate(rand.Reader, cert, root, cert.PublicKey, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// fixed is a store whose content a test has chosen.
type fixed []ca.KeyRecord

func (f fixed) Keys(context.Context) ([]ca.KeyRecord, error) { return f, nil }

func (f fixed) PutKeys(context.Context, []ca.KeyRecord, event.Record) error {
	return errors.New("read only")
}

func TestAnotherTrustDomainsKeysAreRefused(t *testing.T) {
	w := open(t)
	w.cfg.TrustDomain = "other.org"
	_, err := ca.Open(t.Context(), w.cfg)
	wantRefusal(t, err, ca.ErrForeignKey)
}

func TestAStoreThatFailsFailsOpen(t *testing.T) {
	w := open(t)
	full := errors.New("disk full")
	empty := &catest.Store{}
	empty.Fail(full)
	w.cfg.Store = empty
	if _, err := ca.Open(t.Context(), w.cfg); !errors.Is(err, full) {
		t.Errorf("Open on a store that cannot write: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.cfg.Store = &catest.Store{}
	if _, err := ca.Open(ctx, w.cfg); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with a context that has ended: %v", err)
	}
}

// TestNoSecretLeaves looks for private keys and the KEK in everything that the authority shows.
func TestNoSecretLeaves(t *testing.T) {
	w := open(t)
	take(t, w.Prepare, "prepare")
	status, err := json.Marshal(w.Status())
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := json.Marshal(w.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	records, err := json.Marshal(w.store.Records())
	if err != nil {
		t.Fatal(err)
	}
	keys, err := w.store.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	shown := strings.Join([]string{w.log.String(), string(status), string(bundle), string(records)}, "\n")
	for _, k := range keys {
		// What is stored is no key: it parses as none.
		if _, err := x509.ParsePKCS8PrivateKey(k.Sealed); err == nil || bytes.Contains(k.Sealed, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01}) {
			t.Errorf("%s key is stored unsealed", k.Use)
		}
		if strings.Contains(shown, base64.StdEncoding.EncodeToString(k.Sealed)[:20]) {
			t.Error("a sealed key is shown")
		}
	}
	for _, form := range []string{hex.EncodeToString(kek), base64.StdEncoding.EncodeToString(kek), fmt.Sprint(string(kek)), string(kek)} {
		if strings.Contains(shown, form) || strings.Contains(fmt.Sprintf("%+v %#v", w.Authority, w.Authority), form) {
			t.Error("the KEK is shown")
		}
	}
	if strings.Contains(string(bundle), `"d":`) {
		t.Error("the bundle has a private key")
	}
}
