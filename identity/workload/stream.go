package workload

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// FetchX509SVID streams the caller's X.509-SVIDs. Source: SPIFFE Workload API, section 5.2.1.
func (s *service) FetchX509SVID(_ *gen.X509SVIDRequest, stream grpc.ServerStreamingServer[gen.X509SVIDResponse]) error {
	return push(s, stream, s.source.X509, renderX509)
}

// FetchX509Bundles streams the X.509 bundles. Source: SPIFFE Workload API, section 5.2.2.
func (s *service) FetchX509Bundles(_ *gen.X509BundlesRequest, stream grpc.ServerStreamingServer[gen.X509BundlesResponse]) error {
	return push(s, stream, s.source.Bundles, renderX509Bundles)
}

// FetchJWTBundles streams the JWT bundles. Source: SPIFFE Workload API, section 6.2.2.
func (s *service) FetchJWTBundles(_ *gen.JWTBundlesRequest, stream grpc.ServerStreamingServer[gen.JWTBundlesResponse]) error {
	return push(s, stream, s.source.Bundles, renderJWTBundles)
}

// push sends what the source has, in full, now and after each change that alters it, for as long as the caller lives.
// A client that does not read holds up its own stream only; when it reads again it gets the latest, not what lies between.
func push[R any](
	s *service, stream grpc.ServerStreamingServer[R],
	fetch func(context.Context, *Caller) (Update, error), render func(Update) (*R, error),
) error {
	ctx := stream.Context()
	c, err := connOf(ctx)
	if err != nil {
		return err
	}
	var sent [sha256.Size]byte // of the last message; the zero value is no digest
	for {
		update, err := fetch(ctx, c.caller)
		if err != nil {
			return err
		}
		message, err := render(update)
		if err != nil {
			return err
		}
		digest, err := digestOf(any(message).(proto.Message)) // R is one of the generated messages
		if err != nil {
			return err
		}
		// The caller may have ended, or been moved, since it was looked at last; its socket may be anybody's.
		if err := c.caller.Verify(); err != nil {
			return err
		}
		if digest != sent {
			if err := stream.Send(message); err != nil {
				return err
			}
			sent = digest
		}
		if err := s.waitChange(ctx, c, update.Changed); err != nil {
			return err
		}
	}
}

// waitChange returns nil when there may be something new, or why the stream ends.
func (s *service) waitChange(ctx context.Context, c *conn, changed <-chan struct{}) error {
	settle := time.NewTimer(pushInterval)
	defer settle.Stop()
	for settled := false; ; {
		next := changed
		if !settled {
			next = nil
		}
		select {
		case <-settle.C:
			settled = true
		case <-next:
			return nil
		case <-c.gone:
			return callerGone()
		case <-s.stopping:
			return &refusal.Error{
				Kind: refusal.Unavailable, Code: "agent-stopping", What: "Workload API",
				Why: "the agent is stopping", Do: "connect again with a backoff; SVIDs stay valid until they expire",
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// digestOf tells messages apart without keeping one, as they hold private keys.
func digestOf(m proto.Message) ([sha256.Size]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("render response: %w", err)
	}
	defer clear(b)
	return sha256.Sum256(b), nil
}

func renderX509(u Update) (*gen.X509SVIDResponse, error) {
	if len(u.SVIDs) == 0 {
		return nil, &refusal.Error{
			Kind: refusal.Denied, Code: ErrNoIdentity.Code, What: "X.509-SVID",
			Why: "the caller has no identity", Do: "add an issuance rule that matches it, or start it with redoubt run",
		}
	}
	resp := &gen.X509SVIDResponse{}
	own := map[identity.TrustDomain]bool{}
	hints := map[string]bool{}
	for _, svid := range u.SVIDs {
		td := svid.ID.TrustDomain()
		bundle := bundleOf(u.Bundles, td)
		if bundle == nil || len(svid.Chain) == 0 {
			return nil, fmt.Errorf("render %s: no chain, or no bundle of its trust domain", svid)
		}
		key, err := x509.MarshalPKCS8PrivateKey(svid.Key)
		if err != nil {
			return nil, fmt.Errorf("render key of %s: %w", svid, err)
		}
		out := &gen.X509SVID{
			SpiffeId: svid.ID.String(), X509Svid: concat(svid.Chain), X509SvidKey: key,
			Bundle: concat(bundle.X509Authorities), Hint: uniqueHint(hints, svid.Hint),
		}
		own[td] = true
		resp.Svids = append(resp.Svids, out)
	}
	for _, b := range u.Bundles {
		if own[b.TrustDomain] || len(b.X509Authorities) == 0 {
			continue
		}
		if resp.FederatedBundles == nil {
			resp.FederatedBundles = map[string][]byte{}
		}
		resp.FederatedBundles[b.TrustDomain.ID().String()] = concat(b.X509Authorities)
	}
	return resp, nil
}

// uniqueHint returns hint the first time and "" after that: hints are unique within a response.
// Source: SPIFFE Workload API, sections 5.2.1 and 6.2.1.
func uniqueHint(used map[string]bool, hint string) string {
	if hint == "" || used[hint] {
		return ""
	}
	used[hint] = true
	return hint
}

func renderX509Bundles(u Update) (*gen.X509BundlesResponse, error) {
	resp := &gen.X509BundlesResponse{Bundles: map[string][]byte{}}
	for _, b := range u.Bundles {
		if len(b.X509Authorities) > 0 {
			resp.Bundles[b.TrustDomain.ID().String()] = concat(b.X509Authorities)
		}
	}
	if len(resp.Bundles) == 0 {
		return nil, noBundle()
	}
	return resp, nil
}

func renderJWTBundles(u Update) (*gen.JWTBundlesResponse, error) {
	if len(u.Bundles) == 0 {
		return nil, noBundle()
	}
	resp := &gen.JWTBundlesResponse{Bundles: map[string][]byte{}}
	for _, b := range u.Bundles {
		keys, err := b.JWTKeys("")
		if err != nil {
			return nil, err
		}
		set, err := json.Marshal(map[string][]json.RawMessage{"keys": keys})
		if err != nil {
			return nil, fmt.Errorf("render JWT bundle: %w", err)
		}
		resp.Bundles[b.TrustDomain.ID().String()] = set
	}
	return resp, nil
}

func noBundle() error {
	return &refusal.Error{
		Kind: refusal.Denied, Code: "no-bundle", What: "trust bundles", Why: "there is none that the caller may have",
		Do: "see redoubt doctor for the state of the agent",
	}
}

func bundleOf(bundles []*identity.Bundle, td identity.TrustDomain) *identity.Bundle {
	for _, b := range bundles {
		if b.TrustDomain == td {
			return b
		}
	}
	return nil
}

func concat(certs []*x509.Certificate) []byte {
	var der []byte
	for _, c := range certs {
		der = append(der, c.Raw...)
	}
	return der
}
