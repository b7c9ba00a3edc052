package identity

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Bundle is the public keys of one trust domain: what verifies its SVIDs.
//
// Concurrency: immutable once published; make a new one to change it. Source: SPIFFE Trust Domain and Bundle, section 4.
type Bundle struct {
	TrustDomain     TrustDomain
	X509Authorities []*x509.Certificate
	// JWTAuthorities are the keys of JWT-SVIDs by key id.
	JWTAuthorities map[string]crypto.PublicKey
	// Sequence rises with every change.
	Sequence uint64
	// RefreshHint is how often a consumer should look again; rendered in whole seconds.
	RefreshHint time.Duration
}

// Pool returns the X.509 authorities as a pool to verify against.
func (b *Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range b.X509Authorities {
		pool.AddCert(c)
	}
	return pool
}

type jwk struct {
	jose.JSONWebKey
}

type jwksDocument struct {
	Keys        []json.RawMessage `json:"keys"`
	Sequence    uint64            `json:"spiffe_sequence,omitempty"`
	RefreshHint int64             `json:"spiffe_refresh_hint,omitempty"`
}

// MarshalJSON renders the SPIFFE bundle document: a JWK set with `use` of x509-svid and jwt-svid.
// Source: SPIFFE Trust Domain and Bundle, section 4.
func (b *Bundle) MarshalJSON() ([]byte, error) {
	doc := jwksDocument{Keys: []json.RawMessage{}, Sequence: b.Sequence, RefreshHint: int64(b.RefreshHint / time.Second)}
	for _, c := range b.X509Authorities {
		raw, err := jose.JSONWebKey{Key: c.PublicKey, Certificates: []*x509.Certificate{c}, Use: "x509-svid"}.MarshalJSON()
		if err != nil {
			return nil, fmt.Errorf("render X.509 authority: %w", err)
		}
		doc.Keys = append(doc.Keys, raw)
	}
	jwt, err := b.JWTKeys("jwt-svid")
	if err != nil {
		return nil, err
	}
	doc.Keys = append(doc.Keys, jwt...)
	return json.Marshal(doc)
}

// JWTKeys renders the JWT authorities as JWKs with the given use ("" leaves it out), in order of key id. The Workload
// API's JWT bundles are a JWK set of these.
func (b *Bundle) JWTKeys(use string) ([]json.RawMessage, error) {
	keys := []json.RawMessage{}
	for _, kid := range sortedKeys(b.JWTAuthorities) {
		raw, err := jose.JSONWebKey{Key: b.JWTAuthorities[kid], KeyID: kid, Use: use}.MarshalJSON()
		if err != nil {
			return nil, fmt.Errorf("render JWT authority %s: %w", kid, err)
		}
		keys = append(keys, raw)
	}
	return keys, nil
}

// ParseBundle reads a SPIFFE bundle document of a trust domain. Keys of unknown use are ignored, as the source asks.
// Trust: data is attacker-controlled until its transport is authenticated.
func ParseBundle(td TrustDomain, data []byte) (*Bundle, error) {
	var doc jwksDocument
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	if doc.RefreshHint < 0 || doc.RefreshHint > int64(100*365*24*time.Hour/time.Second) {
		return nil, errors.New("parse bundle: refresh hint out of range")
	}
	b := &Bundle{
		TrustDomain: td, JWTAuthorities: map[string]crypto.PublicKey{}, Sequence: doc.Sequence,
		RefreshHint: time.Duration(doc.RefreshHint) * time.Second,
	}
	for _, raw := range doc.Keys {
		var use struct {
			Use string `json:"use"`
		}
		if err := json.Unmarshal(raw, &use); err != nil {
			return nil, fmt.Errorf("parse bundle: %w", err)
		}
		if use.Use != "x509-svid" && use.Use != "jwt-svid" {
			continue
		}
		var key jwk
		if err := key.UnmarshalJSON(raw); err != nil {
			return nil, fmt.Errorf("parse bundle key: %w", err)
		}
		switch use.Use {
		case "x509-svid":
			if len(key.Certificates) != 1 {
				return nil, errors.New("parse bundle: an x509-svid key must have exactly one certificate")
			}
			b.X509Authorities = append(b.X509Authorities, key.Certificates[0])
		case "jwt-svid":
			if key.KeyID == "" || !key.IsPublic() {
				return nil, errors.New("parse bundle: a jwt-svid key must be public and have a key id")
			}
			b.JWTAuthorities[key.KeyID] = key.Key
		}
	}
	return b, nil
}
