package ca

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// kekBytes is the length of the key-encryption key: AES-256.
const kekBytes = 32

// sealer encrypts private keys at rest with AES-256-GCM. A KEK seals a few keys in a month, far from the bound of random
// nonces (2^32 messages: NIST SP 800-38D, 8.3).
type sealer struct{ aead cipher.AEAD }

func newSealer(kek []byte) (*sealer, error) {
	if len(kek) != kekBytes {
		return nil, badConfig("KEK", fmt.Sprintf("it has %d bytes, and must have %d", len(kek), kekBytes))
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	return &sealer{aead: aead}, nil
}

// additional binds a sealed key to its record, so that one cannot be put in the place of another.
func additional(rec KeyRecord) []byte { return []byte(rec.ID + "|" + string(rec.Use)) }

func (s *sealer) seal(rec KeyRecord, private []byte) []byte {
	return s.aead.Seal(nil, nil, private, additional(rec))
}

// errSealed says that a sealed key did not open, for which there are two reasons that cannot be told apart from it alone:
// another KEK, or a damaged record.
var errSealed = errors.New("the sealed key does not open")

func (s *sealer) open(rec KeyRecord) ([]byte, error) {
	private, err := s.aead.Open(nil, nil, rec.Sealed, additional(rec))
	if err != nil {
		return nil, errSealed
	}
	return private, nil
}

// key is a record that has been read and checked.
type key struct {
	KeyRecord
	cert   *x509.Certificate // of a root or issuing key
	public *ecdsa.PublicKey
	// private is nil of a retired key, and of the root, which is unsealed for each use.
	private *ecdsa.PrivateKey
}

func (k *key) span() span { return span{k.NotBefore, k.NotAfter} }

// String names the key, and so keeps its private half out of anything that formats it.
func (k *key) String() string { return string(k.Use) + " key " + k.ID }

// GoString is [key.String].
func (k *key) GoString() string { return k.String() }

// generate makes a P-256 key of this use and seals it; certify returns what goes into the record's Certificate.
func (s *sealer) generate(use Use, state State, now time.Time, life span, certify func(rec KeyRecord, k *ecdsa.PrivateKey) ([]byte, error)) (KeyRecord, *ecdsa.PrivateKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return KeyRecord{}, nil, fmt.Errorf("generate %s key: %w", use, err)
	}
	rec := KeyRecord{
		ID: identity.Unique("k"), Use: use, State: state,
		Created: now.UTC().Truncate(time.Second), NotBefore: life.notBefore, NotAfter: life.notAfter,
	}
	if rec.Certificate, err = certify(rec, k); err != nil {
		return KeyRecord{}, nil, fmt.Errorf("certify %s key: %w", use, err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return KeyRecord{}, nil, fmt.Errorf("render %s key: %w", use, err)
	}
	rec.Sealed = s.seal(rec, private)
	clear(private)
	return rec, k, nil
}

// newRoot makes the root of a trust domain.
func (s *sealer) newRoot(td identity.TrustDomain, now time.Time, life span) (KeyRecord, *ecdsa.PrivateKey, error) {
	return s.generate(Root, Active, now, life, func(rec KeyRecord, k *ecdsa.PrivateKey) ([]byte, error) {
		t := authorityTemplate(td, rec, life, 1)
		return x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	})
}

// newIssuing makes an issuing key, signed by the root.
func (s *sealer) newIssuing(td identity.TrustDomain, state State, now time.Time, life span, root *x509.Certificate, rootKey *ecdsa.PrivateKey) (KeyRecord, error) {
	rec, _, err := s.generate(X509, state, now, life, func(rec KeyRecord, k *ecdsa.PrivateKey) ([]byte, error) {
		return x509.CreateCertificate(rand.Reader, authorityTemplate(td, rec, life, 0), root, k.Public(), rootKey)
	})
	return rec, err
}

// newJWT makes a key for JWT-SVIDs.
func (s *sealer) newJWT(state State, now time.Time, life span) (KeyRecord, error) {
	rec, _, err := s.generate(JWT, state, now, life, func(_ KeyRecord, k *ecdsa.PrivateKey) ([]byte, error) {
		return x509.MarshalPKIXPublicKey(k.Public())
	})
	return rec, err
}

// authorityTemplate is a signing certificate: a CA whose one URI SAN is the trust domain, without a path.
// Source: X509-SVID, sections 3.2, 4.1 and 4.3.
func authorityTemplate(td identity.TrustDomain, rec KeyRecord, life span, pathLen int) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: newSerial(),
		// RFC 5280, 4.1.2.4: an issuer has a name. With the key's id in it, no two keys share one.
		Subject:   pkix.Name{Organization: []string{"Redoubt"}, CommonName: string(rec.Use) + " " + rec.ID},
		URIs:      []*url.URL{td.ID().URL()},
		NotBefore: life.notBefore, NotAfter: life.notAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true,
		MaxPathLen: pathLen, MaxPathLenZero: pathLen == 0,
	}
}

// newSerial returns 128 random bits, and never 0. Source: RFC 5280, 4.1.2.2 (positive, at most 20 octets).
func newSerial() *big.Int {
	var b [16]byte
	for b == [16]byte{} {
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
	}
	return new(big.Int).SetBytes(b[:])
}

// errForeign says that a certificate belongs to another trust domain.
var errForeign = errors.New("another trust domain")

// read checks a record and unseals its private half. Errors: [errSealed], or a refusal.
// Trust: the store is trusted with states, yet damage must be found here and not by a relying party.
func (s *sealer) read(td identity.TrustDomain, rec KeyRecord, root *x509.Certificate) (*key, error) {
	k := &key{KeyRecord: rec}
	var public crypto.PublicKey
	switch rec.Use {
	case JWT:
		pub, err := x509.ParsePKIXPublicKey(rec.Certificate)
		if err != nil {
			return nil, corrupt(rec, "its public key does not parse", err)
		}
		public = pub
	case Root, X509:
		cert, err := readAuthority(td, rec, root)
		if errors.Is(err, errForeign) {
			return nil, refuse(ErrForeignKey, refusal.Invalid, "certificate authority of "+td.String(),
				"the store holds the keys of another trust domain", "correct the trust domain in the configuration, or the data directory")
		}
		if err != nil {
			return nil, corrupt(rec, err.Error(), err)
		}
		k.cert, public = cert, cert.PublicKey
	default:
		return nil, corrupt(rec, "its use is not known", nil)
	}
	pub, ok := public.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, corrupt(rec, "it is no P-256 key", nil)
	}
	k.public = pub
	if rec.State == Retired {
		return k, nil
	}
	der, err := s.open(rec)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	private, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, corrupt(rec, "its private key does not parse", nil) // the cause could quote the key
	}
	k.private, ok = private.(*ecdsa.PrivateKey)
	if !ok || !k.private.PublicKey.Equal(pub) {
		return nil, corrupt(rec, "its private key is not that of its certificate", nil)
	}
	return k, nil
}

// readAuthority parses and checks the certificate of a root (root is nil) or issuing key.
func readAuthority(td identity.TrustDomain, rec KeyRecord, root *x509.Certificate) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(rec.Certificate)
	if err != nil {
		return nil, fmt.Errorf("its certificate does not parse")
	}
	signer := root
	if rec.Use == Root {
		signer = cert
	}
	switch {
	case len(cert.URIs) != 1 || cert.URIs[0].String() != td.ID().String():
		return nil, errForeign
	case !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, errors.New("its certificate is not that of an authority")
	case !cert.NotBefore.Equal(rec.NotBefore) || !cert.NotAfter.Equal(rec.NotAfter):
		return nil, errors.New("its period of validity is not that of its certificate")
	case signer == nil || cert.CheckSignatureFrom(signer) != nil:
		return nil, errors.New("its certificate is not signed by the root")
	case cert.NotBefore.Before(signer.NotBefore) || cert.NotAfter.After(signer.NotAfter):
		return nil, errors.New("its certificate outlives the root")
	}
	return cert, nil
}
