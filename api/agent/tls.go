package agent

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// curves are those offered and accepted: the hybrid first, so that what is recorded today stays closed to the quantum
// computers of tomorrow (draft-ietf-tls-ecdhe-mlkem).
var curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}

// serverTLS returns the server's configuration. Client certificates are asked for, and their key proven by the handshake;
// whom they name is verified on each call, against the bundle as it is then.
func serverTLS(get func(*tls.ClientHelloInfo) (*tls.Certificate, error), bundle func() *identity.Bundle) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       curves,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true, // every connection proves its key anew
		NextProtos:             []string{"h2"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := get(hello)
			if err != nil {
				return nil, err
			}
			return withRoots(cert, bundle()), nil
		},
	}
}

// withRoots adds the roots to a chain: an agent that joins knows nothing but the hash of one, and must see it.
func withRoots(cert *tls.Certificate, bundle *identity.Bundle) *tls.Certificate {
	out := *cert
	out.Certificate = append([][]byte(nil), cert.Certificate...)
	for _, root := range bundle.X509Authorities[:min(len(bundle.X509Authorities), maxChain-4)] {
		out.Certificate = append(out.Certificate, root.Raw)
	}
	return &out
}

// verifier verifies the server on behalf of a client: by the bundle, or when it has none yet, by the hash of a root.
type verifier struct {
	pin    *[32]byte               // of a root's SubjectPublicKeyInfo; nil once there is a bundle
	bundle func() *identity.Bundle // nil while pinned
	now    func() time.Time
	anyEnd bool                          // accept a certificate whose time is not now: only to ask the server's time
	failed atomic.Pointer[refusal.Error] // why the last handshake failed; nil after one that did not
}

// config returns the client's configuration; cert may be nil.
func (v *verifier) config(serverName string, cert *tls.Certificate) *tls.Config {
	c := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: curves,
		ServerName:       serverName,
		NextProtos:       []string{"h2"},
		// The server is known by its SPIFFE ID, not by a DNS name: VerifyConnection does all that is skipped here, and more.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(cs tls.ConnectionState) error {
			err := v.verify(cs.PeerCertificates)
			v.failed.Store(refusal.As(err))
			return err
		},
	}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return c
}

const checkServer = "check the address, and that nothing stands between this machine and the server; then join anew with a token of that server"

// verify checks the chain of whoever answers. Source: X509-SVID, section 5.
func (v *verifier) verify(certs []*x509.Certificate) error {
	unproven := func(why string) error {
		return refuse(ErrServer, refusal.Unproven, "connection to the server", why, checkServer)
	}
	if len(certs) == 0 || len(certs) > maxChain+4 {
		return unproven("it shows no certificate, or too many")
	}
	leaf := certs[0]
	id, err := identity.IDFromCertificate(leaf)
	if err != nil {
		return unproven("its certificate is no X509-SVID")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	if v.pin != nil {
		found := false
		for _, c := range certs[1:] {
			if c.IsCA && sha256.Sum256(c.RawSubjectPublicKeyInfo) == *v.pin {
				roots.AddCert(c)
				found = true
			}
		}
		if !found {
			return unproven("it is not the server that the join token is for: the root key is another")
		}
	} else {
		b := v.bundle()
		if b == nil {
			return unproven("this agent has no trust bundle")
		}
		if id.TrustDomain() != b.TrustDomain {
			return unproven("it is of trust domain " + id.TrustDomain().String() + ", and not of " + b.TrustDomain.String())
		}
		roots = b.Pool()
	}
	if id != fleet.ServerID(id.TrustDomain()) {
		return unproven("it is " + id.String() + ", and not the server")
	}
	for _, c := range certs[1:] {
		intermediates.AddCert(c)
	}
	now := v.now()
	opts := x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if _, err = leaf.Verify(opts); err == nil {
		return nil
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		// Is it the time alone? Then it is rather this machine's clock that is wrong.
		opts.CurrentTime = leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
		if _, again := leaf.Verify(opts); again == nil {
			if v.anyEnd {
				return nil
			}
			return refuse(ErrClock, refusal.Unproven, "connection to the server",
				fmt.Sprintf("its certificate is valid from %s to %s, and this machine's clock says %s", stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(now)),
				setClock)
		}
	}
	return unproven("its certificate does not verify against the roots that this agent trusts")
}

const setClock = "set the clock of this machine (or of the server, if that one is wrong), for good with NTP"

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// clockDiffers is the refusal for two clocks that say different times.
func clockDiffers(here, there time.Time) *refusal.Error {
	return refuse(ErrClock, refusal.Unproven, "connection to the server", howFar(here, there)+
		fmt.Sprintf(" (here %s, there %s), and certificates hold for hours only", stamp(here), stamp(there)), setClock)
}

func howFar(here, there time.Time) string {
	d := here.Sub(there).Round(time.Second)
	if d < 0 {
		return "the clock of this machine is " + (-d).String() + " behind the server's"
	}
	return "the clock of this machine is " + d.String() + " ahead of the server's"
}
