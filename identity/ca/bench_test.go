package ca_test

import (
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func FuzzParseCSR(f *testing.F) {
	k := newKey(f)
	f.Add(makeCSR(f, k, &x509.CertificateRequest{}))
	f.Add(makeCSR(f, k, &x509.CertificateRequest{DNSNames: []string{"a"}, URIs: []*url.URL{domain.ID().URL()}}))
	f.Add([]byte{0x30, 0x80})
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, der []byte) {
		pub, err := ca.ParseCSR(der)
		if (pub == nil) == (err == nil) {
			t.Fatalf("key %v, error %v", pub, err)
		}
		if err != nil && refusal.As(err) == nil {
			t.Fatalf("no refusal: %v", err)
		}
		if err == nil {
			if csr, err := x509.ParseCertificateRequest(der); err != nil || csr.CheckSignature() != nil {
				t.Fatal("it took a key without proof")
			}
		}
	})
}

// BenchmarkSVID compares the whole way from a request to an SVID's bytes with the signing of a certificate alone: what
// is above 1 is the price of the proof of possession (one verification), and of checking what was signed.
//
// Bare creation already has one signature and one verification; a request adds one verification.
func BenchmarkSVID(b *testing.B) {
	w := open(b, func(c *ca.Config) { c.Now = time.Now })
	k, mine := newKey(b), id(b, "/service/orders")
	csr := makeCSR(b, k, &x509.CertificateRequest{})
	var ratio struct{ ours, bare float64 }
	b.Run("CSR to bytes", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			pub, err := ca.ParseCSR(csr)
			if err != nil {
				b.Fatal(err)
			}
			chain, err := w.SignX509(b.Context(), mine, pub, 0, ca.SignOptions{})
			if err != nil || len(chain[0].Raw) == 0 {
				b.Fatal(err)
			}
		}
		ratio.ours = float64(b.Elapsed()) / float64(b.N)
	})
	b.Run("bare CreateCertificate", func(b *testing.B) {
		b.ReportAllocs()
		signer := newKey(b)
		parent := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1}}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(2), URIs: []*url.URL{mine.URL()}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		for b.Loop() {
			if _, err := x509.CreateCertificate(rand.Reader, template, parent, k.Public(), signer); err != nil {
				b.Fatal(err)
			}
		}
		ratio.bare = float64(b.Elapsed()) / float64(b.N)
		if ratio.ours > 0 {
			b.ReportMetric(ratio.ours/ratio.bare, "ratio")
		}
	})
}

func BenchmarkSignJWT(b *testing.B) {
	w := open(b, func(c *ca.Config) { c.Now = time.Now })
	mine := id(b, "/service/orders")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := w.SignJWT(b.Context(), mine, []string{"ledger"}, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyJWT(b *testing.B) {
	w := open(b, func(c *ca.Config) { c.Now = time.Now })
	svid, err := w.SignJWT(b.Context(), id(b, "/service/orders"), []string{"ledger"}, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ca.VerifyJWT(w.Bundle(), svid.Token, "ledger", time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
