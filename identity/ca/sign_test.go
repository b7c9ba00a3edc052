package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestAnX509SVIDKeepsTheProfile(t *testing.T) {
	w := open(t)
	k := newKey(t)
	chain, err := w.SignX509(t.Context(), id(t, "/service/orders"), k.Public(), 0, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 {
		t.Fatalf("the chain has %d certificates, want leaf and issuing", len(chain))
	}
	leaf, issuing := chain[0], chain[1]
	if got, err := identity.IDFromCertificate(leaf); err != nil || got != id(t, "/service/orders") {
		t.Errorf("ID %v, %v", got, err)
	}
	type profile struct {
		URIs, DNS, IPs, Emails int
		CA, Constraints        bool
		Usage                  x509.KeyUsage
		Extended               []x509.ExtKeyUsage
		Subject                string
	}
	want := profile{
		URIs: 1, Constraints: true, Usage: x509.KeyUsageDigitalSignature,
		Extended: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	got := profile{
		len(leaf.URIs), len(leaf.DNSNames), len(leaf.IPAddresses), len(leaf.EmailAddresses),
		leaf.IsCA, leaf.BasicConstraintsValid, leaf.KeyUsage, leaf.ExtKeyUsage, leaf.Subject.String(),
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("profile (-want +got):\n%s", d)
	}
	if !leaf.NotBefore.Equal(start.Add(-ca.Backdate)) || !leaf.NotAfter.Equal(start.Add(time.Hour)) {
		t.Errorf("valid from %s to %s", leaf.NotBefore, leaf.NotAfter)
	}
	if bits := leaf.SerialNumber.BitLen(); bits < 64 || bits > 128 || leaf.SerialNumber.Sign() <= 0 {
		t.Errorf("the serial number has %d bits", bits)
	}
	if issuing.URIs[0].String() != "spiffe://example.org" || !issuing.IsCA || !issuing.MaxPathLenZero {
		t.Errorf("issuing certificate: %+v", issuing)
	}
	opts := x509.VerifyOptions{
		Roots: w.Bundle().Pool(), Intermediates: x509.NewCertPool(), CurrentTime: start,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if _, err := leaf.Verify(opts); err == nil {
		t.Error("the leaf verifies without its issuing certificate: the bundle has more than the root")
	}
	opts.Intermediates.AddCert(issuing)
	if _, err := leaf.Verify(opts); err != nil {
		t.Error(err)
	}
	if got := w.meter.get()["ca_svids_signed kind x509"]; got != 1 {
		t.Errorf("counted %d SVIDs", got)
	}
}

func TestSerialsAndIssuingNamesAreNeverTheSame(t *testing.T) {
	w := open(t)
	k := newKey(t)
	seen := map[string]bool{}
	for range 50 {
		chain, err := w.SignX509(t.Context(), id(t, "/service/a"), k.Public(), 0, ca.SignOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if s := chain[0].SerialNumber.String(); seen[s] {
			t.Fatal("a serial number came twice")
		} else {
			seen[s] = true
		}
	}
}

// TestGoSPIFFETakesTheChain asks SPIFFE's own library, which shares no code with ours.
func TestGoSPIFFETakesTheChain(t *testing.T) {
	w := open(t, func(c *ca.Config) { c.Now = time.Now }) // the library has no other clock
	chain, err := w.SignX509(t.Context(), id(t, "/service/orders"), newKey(t).Public(), 0, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString(domain.String())
	got, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(td, w.Bundle().X509Authorities))
	if err != nil || got.String() != "spiffe://example.org/service/orders" {
		t.Errorf("%v, %v", got, err)
	}
}

// TestOpenSSLTakesTheChain asks OpenSSL, in strict mode and for both ends of TLS.
func TestOpenSSLTakesTheChain(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	w := open(t, func(c *ca.Config) { c.Now = time.Now })
	dir := t.TempDir()
	file := func(name string, certs ...*x509.Certificate) string {
		var b bytes.Buffer
		for _, c := range certs {
			if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := file("root.pem", w.Bundle().X509Authorities...)
	verify := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), openssl, append([]string{"verify", "-x509_strict", "-check_ss_sig", "-CAfile", root}, args...)...).CombinedOutput()
		return string(out), err
	}
	for name, c := range map[string]struct {
		id   identity.ID
		opts ca.SignOptions
		args []string
	}{
		"workload": {id: id(t, "/service/orders")},
		"server": {
			id(t, "/server"),
			ca.SignOptions{DNSNames: []string{"redoubt.example.org"}, Addresses: []netip.Addr{netip.MustParseAddr("::1")}},
			[]string{"-verify_hostname", "redoubt.example.org", "-verify_ip", "::1"},
		},
	} {
		chain, err := w.SignX509(t.Context(), c.id, newKey(t).Public(), 0, c.opts)
		if err != nil {
			t.Fatal(err)
		}
		leaf, issuing := file(name+".pem", chain[0]), file(name+"-issuing.pem", chain[1])
		for _, purpose := range []string{"sslserver", "sslclient"} {
			args := append(c.args, "-purpose", purpose, "-untrusted", issuing, leaf)
			if out, err := verify(args...); err != nil {
				t.Errorf("openssl verify %s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
		if out, err := verify("-purpose", "sslserver", leaf); err == nil {
			t.Errorf("openssl verified without the issuing certificate: %s", out)
		}
	}
}

func TestSigningRefuses(t *testing.T) {
	w := open(t)
	good := newKey(t).Public()
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := identity.ParseID("spiffe://other.org/service/a")
	if err != nil {
		t.Fatal(err)
	}
	mine, server := id(t, "/service/a"), id(t, "/server")
	for name, c := range map[string]struct {
		id   identity.ID
		pub  crypto.PublicKey
		ttl  time.Duration
		opts ca.SignOptions
		want *refusal.Error
	}{
		"no ID":                {identity.ID{}, good, 0, ca.SignOptions{}, ca.ErrForeignID},
		"the trust domain":     {domain.ID(), good, 0, ca.SignOptions{}, ca.ErrForeignID},
		"another trust domain": {other, good, 0, ca.SignOptions{}, ca.ErrForeignID},
		"no key":               {mine, nil, 0, ca.SignOptions{}, ca.ErrWeakKey},
		"nil key":              {mine, (*ecdsa.PublicKey)(nil), 0, ca.SignOptions{}, ca.ErrWeakKey},
		"P-224":                {mine, p224.Public(), 0, ca.SignOptions{}, ca.ErrWeakKey},
		"RSA":                  {mine, rsaKey.Public(), 0, ca.SignOptions{}, ca.ErrWeakKey},
		"P-521":                {mine, p521.Public(), 0, ca.SignOptions{}, ca.ErrWeakKey},
		"Ed25519":              {mine, edKey, 0, ca.SignOptions{}, ca.ErrWeakKey},
		"off the curve":        {mine, &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, 0, ca.SignOptions{}, ca.ErrWeakKey}, //nolint:staticcheck // a key that is none can be made in no other way
		"too long":             {mine, good, 24*time.Hour + time.Second, ca.SignOptions{}, ca.ErrTTL},
		"too short":            {mine, good, time.Second, ca.SignOptions{}, ca.ErrTTL},
		"negative":             {mine, good, -time.Hour, ca.SignOptions{}, ca.ErrTTL},
		"a workload's name":    {mine, good, 0, ca.SignOptions{DNSNames: []string{"bank.example"}}, ca.ErrNames},
		"a workload's address": {mine, good, 0, ca.SignOptions{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}, ca.ErrNames},
		"wildcard":             {server, good, 0, ca.SignOptions{DNSNames: []string{"*.example.org"}}, ca.ErrNames},
		"no host name":         {server, good, 0, ca.SignOptions{DNSNames: []string{"a b"}}, ca.ErrNames},
		"empty name":           {server, good, 0, ca.SignOptions{DNSNames: []string{""}}, ca.ErrNames},
		"unspecified address":  {server, good, 0, ca.SignOptions{Addresses: []netip.Addr{netip.IPv4Unspecified()}}, ca.ErrNames},
		"invalid address":      {server, good, 0, ca.SignOptions{Addresses: []netip.Addr{{}}}, ca.ErrNames},
		"too many addresses":   {server, good, 0, ca.SignOptions{Addresses: slices.Repeat([]netip.Addr{netip.MustParseAddr("10.0.0.1")}, 33)}, ca.ErrNames},
		"too many names":       {server, good, 0, ca.SignOptions{DNSNames: strings.Split(strings.Repeat("a,", 32)+"a", ",")}, ca.ErrNames},
	} {
		t.Run(name, func(t *testing.T) {
			before := w.meter.get()["ca_refused code "+c.want.Code]
			chain, err := w.SignX509(t.Context(), c.id, c.pub, c.ttl, c.opts)
			wantRefusal(t, err, c.want)
			if chain != nil {
				t.Error("it signed all the same")
			}
			if got := w.meter.get()["ca_refused code "+c.want.Code]; got != before+1 {
				t.Errorf("counted %d refusals, want %d", got, before+1)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.SignX509(ctx, mine, good, 0, ca.SignOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

func TestTheServersCertificateHasNames(t *testing.T) {
	w := open(t)
	chain, err := w.SignX509(t.Context(), id(t, "/server"), newKey(t).Public(), 0, ca.SignOptions{
		DNSNames:  []string{"localhost", "redoubt.example.org"},
		Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::ffff:10.0.0.1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "redoubt.example.org", "127.0.0.1", "10.0.0.1"} {
		if err := chain[0].VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if len(chain[0].URIs) != 1 {
		t.Error("names must stand beside the one URI SAN")
	}
}

// TestAClockThatIsOffIsSaid sets the clock two hours back, and beyond the end of the issuing certificate.
func TestAClockThatIsOffIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		at   time.Time
		want *refusal.Error
	}{
		"two hours back":             {start.Add(-2 * time.Hour), ca.ErrNotYetValid},
		"two hours beyond its end":   {start.Add(ca.DefaultIssuingTTL + 2*time.Hour), ca.ErrExpired},
		"ten minutes before its end": {start.Add(ca.DefaultIssuingTTL - 10*time.Minute), ca.ErrTooShort},
	} {
		t.Run(name, func(t *testing.T) {
			w := open(t)
			w.clock.set(c.at)
			_, err := w.SignX509(t.Context(), id(t, "/service/a"), newKey(t).Public(), 0, ca.SignOptions{})
			wantRefusal(t, err, c.want)
			if e := refusal.As(err); e.Kind != refusal.Unavailable || !strings.Contains(e.Do, "rotate the keys") {
				t.Errorf("refusal: %v", err)
			}
			if c.want != ca.ErrTooShort {
				_, err = w.SignJWT(t.Context(), id(t, "/service/a"), []string{"b"}, 0)
				wantRefusal(t, err, c.want)
				w.reopen(t) // it must not keep the server from starting
			}
			if len(w.Status().Problems) == 0 {
				t.Error("the status says nothing of it")
			}
		})
	}
	t.Run("two hours ahead", func(t *testing.T) { // within all lifetimes: nobody can tell, and nothing is refused
		w := open(t)
		w.clock.add(2 * time.Hour)
		if _, err := w.SignX509(t.Context(), id(t, "/service/a"), newKey(t).Public(), 0, ca.SignOptions{}); err != nil {
			t.Error(err)
		}
	})
}

func TestOnlyTheKeyIsTakenFromARequest(t *testing.T) {
	k := newKey(t)
	other, err := url.Parse("spiffe://example.org/service/admin")
	if err != nil {
		t.Fatal(err)
	}
	der := makeCSR(t, k, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin"}, URIs: []*url.URL{other}, DNSNames: []string{"bank.example"}, IPAddresses: []net.IP{{10, 0, 0, 1}},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}, // CA:TRUE
	})
	pub, err := ca.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	if !k.PublicKey.Equal(pub) {
		t.Error("the key is another")
	}
	w := open(t)
	chain, err := w.SignX509(t.Context(), id(t, "/service/a"), pub, 0, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	if leaf.IsCA || len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://example.org/service/a" || leaf.DNSNames != nil || leaf.Subject.CommonName != "" {
		t.Errorf("the request's names got into %+v", leaf)
	}
}

func TestParseCSRRefuses(t *testing.T) {
	k := newKey(t)
	good := makeCSR(t, k, &x509.CertificateRequest{})
	if _, err := ca.ParseCSR(good); err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.ParseCSR(makeCSR(t, p384, &x509.CertificateRequest{})); err != nil {
		t.Errorf("P-384: %v", err)
	}
	// A thief's request, with the victim's public key in the place of its own.
	stolen := bytes.Replace(good, point(t, k), point(t, newKey(t)), 1)
	unproven := bytes.Clone(good)
	unproven[len(unproven)-1] ^= 1
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		der  []byte
		want *refusal.Error
	}{
		"nothing":           {nil, ca.ErrMalformedCSR},
		"garbage":           {[]byte("-----BEGIN CERTIFICATE REQUEST-----"), ca.ErrMalformedCSR},
		"trailing bytes":    {append(bytes.Clone(good), 0), ca.ErrMalformedCSR},
		"too large":         {makeCSR(t, k, &x509.CertificateRequest{DNSNames: []string{strings.Repeat("a", 16<<10)}}), ca.ErrMalformedCSR},
		"signature changed": {unproven, ca.ErrUnprovenKey},
		"RSA":               {makeCSR(t, rsaKey, &x509.CertificateRequest{}), ca.ErrWeakKey},
		"P-224":             {makeCSR(t, p224, &x509.CertificateRequest{}), ca.ErrWeakKey},
		"another's key":     {stolen, ca.ErrUnprovenKey},
		"SHA-1":             {makeCSR(t, k, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA1}), ca.ErrUnprovenKey},
	} {
		t.Run(name, func(t *testing.T) {
			pub, err := ca.ParseCSR(c.der)
			wantRefusal(t, err, c.want)
			if pub != nil {
				t.Error("it gave a key all the same")
			}
		})
	}
}

// point returns the public point as it stands in a request: uncompressed (SEC 1, 2.3.3).
func point(t testing.TB, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	pub, err := k.PublicKey.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	return pub.Bytes()
}
