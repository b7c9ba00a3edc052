package ca

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json" // unlike encoding/json: names match exactly, and none may stand twice

	"github.com/redoubtsec/redoubt/identity"
)

// Claims are what a verified JWT-SVID says.
type Claims struct {
	ID       identity.ID
	Audience []string
	Issued   time.Time // zero if the token does not say
	Expires  time.Time
	KeyID    string
}

// maxTokenBytes bounds a token. One of ours with the most and longest audiences has under 14 KiB.
const maxTokenBytes = 16 << 10

// algorithms are those that a JWT-SVID may be signed with; none, and the symmetric ones, are not among them.
// Source: JWT-SVID, section 2.1 (the list of RFC 7518, 3.1 without HMAC).
var algorithms = []jose.SignatureAlgorithm{
	jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
}

// VerifyJWT verifies a JWT-SVID of the bundle's trust domain: its form, its signature by a key of the bundle, its
// subject, that it is for audience, and that it is valid at now, give or take [Leeway].
//
// Errors: matches [ErrToken], [ErrTokenKey], [ErrTokenProof], [ErrTokenExpired], [ErrTokenEarly] or [ErrTokenFor].
// None quotes the token. Trust: token is attacker-controlled; bundle is not. Source: JWT-SVID, sections 2 to 5.
func VerifyJWT(bundle *identity.Bundle, token, audience string, now time.Time) (*Claims, error) {
	if token == "" || len(token) > maxTokenBytes {
		return nil, badToken(ErrToken, fmt.Sprintf("it has %d bytes, and must have 1 to %d", len(token), maxTokenBytes), nil)
	}
	kid, err := checkHeader(token)
	if err != nil {
		return nil, badToken(ErrToken, err.Error(), err)
	}
	signed, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, badToken(ErrToken, "it is not a JWS in compact form with an asymmetric signature", err)
	}
	key, ok := bundle.JWTAuthorities[kid]
	if !ok {
		return nil, badToken(ErrTokenKey, "its key is not in the bundle of "+bundle.TrustDomain.String(), nil)
	}
	body, err := signed.Verify(key)
	if err != nil {
		return nil, badToken(ErrTokenProof, "its signature is not by the key that it names", err)
	}
	c, err := readClaims(body, now)
	if err != nil {
		return nil, err
	}
	c.KeyID = kid
	switch {
	case c.ID.TrustDomain() != bundle.TrustDomain || c.ID.Path() == "":
		return nil, badToken(ErrToken, "its subject is not below the trust domain "+bundle.TrustDomain.String(), nil)
	case audience == "" || !slices.Contains(c.Audience, audience):
		return nil, badToken(ErrTokenFor, "it is for another audience", nil)
	}
	return c, nil
}

// checkHeader returns the key id. JWT-SVID, section 2: alg, kid and typ are all that a header may have; typ, if there,
// is JWT or JOSE; and a key that the token brings itself is never looked at.
func checkHeader(token string) (kid string, err error) {
	first, _, _ := strings.Cut(token, ".")
	raw, err := base64.RawURLEncoding.Strict().DecodeString(first)
	if err != nil {
		return "", errors.New("its header is not base64url")
	}
	var header map[string]json.RawMessage
	if err := json.Unmarshal(raw, &header); err != nil {
		return "", errors.New("its header is not a JSON object")
	}
	for name := range header {
		if name != "alg" && name != "kid" && name != "typ" {
			return "", errors.New("its header has a parameter beside alg, kid and typ")
		}
	}
	if err := json.Unmarshal(header["kid"], &kid); err != nil || kid == "" {
		return "", errors.New("its header names no key")
	}
	if typ, ok := header["typ"]; ok {
		var s string
		if err := json.Unmarshal(typ, &s); err != nil || s != "JWT" && s != "JOSE" {
			return "", errors.New("its type is neither JWT nor JOSE")
		}
	}
	return kid, nil
}

// audiences reads `aud`, which is one string or a list of them (RFC 7519, 4.1.3).
type audiences []string

func (a *audiences) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audiences{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// readClaims checks a body whose signature has been verified. Claims that are not described here are ignored.
func readClaims(body []byte, now time.Time) (*Claims, error) {
	var raw struct {
		Subject   string    `json:"sub"`
		Audience  audiences `json:"aud"`
		Expires   *float64  `json:"exp"` // NumericDate may have a fraction (RFC 7519, section 2)
		Issued    *float64  `json:"iat"`
		NotBefore *float64  `json:"nbf"`
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, badToken(ErrToken, "its claims are not those of a JWT-SVID", err)
	}
	id, err := identity.ParseID(raw.Subject)
	if err != nil {
		return nil, badToken(ErrToken, "its subject is not a SPIFFE ID", err)
	}
	c := &Claims{ID: id, Audience: raw.Audience}
	if raw.Expires == nil {
		return nil, badToken(ErrToken, "it never expires", nil)
	}
	if c.Expires, err = numericDate(*raw.Expires); err != nil {
		return nil, badToken(ErrToken, "its expiry is no date", err)
	}
	if now.After(c.Expires.Add(Leeway)) {
		return nil, badToken(ErrTokenExpired, "it expired at "+stamp(c.Expires), nil)
	}
	for _, claim := range []struct {
		date *float64
		to   *time.Time
	}{{raw.Issued, &c.Issued}, {raw.NotBefore, new(time.Time)}} {
		if claim.date == nil {
			continue
		}
		if *claim.to, err = numericDate(*claim.date); err != nil {
			return nil, badToken(ErrToken, "it begins at no date", err)
		}
		if now.Add(Leeway).Before(*claim.to) {
			return nil, badToken(ErrTokenEarly, "it begins at "+stamp(*claim.to)+", which is not yet", nil)
		}
	}
	return c, nil
}

// maxDate is the end of the year 9999, in seconds: dates beyond do not render.
const maxDate = 253402300799

func numericDate(f float64) (time.Time, error) {
	if math.IsNaN(f) || f < 0 || f > maxDate {
		return time.Time{}, errors.New("out of range")
	}
	return time.Unix(int64(f), 0).UTC(), nil
}
