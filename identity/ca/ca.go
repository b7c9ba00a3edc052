// Package ca is the certificate authority of one trust domain: it signs X509-SVIDs and JWT-SVIDs, and it keeps, seals
// and rotates the keys that it signs with.
//
// There are three uses of keys. The root is long-lived, stands in the bundle, and signs nothing but issuing
// certificates. The issuing key signs X509-SVIDs; its certificate travels in their chains, so it can be replaced without
// a word to any relying party. The JWT key signs JWT-SVIDs; its public half stands in the bundle, so a new one is
// published before it signs and an old one stays until its last token has expired.
//
// # The life of a key
//
//	Prepare     made and sealed; known to nobody                                     prepared
//	Publish     a JWT key enters the bundle; from now on relying parties learn it    published
//	Activate    it signs; the key before it is superseded                            active
//	            it signs no more, but what it signed is still valid                  superseded
//	Retire      it leaves the bundle, and its private half is destroyed              retired
//
// Issuing and JWT keys take these steps together, by hand ([Authority.Prepare] and its siblings) or by themselves
// ([Authority.Run], from half of the life of the active key on).
//
// # Lifetimes
//
// A child never outlives its parent, and never begins before it: an SVID lies within its issuing certificate, and that
// within the root. What would come out too short to be of use is refused and never issued: see [Config]. Certificates
// begin [Backdate] before they are signed, for relying parties whose clock is behind.
//
// Trust: callers have decided who gets which ID; this room does not ask. Public keys, requests and tokens come from an
// attacker. The store is trusted for the state of keys but not with their private halves, which are sealed under the
// key-encryption key (KEK) of the caller and never logged, rendered or returned. One process writes to a store at a time.
//
// Source: X509-SVID 1.0, JWT-SVID 1.0, SPIFFE Trust Domain and Bundle 1.0, RFC 5280, RFC 7519.
package ca

import (
	"context"
	"log/slog"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
)

// Use is what a key is for.
type Use string

// The uses of keys.
const (
	Root Use = "root" // signs issuing certificates; its certificate is in the bundle
	X509 Use = "x509" // the issuing key: signs X509-SVIDs; its certificate is in their chains
	JWT  Use = "jwt"  // signs JWT-SVIDs; its public key is in the bundle
)

// State is where a key is in its life; see the package documentation. The root is active for all of its life.
type State string

// The states of keys, in the order in which they are passed.
const (
	Prepared   State = "prepared"
	Published  State = "published"
	Active     State = "active"
	Superseded State = "superseded"
	Retired    State = "retired"
)

// KeyRecord is a key as a [Store] keeps it.
//
// Shape: times are UTC in whole seconds and never zero. ID is unique among all uses. Records are never deleted: a
// retired one has lost its private half (Sealed is empty) and stays as history.
type KeyRecord struct {
	ID      string
	Use     Use
	State   State
	Created time.Time
	// NotBefore and NotAfter are those of the certificate. Of a JWT key: it may sign from NotBefore (a refresh interval
	// after it was published), and nothing that it signed is valid after NotAfter.
	NotBefore time.Time
	NotAfter  time.Time
	// Certificate is DER: an X.509 certificate, or of a JWT key its SubjectPublicKeyInfo (PKIX).
	Certificate []byte
	// Sealed is the private key (PKCS #8) under the KEK: a nonce of 12 bytes, then AES-256-GCM with "ID|Use" as
	// additional data.
	Sealed []byte
}

// Store keeps the key records. The conformance suite of implementations is catest.TestStore.
//
// Trust: the store never sees an unsealed private key.
type Store interface {
	// Keys returns every record, in any order; the caller may change them.
	Keys(ctx context.Context) ([]KeyRecord, error)
	// PutKeys inserts each key, or replaces the one with the same ID, and adds the audit record: all of it or nothing.
	// A record whose ID is already there is refused. Durability: on disk when it returns.
	PutKeys(ctx context.Context, keys []KeyRecord, rec event.Record) error
}

// Config is what an [Authority] is made of. TrustDomain, Store and KEK are needed; a zero duration means its default.
//
// [Open] refuses lifetimes of which the one could not carry the other, with code [ErrLifetimes]: half the life of an
// issuing key must hold the longest SVID and the time that a rotation takes, and a root must hold two issuing keys.
type Config struct {
	TrustDomain identity.TrustDomain
	Store       Store
	// KEK is the key-encryption key: 32 bytes. Trust: secret; it is copied and never rendered.
	KEK []byte
	// ServerID is the one identity whose certificates may carry DNS names and addresses ([SignOptions]).
	// Default: spiffe://<trust domain>/server.
	ServerID identity.ID

	SVIDTTL    time.Duration // of an X509-SVID for which no other is asked; default 1 h
	AgentTTL   time.Duration // the longest that may be asked, for agents; default 24 h
	JWTTTL     time.Duration // of a JWT-SVID, and the longest that may be asked; default 5 min
	IssuingTTL time.Duration // of an issuing and of a JWT key; default 30 days
	RootTTL    time.Duration // of the root, when Open makes it; default 10 years
	// RefreshHint is how often relying parties are told to look for a new bundle, and so how long a JWT key is
	// published before it signs; default 5 min.
	RefreshHint time.Duration

	Meter  event.Meter      // nil: event.NoMeter
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now
}

// The default lifetimes.
const (
	DefaultSVIDTTL     = time.Hour
	DefaultAgentTTL    = 24 * time.Hour
	DefaultJWTTTL      = 5 * time.Minute
	DefaultIssuingTTL  = 30 * 24 * time.Hour
	DefaultRootTTL     = 10 * 365 * 24 * time.Hour
	DefaultRefreshHint = 5 * time.Minute
)
