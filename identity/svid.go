package identity

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"
)

// X509SVID is an identity document: a chain whose leaf carries the ID as its only URI SAN, and the leaf's private key.
//
// Shape: Chain is leaf first, without the root; never empty once valid. Trust: Key is secret and lives in memory only;
// the type redacts itself when formatted. Source: X509-SVID, sections 2 to 5.
type X509SVID struct {
	ID    ID
	Chain []*x509.Certificate
	Key   crypto.Signer
	// Hint tells a workload with several SVIDs what this one is for ("internal"); may be empty.
	Hint string
}

// Expires returns the end of validity of the leaf, or the zero time of an empty SVID.
func (s *X509SVID) Expires() time.Time {
	if len(s.Chain) == 0 {
		return time.Time{}
	}
	return s.Chain[0].NotAfter
}

// SPKI returns the SHA-256 of the leaf's SubjectPublicKeyInfo: what tells instances of one ID apart.
func (s *X509SVID) SPKI() [32]byte { return sha256.Sum256(s.Chain[0].RawSubjectPublicKeyInfo) }

// String names the SVID without its key.
func (s *X509SVID) String() string {
	return fmt.Sprintf("X509-SVID of %s, expires %s", s.ID, s.Expires().UTC().Format(time.RFC3339))
}

// GoString is [X509SVID.String], so that %#v does not print the key.
func (s *X509SVID) GoString() string { return s.String() }

// JWTSVID is a bearer token that proves an ID to an audience. Trust: Token is secret; the type redacts itself.
// Source: JWT-SVID, section 3.
type JWTSVID struct {
	ID       ID
	Token    string
	Audience []string
	Expires  time.Time
	Hint     string
}

// String names the SVID without its token.
func (s *JWTSVID) String() string {
	return fmt.Sprintf("JWT-SVID of %s, expires %s", s.ID, s.Expires.UTC().Format(time.RFC3339))
}

// GoString is [JWTSVID.String].
func (s *JWTSVID) GoString() string { return s.String() }

// IDFromCertificate returns the SPIFFE ID of a leaf certificate: it must have exactly one URI SAN, be no CA, and may
// sign digitally but not certificates. The chain is not verified here. Errors: matches [ErrMalformedID].
// Trust: cert is attacker-controlled. Source: X509-SVID, sections 2, 4.1 and 5.2.
func IDFromCertificate(cert *x509.Certificate) (ID, error) {
	switch {
	case len(cert.URIs) != 1:
		return ID{}, malformed("certificate", fmt.Sprintf("an X509-SVID has exactly one URI SAN, this has %d", len(cert.URIs)))
	case cert.IsCA:
		return ID{}, malformed("certificate", "a CA certificate is no leaf X509-SVID")
	case cert.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return ID{}, malformed("certificate", "a leaf X509-SVID may not sign certificates or revocation lists")
	case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return ID{}, malformed("certificate", "a leaf X509-SVID must allow digital signatures")
	}
	return ParseID(cert.URIs[0].String())
}
