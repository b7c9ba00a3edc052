package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// SignOptions are the names beside the ID in the certificate of the server itself ([Config].ServerID), for clients that
// know it by DNS name or address. For any other ID they are refused.
type SignOptions struct {
	DNSNames  []string
	Addresses []netip.Addr
}

// maxNames bounds the DNS names and the addresses of one certificate.
const maxNames = 32

// dnsName is a host name (RFC 1123, 2.1) in lower case, without wildcards, of at most 253 bytes.
var dnsName = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// SignX509 signs an X509-SVID for id and the public key pub, and returns leaf and issuing certificate; the root is in
// the bundle. A ttl of 0 means Config.SVIDTTL; at most Config.AgentTTL may be asked. The SVID ends no later than its
// issuing certificate; if that leaves less than half of ttl, it is refused.
//
// Errors: matches [ErrForeignID], [ErrWeakKey], [ErrTTL], [ErrNames], [ErrTooShort], [ErrNotYetValid] or [ErrExpired].
// Trust: the caller has decided that the holder of pub is id, and has seen the proof that it holds it ([ParseCSR]).
// Source: X509-SVID, sections 2 to 4.
func (a *Authority) SignX509(ctx context.Context, id identity.ID, pub crypto.PublicKey, ttl time.Duration, opts SignOptions) ([]*x509.Certificate, error) {
	chain, err := a.signX509(ctx, id, pub, ttl, opts)
	if err != nil {
		return nil, a.refused(err)
	}
	a.meter.Count("ca_svids_signed", 1, "kind", "x509")
	return chain, nil
}

func (a *Authority) signX509(ctx context.Context, id identity.ID, pub crypto.PublicKey, ttl time.Duration, opts SignOptions) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.checkID(id); err != nil {
		return nil, err
	}
	if err := checkPublicKey(pub); err != nil {
		return nil, err
	}
	ttl, err := checkTTL(id, ttl, a.cfg.SVIDTTL, max(a.cfg.AgentTTL, a.cfg.SVIDTTL))
	if err != nil {
		return nil, err
	}
	ips, err := a.checkNames(id, opts)
	if err != nil {
		return nil, err
	}
	issuing := a.current.Load().active(X509)
	life, err := within(issuing.span(), a.now(), ttl, leastSVID(ttl), subject(id), "the issuing certificate")
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		URIs:         []*url.URL{id.URL()}, // the subject stays empty, so this SAN is critical (RFC 5280, 4.1.2.6)
		DNSNames:     opts.DNSNames, IPAddresses: ips,
		NotBefore: life.notBefore, NotAfter: life.notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	// It verifies the signature that it has made, so a faulty signer hands out nothing.
	der, err := x509.CreateCertificate(rand.Reader, template, issuing.cert, pub, issuing.private)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", subject(id), err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back %s: %w", subject(id), err)
	}
	if err := checkLeaf(leaf, issuing.cert, id, pub, life); err != nil {
		return nil, fmt.Errorf("verify %s: %w", subject(id), err)
	}
	return []*x509.Certificate{leaf, issuing.cert}, nil
}

// checkLeaf verifies a signed certificate before it is handed out: that it is an SVID of id for this key, within the
// span that was computed, and names its issuer. Its signature was verified when it was made, and its issuer when it was read.
func checkLeaf(leaf, issuer *x509.Certificate, id identity.ID, pub crypto.PublicKey, life span) error {
	got, err := identity.IDFromCertificate(leaf)
	if err != nil {
		return err
	}
	signed, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case got != id:
		return fmt.Errorf("it names %s", got)
	case !ok || !signed.Equal(pub):
		return errors.New("it is for another key")
	case !leaf.NotBefore.Equal(life.notBefore) || !leaf.NotAfter.Equal(life.notAfter):
		return errors.New("its period of validity is another")
	case leaf.NotBefore.Before(issuer.NotBefore) || leaf.NotAfter.After(issuer.NotAfter):
		return errors.New("it outlives its issuer")
	case !bytes.Equal(leaf.RawIssuer, issuer.RawSubject) || !bytes.Equal(leaf.AuthorityKeyId, issuer.SubjectKeyId):
		return errors.New("it names another issuer")
	case !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}):
		return errors.New("its extended key usage is another")
	}
	return nil
}

// checkID refuses an ID of another trust domain, and that of the trust domain itself, which only signing certificates
// carry (X509-SVID, section 5.2: a leaf has a path).
func (a *Authority) checkID(id identity.ID) error {
	if id.TrustDomain() != a.cfg.TrustDomain || id.Path() == "" {
		return refuse(ErrForeignID, refusal.Invalid, subject(id), "it is not below the trust domain "+a.cfg.TrustDomain.String(),
			"correct the issuance rule")
	}
	return nil
}

// checkTTL returns what is given when ttl is asked.
func checkTTL(id identity.ID, ttl, normal, most time.Duration) (time.Duration, error) {
	if ttl == 0 {
		return normal, nil
	}
	if ttl < MinTTL || ttl > most {
		return 0, refuse(ErrTTL, refusal.Invalid, subject(id), fmt.Sprintf("a lifetime of %s is not between %s and %s", ttl, MinTTL, most),
			"ask for another, or for 0, which means "+normal.String())
	}
	return ttl, nil
}

// checkNames refuses names for anyone but the server, and malformed ones.
func (a *Authority) checkNames(id identity.ID, opts SignOptions) ([]net.IP, error) {
	if len(opts.DNSNames) == 0 && len(opts.Addresses) == 0 {
		return nil, nil
	}
	no := func(why string) error {
		return refuse(ErrNames, refusal.Invalid, subject(id), why, "correct the server's names in the configuration")
	}
	if id != a.cfg.ServerID {
		return nil, no("only the server's own certificate, that of " + a.cfg.ServerID.String() + ", has DNS names or addresses")
	}
	if len(opts.DNSNames) > maxNames || len(opts.Addresses) > maxNames {
		return nil, no(fmt.Sprintf("it has more than %d names or addresses", maxNames))
	}
	for i, name := range opts.DNSNames {
		if len(name) > 253 || !dnsName.MatchString(name) {
			return nil, no(fmt.Sprintf("its DNS name number %d is not a host name in lower case without wildcards", i+1))
		}
	}
	var ips []net.IP
	for i, addr := range opts.Addresses {
		if !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "" {
			return nil, no(fmt.Sprintf("its address number %d is not that of a host", i+1))
		}
		ips = append(ips, addr.Unmap().AsSlice())
	}
	return ips, nil
}
