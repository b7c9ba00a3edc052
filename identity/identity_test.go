package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The examples of SPIFFE-ID, section 2, and what it forbids.
func TestParseID(t *testing.T) {
	for _, ok := range []string{
		"spiffe://trust", "spiffe://staging.acme.com/payments/mysql", "spiffe://k8s-west.example.com/ns/staging/sa/default",
		"spiffe://a_b-c.1/A_b-C.9/...", "spiffe://td/" + strings.Repeat("a", 2000),
	} {
		id, err := identity.ParseID(ok)
		if err != nil || id.String() != ok {
			t.Errorf("%q: %v, %q", ok, err, id)
		}
	}
	for _, bad := range []string{
		"", "spiffe://", "spiffe:///a", "http://td/a", "SPIFFE://td/a", "spiffe://TD/a", "spiffe://td/", "spiffe://td//a", "spiffe://td/a/",
		"spiffe://td/./a", "spiffe://td/../a", "spiffe://td:80/a", "spiffe://u@td/a", "spiffe://td/a?q", "spiffe://td/a#f", "spiffe://td/%61",
		"spiffe://td/ü", "spiffe://td/a b", "spiffe://td/" + strings.Repeat("a", 2048), "spiffe://" + strings.Repeat("a", 256) + "/x",
	} {
		if id, err := identity.ParseID(bad); err == nil {
			t.Errorf("%q was taken for %q", bad, id)
		} else if refusal.As(err) == nil || refusal.As(err).Code != identity.ErrMalformedID.Code {
			t.Errorf("%q: %v is no refusal of this code", bad, err)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("spiffe://td/a")
	f.Add("spiffe://td/..")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := identity.ParseID(s)
		if err != nil {
			return
		}
		u, err := url.Parse(s)
		if id.String() != s || err != nil || u.Host != string(id.TrustDomain()) || u.Path != id.Path() || id.URL().String() != s {
			t.Errorf("%q came back as %q, or a URL parser reads it otherwise", s, id)
		}
	})
}

func TestUniqueIDsRiseAndAreKnown(t *testing.T) {
	var ids []string
	for range 5000 {
		ids = append(ids, identity.Unique("d"))
	}
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Error("ids of one process must rise strictly")
	}
	for _, bad := range []string{"d-", ids[0] + "0", "d-" + strings.Repeat("z", 26), strings.Replace(ids[0], "d", "e", 1)} {
		if identity.IsUnique("d", bad) {
			t.Errorf("%q was taken for an id", bad)
		}
	}
	if !identity.IsUnique("d", ids[0]) {
		t.Error("an id is not recognised")
	}
}

func certificate(t testing.TB, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{{Scheme: "spiffe", Host: "td", Path: "/a"}},
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// X509-SVID, sections 2, 4.3 and 5.2: what a leaf must be.
func TestIDFromCertificate(t *testing.T) {
	if id, err := identity.IDFromCertificate(certificate(t, func(*x509.Certificate) {})); err != nil || id.String() != "spiffe://td/a" {
		t.Errorf("got %v, %v", id, err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"no URI":        func(c *x509.Certificate) { c.URIs = nil },
		"two URIs":      func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "td", Path: "/b"}) },
		"no SPIFFE ID":  func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "https", Host: "td"}} },
		"a CA":          func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign },
		"a CA, no more": func(c *x509.Certificate) { c.IsCA = true },
		"signs lists":   func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"does not sign": func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
	} {
		if id, err := identity.IDFromCertificate(certificate(t, change)); err == nil {
			t.Errorf("%s: taken for %s", name, id)
		}
	}
}

func TestBundleRoundTrip(t *testing.T) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	in := &identity.Bundle{
		TrustDomain: "td", X509Authorities: []*x509.Certificate{certificate(t, func(c *x509.Certificate) { c.IsCA = true })},
		JWTAuthorities: map[string]crypto.PublicKey{"k-1": key.Public()}, Sequence: 7, RefreshHint: 5 * time.Minute,
	}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := identity.ParseBundle("td", raw)
	if err != nil {
		t.Fatal(err)
	}
	if out.Sequence != 7 || out.RefreshHint != 5*time.Minute || !out.X509Authorities[0].Equal(in.X509Authorities[0]) ||
		!key.PublicKey.Equal(out.JWTAuthorities["k-1"]) {
		t.Errorf("got %+v", out)
	}
	const point = `"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"`
	for name, doc := range map[string]string{
		"a private key": `{"keys":[{"use":"jwt-svid","kid":"a",` + point + `,"d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}]}`,
		"no key id":     `{"keys":[{"use":"jwt-svid",` + point + `}]}`,
		"no x5c":        `{"keys":[{"use":"x509-svid",` + point + `}]}`,
		"refresh hint":  `{"keys":[],"spiffe_refresh_hint":-1}`,
		"no JSON":       `x`,
	} {
		if _, err := identity.ParseBundle("td", []byte(doc)); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	// Trust Domain and Bundle, 4.2.2: keys of unknown use are ignored.
	if b, err := identity.ParseBundle("td", []byte(`{"keys":[{"use":"redoubt-facts","kty":"??"}]}`)); err != nil || len(b.JWTAuthorities) != 0 {
		t.Errorf("%v, %v", b, err)
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte(`{"keys":[],"spiffe_sequence":1,"spiffe_refresh_hint":300}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := identity.ParseBundle("td", data)
		if err != nil {
			return
		}
		if _, err := json.Marshal(b); err != nil {
			t.Errorf("what was parsed cannot be rendered: %v", err)
		}
	})
}

func TestSecretsRedactThemselves(t *testing.T) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	x := &identity.X509SVID{Chain: []*x509.Certificate{certificate(t, func(*x509.Certificate) {})}, Key: key}
	j := &identity.JWTSVID{Token: "secret-token"}
	for _, text := range []string{fmt.Sprintf("%v %+v %#v %s", x, x, x, x), fmt.Sprintf("%v %+v %#v %s", j, j, j, j)} {
		if strings.Contains(text, "secret-token") || strings.Contains(text, "PrivateKey") {
			t.Errorf("a secret was printed: %s", text)
		}
	}
}

func TestFactsKeepTheirEpochsInOrder(t *testing.T) {
	set, err := identity.NewFactSet(identity.Fact{Name: "unix.uid", Value: 7, Source: identity.FromKernel, Epoch: 3},
		identity.Fact{Name: "process.parents", Value: []string{"a", "b"}, Source: identity.FromKernel})
	if err != nil {
		t.Fatal(err)
	}
	same, _ := set.With(identity.Fact{Name: "unix.uid", Value: int64(7), Source: identity.FromKernel})
	if f, _ := same.Get("unix.uid"); f.Epoch != 3 {
		t.Errorf("a value that stays keeps its epoch, got %d", f.Epoch)
	}
	other, _ := set.With(identity.Fact{Name: "unix.uid", Value: 8, Source: identity.FromKernel})
	if f, _ := other.Get("unix.uid"); f.Epoch != 4 || f.Value != int64(8) {
		t.Errorf("a value that changes gets a higher epoch, got %+v", f)
	}
	if f, _ := set.Get("unix.uid"); f.Value != int64(7) {
		t.Error("With changed the set it was called on")
	}
	if set.Digest() != same.Digest() || set.Digest() == other.Digest() || set.Without("unix.uid").Len() != 1 {
		t.Error("the digest is of names, values and sources")
	}
}

func TestFactsAreBounded(t *testing.T) {
	for name, f := range map[string]identity.Fact{
		"no name": {Value: "x"}, "long name": {Name: strings.Repeat("a", 201), Value: ""}, "blank": {Name: "a b", Value: ""},
		"long value": {Name: "a", Value: strings.Repeat("a", 4097)}, "many items": {Name: "a", Value: make([]string, 257)},
		"fraction": {Name: "a", Value: 1.5}, "object": {Name: "a", Value: map[string]any{}}, "nil": {Name: "a"},
		"long item": {Name: "a", Value: []any{strings.Repeat("a", 4097)}},
	} {
		if _, err := identity.NewFactSet(f); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func FuzzFactSet(f *testing.F) {
	f.Add([]byte(`[{"name":"a","value":1,"source":"kernel","epoch":1}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s identity.FactSet
		if json.Unmarshal(data, &s) != nil {
			return
		}
		raw, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back identity.FactSet
		if err := json.Unmarshal(raw, &back); err != nil || back.Digest() != s.Digest() {
			t.Errorf("%s did not survive: %v", raw, err)
		}
	})
}
