package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestAJWTSVIDHasTheseParametersAndClaimsAndNoOthers(t *testing.T) {
	w := open(t)
	svid, err := w.SignJWT(t.Context(), id(t, "/service/orders"), []string{"ledger", "audit"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(svid.Token, ".")
	var kid string
	for kid = range w.Bundle().JWTAuthorities {
	}
	for i, want := range []map[string]any{
		{"alg": "ES256", "typ": "JWT", "kid": kid},
		{
			"sub": "spiffe://example.org/service/orders", "aud": []any{"ledger", "audit"},
			"iat": float64(start.Unix()), "exp": float64(start.Add(5 * time.Minute).Unix()),
		},
	} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("part %d (-want +got):\n%s", i, d)
		}
	}
	claims, err := ca.VerifyJWT(w.Bundle(), svid.Token, "audit", start)
	if err != nil {
		t.Fatal(err)
	}
	want := &ca.Claims{ID: id(t, "/service/orders"), Audience: []string{"ledger", "audit"}, Issued: start, Expires: svid.Expires, KeyID: kid}
	if d := cmp.Diff(want, claims, cmp.Comparer(func(a, b identity.ID) bool { return a == b })); d != "" {
		t.Errorf("claims (-want +got):\n%s", d)
	}
	if svid.ID != want.ID || !svid.Expires.Equal(start.Add(5*time.Minute)) {
		t.Errorf("SVID: %v", svid)
	}
}

// TestGoSPIFFETakesTheToken asks SPIFFE's own library.
func TestGoSPIFFETakesTheToken(t *testing.T) {
	w := open(t, func(c *ca.Config) { c.Now = time.Now })
	svid, err := w.SignJWT(t.Context(), id(t, "/service/orders"), []string{"ledger"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	bundle := jwtbundle.FromJWTAuthorities(spiffeid.RequireTrustDomainFromString(domain.String()), w.Bundle().JWTAuthorities)
	got, err := jwtsvid.ParseAndValidate(svid.Token, bundle, []string{"ledger"})
	if err != nil || got.ID.String() != "spiffe://example.org/service/orders" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestSigningAJWTRefuses(t *testing.T) {
	w := open(t)
	mine := id(t, "/service/a")
	for name, c := range map[string]struct {
		id       identity.ID
		audience []string
		ttl      time.Duration
		want     *refusal.Error
	}{
		"no ID":             {identity.ID{}, []string{"b"}, 0, ca.ErrForeignID},
		"the trust domain":  {domain.ID(), []string{"b"}, 0, ca.ErrForeignID},
		"no audience":       {mine, nil, 0, ca.ErrAudience},
		"empty audience":    {mine, []string{"b", ""}, 0, ca.ErrAudience},
		"long audience":     {mine, []string{strings.Repeat("b", 513)}, 0, ca.ErrAudience},
		"too many":          {mine, strings.Split(strings.Repeat("b,", 16)+"b", ","), 0, ca.ErrAudience},
		"too long a life":   {mine, []string{"b"}, 5*time.Minute + 1, ca.ErrTTL},
		"too short a life":  {mine, []string{"b"}, time.Second, ca.ErrTTL},
		"life below nought": {mine, []string{"b"}, -1, ca.ErrTTL},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.SignJWT(t.Context(), c.id, c.audience, c.ttl)
			wantRefusal(t, err, c.want)
		})
	}
	t.Run("the most that is allowed", func(t *testing.T) {
		long := make([]string, 16)
		for i := range long {
			long[i] = strings.Repeat("b", 512)
		}
		svid, err := w.SignJWT(t.Context(), mine, long, 0)
		if err != nil || len(svid.Token) > 16<<10 {
			t.Errorf("%v", err)
		}
	})
}

// forge signs header and claims of the test's choice with a key of the test's own, that the bundle has under "k".
type forge struct {
	bundle *identity.Bundle
	sign   func(input string) []byte
}

func newForge(t testing.TB) forge {
	t.Helper()
	k := newKey(t)
	return forge{
		bundle: &identity.Bundle{TrustDomain: domain, JWTAuthorities: map[string]crypto.PublicKey{"k": k.Public()}},
		sign: func(input string) []byte { // ES256 by hand (RFC 7518, 3.4), since no library signs such headers
			sum := sha256.Sum256([]byte(input))
			r, s, err := ecdsa.Sign(rand.Reader, k, sum[:])
			if err != nil {
				t.Fatal(err)
			}
			return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		},
	}
}

func (f forge) token(header, claims string) string {
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	return input + "." + base64.RawURLEncoding.EncodeToString(f.sign(input))
}

const (
	goodHeader = `{"alg":"ES256","kid":"k","typ":"JWT"}`
	goodClaims = `{"sub":"spiffe://example.org/a","aud":["b"],"exp":1795342800,"iat":1795341600}` // 10:00 to 10:20 of start's day
)

func TestVerifyJWTRefuses(t *testing.T) {
	f := newForge(t)
	now := time.Unix(1795341600, 0)
	if _, err := ca.VerifyJWT(f.bundle, f.token(goodHeader, goodClaims), "b", now); err != nil {
		t.Fatal(err)
	}
	good := f.token(goodHeader, goodClaims)
	swap := func(s, old, with string) string {
		if !strings.Contains(s, old) {
			t.Fatalf("%q is not in %q", old, s)
		}
		return strings.Replace(s, old, with, 1)
	}
	claims := func(old, with string) string { return f.token(goodHeader, swap(goodClaims, old, with)) }
	header := func(old, with string) string { return f.token(swap(goodHeader, old, with), goodClaims) }
	spki, err := x509.MarshalPKIXPublicKey(f.bundle.JWTAuthorities["k"])
	if err != nil {
		t.Fatal(err)
	}
	confused := forge{sign: func(input string) []byte { // the public key as an HMAC secret
		h := hmac.New(sha256.New, spki)
		h.Write([]byte(input))
		return h.Sum(nil)
	}}
	empty := forge{sign: func(string) []byte { return nil }}
	thief := newForge(t)
	for name, c := range map[string]struct {
		token, audience string
		want            *refusal.Error
	}{
		"nothing":                 {"", "b", ca.ErrToken},
		"garbage":                 {"a.b.c", "b", ca.ErrToken},
		"too large":               {good + strings.Repeat("A", 16<<10), "b", ca.ErrToken},
		"two parts":               {good[:strings.LastIndex(good, ".")], "b", ca.ErrToken},
		"JSON form":               {`{"payload":"e30","signature":"","protected":"e30"}`, "b", ca.ErrToken},
		"alg none":                {empty.token(swap(goodHeader, "ES256", "none"), goodClaims), "b", ca.ErrToken},
		"HMAC by the public key":  {confused.token(swap(goodHeader, "ES256", "HS256"), goodClaims), "b", ca.ErrToken},
		"no signature":            {empty.token(goodHeader, goodClaims), "b", ca.ErrTokenProof},
		"another's signature":     {thief.token(goodHeader, goodClaims), "b", ca.ErrTokenProof},
		"another algorithm":       {header("ES256", "ES384"), "b", ca.ErrTokenProof},
		"no key id":               {header(`"kid":"k",`, ""), "b", ca.ErrToken},
		"empty key id":            {header(`"kid":"k"`, `"kid":""`), "b", ca.ErrToken},
		"two key ids":             {header(`"kid":"k"`, `"kid":"k","kid":"k"`), "b", ca.ErrToken},
		"unknown key":             {header(`"kid":"k"`, `"kid":"l"`), "b", ca.ErrTokenKey},
		"a key of its own":        {header(`"kid":"k"`, `"kid":"k","jwk":{}`), "b", ca.ErrToken},
		"a key's address":         {header(`"kid":"k"`, `"kid":"k","jku":"https://evil.example"`), "b", ca.ErrToken},
		"critical":                {header(`"kid":"k"`, `"kid":"k","crit":["b64"],"b64":false`), "b", ca.ErrToken},
		"another type":            {header(`"JWT"`, `"at+jwt"`), "b", ca.ErrToken},
		"another trust domain":    {claims("spiffe://example.org/a", "spiffe://other.org/a"), "b", ca.ErrToken},
		"the trust domain":        {claims("spiffe://example.org/a", "spiffe://example.org"), "b", ca.ErrToken},
		"no SPIFFE ID":            {claims("spiffe://example.org/a", "alice"), "b", ca.ErrToken},
		"no subject":              {claims(`"sub":"spiffe://example.org/a",`, ""), "b", ca.ErrToken},
		"subject in capitals":     {claims(`"sub"`, `"SUB"`), "b", ca.ErrToken},
		"two subjects":            {claims(`"aud"`, `"sub":"spiffe://example.org/c","aud"`), "b", ca.ErrToken},
		"another audience":        {good, "c", ca.ErrTokenFor},
		"no audience asked":       {claims(`["b"]`, `["b",""]`), "", ca.ErrTokenFor},
		"no audience":             {claims(`"aud":["b"],`, ""), "b", ca.ErrTokenFor},
		"audience a number":       {claims(`["b"]`, `7`), "b", ca.ErrToken},
		"audience by prefix":      {claims(`["b"]`, `["bb"]`), "b", ca.ErrTokenFor},
		"no expiry":               {claims(`"exp":1795342800,`, ""), "b", ca.ErrToken},
		"expiry null":             {claims(`1795342800`, `null`), "b", ca.ErrToken},
		"expiry beyond calendars": {claims(`1795342800`, `1e300`), "b", ca.ErrToken},
		"expiry below nought":     {claims(`1795342800`, `-1`), "b", ca.ErrToken},
		"expired":                 {claims(`1795342800`, `1795341569`), "b", ca.ErrTokenExpired}, // 31 s ago
		"issued in the future":    {claims(`"iat":1795341600`, `"iat":1795341631`), "b", ca.ErrTokenEarly},
		"not before the future":   {claims(`"iat"`, `"nbf":1795341631,"iat"`), "b", ca.ErrTokenEarly},
		"claims no object":        {f.token(goodHeader, `[]`), "b", ca.ErrToken},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ca.VerifyJWT(f.bundle, c.token, c.audience, now)
			wantRefusal(t, err, c.want)
			if got != nil {
				t.Error("it gave claims all the same")
			}
			if len(c.token) > 20 && err != nil && strings.Contains(err.Error(), c.token[:20]) {
				t.Error("the refusal quotes the token")
			}
		})
	}
	for name, token := range map[string]string{
		"one audience as a string": claims(`["b"]`, `"b"`),
		"type JOSE":                header(`"JWT"`, `"JOSE"`),
		"no type":                  header(`,"typ":"JWT"`, ""),
		"claims of others":         claims(`"aud"`, `"https://example.org/x":[1],"aud"`),
		"no time of issue":         claims(`,"iat":1795341600`, ""),
		"expired within leeway":    claims(`1795342800`, `1795341571`),
		"issued within leeway":     claims(`"iat":1795341600`, `"iat":1795341629`),
		"dates with fractions":     claims(`1795342800`, `1795342800.5`),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ca.VerifyJWT(f.bundle, token, "b", now); err != nil {
				t.Error(err)
			}
		})
	}
}

func FuzzVerifyJWT(f *testing.F) {
	forge := newForge(f)
	now := time.Unix(1795341600, 0)
	for _, header := range []string{goodHeader, `{"alg":"none"}`, `{"alg":"HS256","kid":"k"}`, `{"alg":"ES256","kid":"k","crit":["x"]}`, `[]`} {
		for _, claims := range []string{goodClaims, `{}`, `{"sub":7}`, `{"exp":1e999}`, `null`} {
			f.Add(forge.token(header, claims), header, claims)
		}
	}
	f.Fuzz(func(t *testing.T, token, header, claims string) {
		for _, token := range []string{token, forge.token(header, claims)} {
			c, err := ca.VerifyJWT(forge.bundle, token, "b", now)
			if (c == nil) == (err == nil) {
				t.Fatalf("claims %v, error %v", c, err)
			}
			if err != nil {
				if refusal.As(err) == nil {
					t.Fatalf("no refusal: %v", err)
				}
				continue
			}
			if c.ID.TrustDomain() != domain || c.ID.Path() == "" || c.Expires.Before(now.Add(-ca.Leeway)) {
				t.Fatalf("took %+v", c)
			}
		}
	})
}
