package workload

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// Client asks a Workload API for the documents of the process that it runs in. It is what `redoubt identity fetch` is made
// of; programs have SPIFFE libraries of their own. Concurrency: safe.
type Client struct {
	conn *grpc.ClientConn
	api  gen.SpiffeWorkloadAPIClient
}

// NewClient returns a client of the Workload API at addr, "unix:///path". It connects with the first call.
// Source: SPIFFE Workload Endpoint, section 4.
func NewClient(addr string) (*Client, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: "workload-api-address", What: "Workload API address", Why: "it is not unix:// and an absolute path",
			Do: "run this as a workload (redoubt run), where SPIFFE_ENDPOINT_SOCKET is set, or set it",
		}
	}
	conn, err := grpc.NewClient("passthrough:///workload-api", grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, path) }))
	if err != nil {
		return nil, fmt.Errorf("workload API client: %w", err)
	}
	return &Client{conn: conn, api: gen.NewSpiffeWorkloadAPIClient(conn)}, nil
}

// dial connects to a unix socket. While the queue of the socket is full, the kernel answers EAGAIN instead of letting the
// caller wait (unix(7)): a crowd of others is no reason to give up.
func dial(ctx context.Context, path string) (net.Conn, error) {
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// withHeader adds the header without which the API answers nobody. Source: SPIFFE Workload Endpoint, section 3.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// FetchX509 returns the caller's X.509-SVIDs and the roots to verify others of the trust domain. Trust: the keys are secret.
func (c *Client) FetchX509(ctx context.Context) ([]*identity.X509SVID, []*x509.Certificate, error) {
	ctx, cancel := context.WithCancel(withHeader(ctx))
	defer cancel()
	stream, err := c.api.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		return nil, nil, refused("X509-SVID", err)
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, nil, refused("X509-SVID", err)
	}
	var svids []*identity.X509SVID
	var roots []*x509.Certificate
	for _, s := range resp.GetSvids() {
		id, err := identity.ParseID(s.GetSpiffeId())
		if err != nil {
			return nil, nil, err
		}
		chain, err := x509.ParseCertificates(s.GetX509Svid())
		if err != nil {
			return nil, nil, fmt.Errorf("X509-SVID of %s: %w", id, err)
		}
		key, err := x509.ParsePKCS8PrivateKey(s.GetX509SvidKey())
		if err != nil {
			return nil, nil, fmt.Errorf("key of %s: %w", id, err)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, nil, errors.New("the key of an X509-SVID cannot sign")
		}
		svids = append(svids, &identity.X509SVID{ID: id, Chain: chain, Key: signer, Hint: s.GetHint()})
		if roots == nil {
			if roots, err = x509.ParseCertificates(s.GetBundle()); err != nil {
				return nil, nil, fmt.Errorf("bundle: %w", err)
			}
		}
	}
	return svids, roots, nil
}

// FetchJWT returns JWT-SVIDs for the audience, of `only` if it is not zero. Expires is not read out of the token here.
// Trust: the tokens are secret.
func (c *Client) FetchJWT(ctx context.Context, audience []string, only identity.ID) ([]*identity.JWTSVID, error) {
	resp, err := c.api.FetchJWTSVID(withHeader(ctx), &gen.JWTSVIDRequest{Audience: audience, SpiffeId: only.String()})
	if err != nil {
		return nil, refused("JWT-SVID", err)
	}
	var out []*identity.JWTSVID
	for _, s := range resp.GetSvids() {
		id, err := identity.ParseID(s.GetSpiffeId())
		if err != nil {
			return nil, err
		}
		out = append(out, &identity.JWTSVID{ID: id, Token: s.GetSvid(), Audience: audience, Hint: s.GetHint()})
	}
	return out, nil
}

// refused turns an answer of the API into a refusal with the API's own words.
func refused(what string, err error) error {
	s := status.Convert(err)
	kind := refusal.Denied
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		kind = refusal.Unavailable
	case codes.InvalidArgument:
		kind = refusal.Invalid
	case codes.ResourceExhausted:
		kind = refusal.Exhausted
	default: // PERMISSION_DENIED, as the standard has it for everything that is about who asks
	}
	return &refusal.Error{
		Kind: kind, Code: "workload-api-" + strings.ToLower(s.Code().String()), What: what, Why: s.Message(),
		Do: "redoubt identity explain PID, as root, says what this process is attested as", Err: err,
	}
}

// FetchTimeout is enough for a workload that asks while it is still being attested.
const FetchTimeout = 15 * time.Second
