package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
)

// TestNothingUnverifiedIsHandedOut has the checks look at leaves that differ from what was to be signed in one thing.
func TestNothingUnverifiedIsHandedOut(t *testing.T) {
	td := identity.TrustDomain("example.org")
	id, err := identity.MakeID(td, "/service/a")
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSealer(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	life := rootSpan(now, 30*24*time.Hour)
	rec, signer, err := s.newRoot(td, now, life)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := x509.ParseCertificate(rec.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	_, otherSigner, err := s.newRoot(td, now, life)
	if err != nil {
		t.Fatal(err)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leafLife, err := within(life, now, time.Hour, time.Hour, "leaf", "issuer")
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(leaf, parent *x509.Certificate){
		"":                     func(_, _ *x509.Certificate) {},
		"exactly one URI SAN":  func(l, _ *x509.Certificate) { l.URIs = append(l.URIs, id.URL()) },
		"it names spiffe":      func(l, _ *x509.Certificate) { l.URIs = []*url.URL{td.ID().URL()} },
		"CA certificate":       func(l, _ *x509.Certificate) { l.IsCA = true },
		"must allow digital":   func(l, _ *x509.Certificate) { l.KeyUsage = x509.KeyUsageKeyAgreement },
		"may not sign":         func(l, _ *x509.Certificate) { l.KeyUsage |= x509.KeyUsageCertSign },
		"period of validity":   func(l, _ *x509.Certificate) { l.NotAfter = l.NotAfter.Add(time.Hour) },
		"extended key usage":   func(l, _ *x509.Certificate) { l.ExtKeyUsage = nil },
		"names another issuer": func(_, p *x509.Certificate) { p.RawSubject = nil; p.Subject.CommonName = "another" },
	} {
		leaf := &x509.Certificate{
			SerialNumber: newSerial(), URIs: []*url.URL{id.URL()}, NotBefore: leafLife.notBefore, NotAfter: leafLife.notAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		parent := *issuer
		edit(leaf, &parent)
		der, err := x509.CreateCertificate(rand.Reader, leaf, &parent, k.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		got, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		err = checkLeaf(got, issuer, id, k.Public(), leafLife)
		if name == "" && err != nil || name != "" && (err == nil || !strings.Contains(err.Error(), name)) {
			t.Errorf("%q: got %v", name, err)
		}
		if name == "" {
			if err := checkLeaf(got, issuer, id, otherSigner.Public(), leafLife); err == nil {
				t.Error("a leaf for another key passed")
			}
			short := *issuer
			short.NotAfter = got.NotAfter.Add(-time.Second)
			if err := checkLeaf(got, &short, id, k.Public(), leafLife); err == nil {
				t.Error("a leaf that outlives its issuer passed")
			}
		}
	}
}

// TestAFaultySignerHandsOutNothing gives the authority an issuing and a JWT key whose private halves are others.
func TestAFaultySignerHandsOutNothing(t *testing.T) {
	now := time.Now()
	s, err := newSealer(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	td := identity.TrustDomain("example.org")
	cfg := Config{TrustDomain: td, KEK: make([]byte, 32), Store: nopStore{}}
	if err := cfg.check(); err != nil {
		t.Fatal(err)
	}
	a := &Authority{cfg: cfg, sealer: s, now: func() time.Time { return now }, meter: cfg.Meter, log: cfg.Logger}
	records, err := a.create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.newRing(td, records, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// The public half stays right, so that nothing but a look at the signature can tell.
	for _, k := range r.keys {
		faulty := *wrong
		faulty.PublicKey = k.private.PublicKey
		k.private = &faulty
	}
	a.current.Store(r)
	id, err := identity.MakeID(td, "/service/a")
	if err != nil {
		t.Fatal(err)
	}
	if chain, err := a.SignX509(t.Context(), id, wrong.Public(), 0, SignOptions{}); err == nil || chain != nil {
		t.Error("a certificate with a wrong signature was handed out")
	}
	if svid, err := a.SignJWT(t.Context(), id, []string{"b"}, 0); err == nil || svid != nil {
		t.Error("a token with a wrong signature was handed out")
	}
}

// TestASealedKeyIsBoundToItsRecord puts one key in the place of another, and one use in the place of another.
func TestASealedKeyIsBoundToItsRecord(t *testing.T) {
	s, err := newSealer(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	rec := KeyRecord{ID: "k-1", Use: X509}
	rec.Sealed = s.seal(rec, []byte("private"))
	if got, err := s.open(rec); err != nil || string(got) != "private" {
		t.Fatalf("%q, %v", got, err)
	}
	for _, other := range []KeyRecord{{ID: "k-2", Use: X509}, {ID: "k-1", Use: Root}} {
		other.Sealed = rec.Sealed
		if _, err := s.open(other); err == nil {
			t.Errorf("the key opened as %s %s", other.Use, other.ID)
		}
	}
}

// nopStore keeps nothing.
type nopStore struct{}

func (nopStore) Keys(context.Context) ([]KeyRecord, error) { return nil, nil }

func (nopStore) PutKeys(context.Context, []KeyRecord, event.Record) error { return nil }
