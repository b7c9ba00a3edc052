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
