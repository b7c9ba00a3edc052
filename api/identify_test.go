package api_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestCredentials(t *testing.T) {
	secret, hash := api.NewCredential()
	other, _ := api.NewCredential()
	if len(secret) != 4+43 || secret == other || strings.Contains(hash, secret) || api.HashCredential(secret) != hash {
		t.Errorf("credential %q, hash %q", secret, hash)
	}
	c, err := api.NewCredentials(map[string]string{"operator": hash, "second": api.HashCredential(other)})
	if err != nil {
		t.Fatal(err)
	}
	for given, want := range map[string]string{secret: "operator", other: "second", "": "", secret + "x": "", secret[:46]: "", hash: ""} {
		if name, ok := c.Verify(t.Context(), given); name != want || ok != (want != "") {
			t.Errorf("a credential of %d bytes: %q %v, want %q", len(given), name, ok, want)
		}
	}
	if _, err := api.NewCredentials(map[string]string{"operator": "abc"}); err == nil || strings.Contains(err.Error(), "abc") {
		t.Errorf("a malformed hash: %v", err)
	}
	empty, _ := api.NewCredentials(nil)
	if _, ok := empty.Verify(t.Context(), ""); ok {
		t.Error("a server without operators let somebody in")
	}
}

// Fails if the limit is taken away, and fails if it holds up the right credential.
func TestWrongCredentialsAreLimitedAndTheRightOneNever(t *testing.T) {
	s := serve(t)
	limited := 0
	for range 50 {
		switch got := s.call("GET", "/v1/status", "", "Authorization", "Bearer ro1.wrong"); got.status {
		case 401:
		case 429:
			if p := got.problem(t); p.Code != "too-many-wrong-credentials" || got.header.Get("Retry-After") == "" {
				t.Errorf("%+v", p)
			}
			limited++
		default:
			t.Fatalf("status %d", got.status)
		}
		if got := s.call("GET", "/v1/status", ""); got.status != 200 {
			t.Fatalf("the operator is locked out by somebody at the same address: %d", got.status)
		}
	}
	if limited != 40 {
		t.Errorf("%d of 50 guesses were limited, want 40", limited)
	}
	if n := s.Meter.Of("api_unauthenticated{reason,too-many-wrong-credentials}"); n != 40 {
		t.Errorf("counted %d", n)
	}
}

func TestTwoCredentialsAreNone(t *testing.T) {
	s := serve(t)
	req, _ := http.NewRequest("GET", s.url+"/v1/status", nil)
	req.Header["Authorization"] = []string{"Bearer " + s.Secret, "Bearer " + s.Secret}
	if got := s.send(req); got.status != 401 {
		t.Errorf("two Authorization headers: %d", got.status)
	}
	if got := s.call("GET", "/v1/status", "", "Authorization", "bearer "+s.Secret); got.status != 200 {
		t.Errorf("the scheme is case-insensitive: %d", got.status)
	}
	if got := s.call("GET", "/v1/status?access_token="+s.Secret, "", "Authorization", ""); got.status != 401 {
		t.Errorf("a credential in the query must not count: %d", got.status)
	}
}

// tlsSite serves the API over TLS 1.3 as the roof does: with an SVID of the authority, asking for client certificates.
type tlsSite struct {
	*apitest.House
	url   string
	roots []byte
}

func serveTLS(t testing.TB, change ...func(*api.Config)) *tlsSite {
	t.Helper()
	h := apitest.New(t)
	for _, c := range change {
		c(&h.Config)
	}
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	id, _ := identity.MakeID(apitest.TrustDomain, "/server")
	chain, err := h.Authority.SignX509(t.Context(), id, key.Public(), time.Hour, ca.SignOptions{DNSNames: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h.Handler(t))
	api.Bound(srv.Config)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{chain[0].Raw, chain[1].Raw}, PrivateKey: key}},
	}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	u, _ := url.Parse(srv.URL)
	s := &tlsSite{House: h, url: "https://localhost:" + u.Port()}
	for _, c := range h.Authority.Bundle().X509Authorities {
		s.roots = append(s.roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return s
}

func (s *tlsSite) client(t testing.TB, change func(*client.Config)) *client.Client {
	t.Helper()
	cfg := client.Config{Base: s.url, Roots: s.roots, Credential: client.Credential(s.Secret)}
	if change != nil {
		change(&cfg)
	}
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// join makes a machine of this id, with its key.
func join(t testing.TB, h *apitest.House, id string) (*ecdsa.PrivateKey, fleet.Joined) {
	t.Helper()
	_, secret, err := h.Fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: id}, event.NewRecord("test", "token", id))
	if err != nil {
		t.Fatal(err)
	}
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	joined, err := h.Fleet.Join(t.Context(), fleet.JoinRequest{Secret: secret.Reveal(), Machine: id, CSR: csr, Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	return key, joined
}

func certificate(key *ecdsa.PrivateKey, chain ...*x509.Certificate) *tls.Certificate {
	out := &tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

func TestMachinesAreKnownByTheirSVID(t *testing.T) {
	s := serveTLS(t)
	key, joined := join(t, s.House, "m1")
	s.Engine.Answer(policy.Permit, policy.Enforce)
	as := func(cert *tls.Certificate) (client.Status, error) {
		return s.client(t, func(c *client.Config) { c.Credential, c.Certificate = "", cert }).Status(t.Context())
	}
	if _, err := as(certificate(key, joined.Chain...)); err != nil {
		t.Fatal(err)
	}
	asked := s.Engine.Asked()
	if len(asked) != 1 || asked[0].Principal.UID != (policy.UID{Type: "Machine", ID: "m1"}) || asked[0].Context["machine"] != asked[0].Principal.UID {
		t.Fatalf("asked %+v", asked)
	}
	if v, _, err := builtin(t, s).Decide(t.Context(), &asked[0]); err != nil || v != policy.Deny {
		t.Errorf("the built-in policies on a machine that administers: %v %v", v, err)
	}

	service, _ := identity.MakeID(apitest.TrustDomain, "/service/orders")
	workload, err := s.Authority.SignX509(t.Context(), service, key.Public(), time.Hour, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m1, _ := identity.MakeID(apitest.TrustDomain, "/machine/m1")
	otherKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	otherChain, err := s.Authority.SignX509(t.Context(), m1, otherKey.Public(), time.Hour, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ghost, _ := identity.MakeID(apitest.TrustDomain, "/machine/ghost")
	ghostChain, err := s.Authority.SignX509(t.Context(), ghost, key.Public(), time.Hour, ca.SignOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]*tls.Certificate{
		"a forged one":                    certificate(key, forged(t, key)),
		"a workload's":                    certificate(key, workload...),
		"another key's":                   certificate(otherKey, otherChain...),
		"one of a machine that is no one": certificate(key, ghostChain...),
		"one without the issuing one":     certificate(key, joined.Chain[0]),
	} {
		_, err := as(cert)
		if r := refusal.As(err); r == nil || r.Kind != refusal.Unproven {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Fleet.RevokeMachine(t.Context(), "m1", "stolen", event.NewRecord("test", "revoke", "m1")); err != nil {
		t.Fatal(err)
	}
	if _, err := as(certificate(key, joined.Chain...)); refusal.As(err) == nil || refusal.As(err).Code != fleet.ErrMachineRevoked.Code {
		t.Errorf("a revoked machine: %v", err)
	}
}

func TestExpiredSVIDIsRefused(t *testing.T) {
	now := time.Now()
	s := serveTLS(t, func(c *api.Config) { c.Now = func() time.Time { return now } })
	key, joined := join(t, s.House, "m1")
	s.Engine.Answer(policy.Permit, policy.Enforce)
	c := s.client(t, func(c *client.Config) { c.Credential, c.Certificate = "", certificate(key, joined.Chain...) })
	if _, err := c.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	now = now.Add(25 * time.Hour)
	if _, err := c.Status(t.Context()); refusal.As(err) == nil || refusal.As(err).Code != "wrong-svid" {
		t.Errorf("after its end: %v", err)
	}
}

// anyone is an authority that issued whatever the test says, and machines that are all registered.
type anyone struct {
	machines
	root *x509.Certificate
}

func (a anyone) Bundle() *identity.Bundle {
	return &identity.Bundle{TrustDomain: apitest.TrustDomain, X509Authorities: []*x509.Certificate{a.root}}
}
func (anyone) Authenticate(context.Context, string, string) error { return nil }
func (anyone) Machine(_ context.Context, id string) (fleet.Machine, error) {
	return fleet.Machine{ID: id, State: fleet.MachineJoined}, nil
}

// The authority would issue none of these; what it is that refuses them here is the API alone.
func TestOnlyMachinesOfThisTrustDomain(t *testing.T) {
	rootKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	issue := func(template *x509.Certificate, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
		t.Helper()
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(7), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
		template.BasicConstraintsValid = true
		if parent == nil {
			parent = template
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, rootKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	root := issue(&x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "root"}}, nil, &rootKey.PublicKey)
	s := serveTLS(t, func(c *api.Config) { a := anyone{c.Machines, root}; c.Authority, c.Machines = a, a })
	s.Engine.Answer(policy.Permit, policy.Enforce)
	for _, x := range []struct {
		name string
		uris []string
		use  x509.ExtKeyUsage
		ok   bool
	}{
		{"a machine of ours", []string{"spiffe://test.redoubt/machine/m1"}, x509.ExtKeyUsageClientAuth, true},
		{"a machine of another trust domain", []string{"spiffe://other.example/machine/m1"}, x509.ExtKeyUsageClientAuth, false},
		{"a workload", []string{"spiffe://test.redoubt/service/m1"}, x509.ExtKeyUsageClientAuth, false},
		{"something below a machine", []string{"spiffe://test.redoubt/machine/m1/x"}, x509.ExtKeyUsageClientAuth, false},
		{"two names", []string{"spiffe://test.redoubt/machine/m1", "spiffe://test.redoubt/machine/m2"}, x509.ExtKeyUsageClientAuth, false},
		{"no name", nil, x509.ExtKeyUsageClientAuth, false},
		{"a certificate for servers only", []string{"spiffe://test.redoubt/machine/m1"}, x509.ExtKeyUsageServerAuth, false},
	} {
		template := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x.use}}
		for _, text := range x.uris {
			u, _ := url.Parse(text)
			template.URIs = append(template.URIs, u)
		}
		leaf := issue(template, root, &key.PublicKey)
		_, err := s.client(t, func(c *client.Config) { c.Credential, c.Certificate = "", certificate(key, leaf) }).Status(t.Context())
		if r := refusal.As(err); x.ok != (err == nil) || err != nil && (r == nil || r.Code != "wrong-svid") {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

// A wrong credential is not healed by a right certificate.
func TestWrongCredentialWithRightCertificate(t *testing.T) {
	s := serveTLS(t)
	key, joined := join(t, s.House, "m1")
	s.Engine.Answer(policy.Permit, policy.Enforce)
	c := s.client(t, func(c *client.Config) { c.Credential, c.Certificate = "ro1.wrong", certificate(key, joined.Chain...) })
	if _, err := c.Status(context.Background()); refusal.As(err) == nil || refusal.As(err).Kind != refusal.Unproven {
		t.Errorf("%v", err)
	}
}

// forged is a certificate for m1 that its holder issued itself.
func forged(t testing.TB, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	id, _ := identity.MakeID(apitest.TrustDomain, "/machine/m1")
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "m1"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// decider is the policy set as the roof would plug it in.
type decider struct{ s *tlsSite }

func builtin(_ testing.TB, s *tlsSite) decider { return decider{s} }

func (d decider) Decide(ctx context.Context, q *policy.Request) (policy.Verdict, policy.Explanation, error) {
	out := d.s.Registry.Decide(ctx, q)
	return out.Verdict, out.Explanation, nil
}
