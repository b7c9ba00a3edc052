package api

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net/http"
	"strings"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// operators is the group of those who prove themselves by an operator credential.
const operators = "operators"

// maxCredentialBytes bounds an Authorization header.
const maxCredentialBytes = 512

// principal is who asks. Zero value: nobody.
type principal struct {
	name    string // of the operator or machine
	entity  policy.Entity
	machine bool
}

// actor is the principal as audit records name it.
func (p principal) actor() string { return p.entity.UID.String() }

// identify establishes who asks: by the bearer credential if there is an Authorization header, else by the client
// certificate. A credential that is wrong is refused even if the certificate is right: a caller that sends two proofs
// must mean both.
func (s *server) identify(r *http.Request) (principal, error) {
	values := r.Header.Values("Authorization")
	var who principal
	var err error
	switch {
	case len(values) > 0:
		who, err = s.operator(r.Context(), values)
	case r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		who, err = s.machine(r.Context(), r.TLS.PeerCertificates)
	default:
		s.meter.Count("api_unauthenticated", 1, "reason", codeCredential)
		return principal{}, unproven(codeCredential, "the request", "it carries no credential",
			"send the operator credential as Authorization: Bearer, or use a machine's SVID")
	}
	if refused := refusal.As(err); refused != nil && refused.Kind == refusal.Unproven {
		err = s.guesses.wrong(sourceOf(r), err)
		s.meter.Count("api_unauthenticated", 1, "reason", refusal.As(err).Code)
	}
	return who, err
}

// operator verifies a bearer credential. Source: RFC 6750, section 2.1; RFC 9110, 11.1 (the scheme is case-insensitive).
func (s *server) operator(ctx context.Context, values []string) (principal, error) {
	wrong := unproven(codeBadCredential, "the credential", "it is not one this server knows",
		"use the one in operator.json of the server's data directory")
	scheme, secret, ok := strings.Cut(values[0], " ")
	if len(values) != 1 || !ok || len(values[0]) > maxCredentialBytes || !strings.EqualFold(scheme, "Bearer") {
		return principal{}, wrong
	}
	name, ok := s.operators.Verify(ctx, secret)
	if !ok {
		return principal{}, wrong
	}
	return principal{name: name, entity: policy.Entity{
		UID: policy.UID{Type: "User", ID: name}, Parents: []policy.UID{{Type: "Group", ID: operators}},
	}}, nil
}

// machine verifies an SVID that a TLS client showed: the chain against the trust domain's bundle now, the name, and the
// register of machines, which must know the very key and not have revoked it. Whatever the TLS listener verified is
// not relied upon. Source: X509-SVID, section 5.
func (s *server) machine(ctx context.Context, chain []*x509.Certificate) (principal, error) {
	wrong := func(why string) error {
		return unproven(codeBadSVID, "the client certificate", why, "use the current SVID of a machine that has joined this trust domain")
	}
	leaf := chain[0]
	id, err := identity.IDFromCertificate(leaf)
	if err != nil {
		return principal{}, wrong("it is no X509-SVID")
	}
	name, ok := strings.CutPrefix(id.Path(), "/machine/")
	if !ok || id.TrustDomain() != s.trustDomain || strings.Contains(name, "/") {
		return principal{}, wrong("it names no machine of this trust domain")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: s.authority.Bundle().Pool(), Intermediates: between, CurrentTime: s.now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return principal{}, wrong("it was not issued by this trust domain, or is not valid now")
	}
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	if err := s.machines.Authenticate(ctx, name, hex.EncodeToString(sum[:])); err != nil {
		return principal{}, err
	}
	m, err := s.machines.Machine(ctx, name)
	if err != nil {
		return principal{}, err
	}
	return principal{name: name, machine: true, entity: machineEntity(m)}, nil
}

// machineEntity is a machine as policies see it.
func machineEntity(m fleet.Machine) policy.Entity {
	attrs := policy.Record{"name": m.Name, "revoked": m.State == fleet.MachineRevoked, "joined": m.Joined.UTC()}
	if m.Version != "" {
		attrs["version"] = m.Version
	}
	return policy.Entity{UID: policy.UID{Type: "Machine", ID: m.ID}, Attrs: attrs}
}

func unproven(code, what, why, do string) error {
	return &refusal.Error{Kind: refusal.Unproven, Code: code, What: what, Why: why, Do: do}
}
