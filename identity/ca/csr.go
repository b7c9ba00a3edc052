package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxCSRBytes bounds a certificate request. One of a P-384 key, as our agents make them, has under 500 bytes.
const maxCSRBytes = 16 << 10

// ParseCSR returns the public key of a PKCS #10 request (DER), after it has proved that its sender holds the private key.
// Everything else in the request is ignored: names that are asked for are never trusted.
//
// Errors: matches [ErrMalformedCSR], [ErrUnprovenKey] or [ErrWeakKey]. Trust: der is attacker-controlled.
// Source: RFC 2986, section 4.2.
func ParseCSR(der []byte) (crypto.PublicKey, error) {
	const what = "certificate request"
	if len(der) == 0 || len(der) > maxCSRBytes {
		return nil, refuse(ErrMalformedCSR, refusal.Invalid, what, fmt.Sprintf("it has %d bytes, and must have 1 to %d", len(der), maxCSRBytes),
			"send one PKCS #10 request in DER")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		e := refuse(ErrMalformedCSR, refusal.Invalid, what, "it does not parse as PKCS #10", "send one PKCS #10 request in DER")
		e.Err = err
		return nil, e
	}
	// The key before its proof: with a weak one the proof is worth nothing, and with a huge one it is dear.
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if !slices.Contains([]x509.SignatureAlgorithm{x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512}, csr.SignatureAlgorithm) {
		return nil, refuse(ErrUnprovenKey, refusal.Invalid, what, fmt.Sprintf("its signature algorithm, %s, is not accepted", csr.SignatureAlgorithm),
			"sign it with ECDSA and SHA-256")
	}
	if err := csr.CheckSignature(); err != nil {
		e := refuse(ErrUnprovenKey, refusal.Unproven, what, "its signature is not by the key in it", "sign the request with the key that it is for")
		e.Err = err
		return nil, e
	}
	return csr.PublicKey, nil
}

// checkPublicKey refuses every key but P-256 and P-384: those that all of TLS 1.3, the SPIFFE profiles and FIPS 186-5
// have in common, and that cost the same whoever made them.
func checkPublicKey(pub crypto.PublicKey) error {
	k, ok := pub.(*ecdsa.PublicKey)
	if ok && k != nil && (k.Curve == elliptic.P256() || k.Curve == elliptic.P384()) {
		// A point off the curve would not be a key at all; parsers check that, but pub may not come from one.
		if _, err := k.ECDH(); err == nil {
			return nil
		}
	}
	return refuse(ErrWeakKey, refusal.Invalid, "public key", fmt.Sprintf("a key of type %T is not accepted unless it is a point on P-256 or P-384", pub),
		"make an ECDSA key on P-256")
}
