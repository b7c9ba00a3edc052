package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Config is what a [Client] is made of. Server and Credentials are needed.
type Config struct {
	Server      string // host:port
	Credentials CredentialStore
	Version     string // of the agent; told to the server

	Meter  event.Meter      // nil: event.NoMeter
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now
}

// maxClockSkew is by how much two clocks may differ before it is an error to join, and worth a word in a refusal.
const (
	maxClockSkew  = 5 * time.Minute
	wordClockSkew = time.Minute
	joinWithin    = 20 * time.Second
)

// Client is an agent's end of the agent API. Concurrency: safe.
type Client struct {
	cfg   Config
	meter event.Meter
	log   *slog.Logger

	mu    sync.Mutex   // guards what follows, and orders saving
	creds *Credentials // immutable; swapped whole; nil before the first join
	due   time.Time    // when the certificate is to be renewed, by this machine's clock
}

// Dial returns the client of an agent, with the credentials that are stored. It connects to nothing yet. Errors: a field
// of cfg is missing; matches [ErrCredentials] if what is stored cannot be read.
func Dial(ctx context.Context, cfg Config) (*Client, error) {
	if cfg.Server == "" || cfg.Credentials == nil {
		return nil, errors.New("agent client: Config.Server and Credentials are needed")
	}
	if _, _, err := net.SplitHostPort(cfg.Server); err != nil {
		return nil, refuse(ErrUnreachable, refusal.Invalid, "server "+cfg.Server, "its address is not host:port", "give it as server.example.org:8443")
	}
	if cfg.Meter == nil {
		cfg.Meter = event.NoMeter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	creds, err := cfg.Credentials.Load(ctx)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	c := &Client{cfg: cfg, meter: cfg.Meter, log: cfg.Logger, creds: creds}
	if creds != nil && len(creds.Chain) > 0 {
		c.due = dueAt(creds.Chain[0].NotBefore, creds.Chain[0].NotAfter.Sub(creds.Chain[0].NotBefore))
	}
	return c, nil
}

// minRenewal is the least between two renewals: certificates so short, or a clock so wrong, are not answered by a flood.
const minRenewal = time.Second

// dueAt is half of a life, ±10 % so that agents that joined together do not renew together.
func dueAt(from time.Time, life time.Duration) time.Time {
	half := time.Duration((0.4 + 0.2*mathrand.Float64()) * float64(life)) //nolint:gosec // jitter is no secret
	return from.Add(max(half, minRenewal))
}

// renewAt returns when the certificate is to be renewed, by this machine's clock.
func (c *Client) renewAt() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.due
}

// Identity returns the machine this agent joined as, and its SPIFFE ID. Errors: matches [ErrNotJoined].
func (c *Client) Identity() (machine string, id identity.ID, err error) { return c.current().machine() }

// Bundle returns the trust bundle that the agent has, or nil before it joined.
func (c *Client) Bundle() *identity.Bundle {
	if creds := c.current(); creds != nil {
		return creds.Bundle
	}
	return nil
}

func (c *Client) current() *Credentials {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.creds
}

// save stores new credentials, then uses them.
func (c *Client) save(ctx context.Context, creds *Credentials) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.cfg.Credentials.Save(ctx, creds); err != nil {
		return err
	}
	c.creds = creds
	return nil
}

// Joining says how to join. Anew discards what credentials there are (to take the place of a machine that cannot renew).
type Joining struct {
	Token   string // the text of a [fleet.JoinSecret]
	Machine string
	Facts   identity.FactSet
	Anew    bool
}

// Join redeems a token: the agent is the machine from then on. It trusts whoever proves the root key that the token names,
// and nobody else gets to see the token. An agent that has joined as that machine already is left as it is, and the token
// unused; the key it joins with is stored before it asks, so that a join whose answer was lost can be repeated.
//
// Errors: the server's ([fleet.ErrTokenUsed] and its siblings), [ErrServer], [ErrClock], [ErrUnreachable],
// [ErrAlreadyJoined] as another machine.
func (c *Client) Join(ctx context.Context, j Joining) error {
	if machine, _, err := c.Identity(); err == nil && !j.Anew {
		if machine == j.Machine {
			return nil
		}
		return refuse(ErrAlreadyJoined, refusal.Conflict, "join of machine "+j.Machine, "this agent has joined as machine "+machine,
			"start it as that one, or join anew to be another")
	}
	secret, err := fleet.ParseJoinSecret(j.Token)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, joinWithin)
	defer cancel()
	pending := c.current()
	if pending == nil || len(pending.Chain) > 0 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return fmt.Errorf("make key: %w", err)
		}
		pending = &Credentials{Key: key}
		if !j.Anew { // the old ones are good until there are new ones
			if err := c.save(ctx, pending); err != nil {
				return err
			}
		}
	}
	csr, err := request(pending)
	if err != nil {
		return err
	}
	facts, err := json.Marshal(j.Facts)
	if err != nil {
		return fmt.Errorf("render facts: %w", err)
	}
	conn, err := c.connect(&verifier{pin: &secret.Root, now: c.cfg.Now}, nil)
	if err != nil {
		return err
	}
	defer conn.close()
	// Ask for the time first: a token is not spent on a machine whose certificates would not hold.
	if err := c.checkClock(ctx, conn); err != nil {
		return err
	}
	answer, err := conn.stub.Join(ctx, &agentpb.JoinRequest{
		Token: j.Token, Machine: j.Machine, Csr: csr, Version: c.cfg.Version, Facts: facts,
	})
	if err != nil {
		return c.refused(ctx, conn, err)
	}
	return c.accept(ctx, answer, pending, j.Machine)
}

// checkClock refuses to go on with a clock that is far from the server's.
func (c *Client) checkClock(ctx context.Context, conn *connection) error {
	answer, err := conn.stub.Time(ctx, &agentpb.TimeRequest{})
	if err != nil {
		return c.refused(ctx, conn, err)
	}
	if here, there := c.cfg.Now(), fromMillis(answer.GetServerTime()); here.Sub(there).Abs() > maxClockSkew {
		return clockDiffers(here, there)
	}
	return nil
}

// accept checks what a server answered to a join or a renewal, and keeps it. The server is proven, and still: a wrong answer must not
// make the agent unusable.
func (c *Client) accept(ctx context.Context, answer *agentpb.JoinResponse, asked *Credentials, machine string) error {
	chain, err := chainOf(answer.GetChain())
	if err != nil {
		return err
	}
	creds := &Credentials{Key: asked.Key, Chain: chain}
	got, id, err := creds.machine()
	if err != nil || got != machine {
		return malformed("certificate from the server", "it is not that of this machine")
	}
	if pub, ok := asked.Key.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(chain[0].PublicKey) {
		return malformed("certificate from the server", "it is not of the key that was asked for")
	}
	if creds.Bundle, err = identity.ParseBundle(id.TrustDomain(), answer.GetBundle()); err != nil || len(creds.Bundle.X509Authorities) == 0 {
		return malformed("trust bundle from the server", "it cannot be parsed")
	}
	if err := c.save(ctx, creds); err != nil {
		return err
	}
	// How long it holds is the server's clock's affair; when that is over, this one's.
	life := creds.Chain[0].NotAfter.Sub(fromMillis(answer.GetServerTime()))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.due = dueAt(c.cfg.Now(), life)
	return nil
}

func request(c *Credentials) ([]byte, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, c.Key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return csr, nil
}

// renew asks for a new certificate, with a new key.
func (c *Client) renew(ctx context.Context, conn *connection) error {
	machine, _, err := c.Identity()
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	next := &Credentials{Key: key}
	csr, err := request(next)
	if err != nil {
		return err
	}
	answer, err := conn.stub.Renew(ctx, &agentpb.RenewRequest{Csr: csr, Version: c.cfg.Version})
	if err != nil {
		return c.refused(ctx, conn, err)
	}
	if err := c.accept(ctx, answer, next, machine); err != nil {
		return err
	}
	c.meter.Count("agentclient_renewals", 1)
	return nil
}

// connection is one connection to the server, made when it is first used.
type connection struct {
	verifier *verifier
	grpc     *grpc.ClientConn
	stub     agentpb.AgentClient
}

func (c *connection) close() { _ = c.grpc.Close() }

// connect returns a connection to whoever the verifier accepts, with the agent's certificate if creds is set.
func (c *Client) connect(v *verifier, creds *Credentials) (*connection, error) {
	host, _, err := net.SplitHostPort(c.cfg.Server)
	if err != nil {
		return nil, err
	}
	config := v.config(host, nil)
	if creds != nil {
		config = v.config(host, creds.certificate())
	}
	conn, err := grpc.NewClient("passthrough:///"+c.cfg.Server,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponseBytes), grpc.MaxCallSendMsgSize(maxRequestBytes)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 500 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}, MinConnectTimeout: handshakeWithin}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", c.cfg.Server, err)
	}
	return &connection{verifier: v, grpc: conn, stub: agentpb.NewAgentClient(conn)}, nil
}

// dial returns a connection with the agent's own certificate.
func (c *Client) dial() (*connection, error) {
	creds := c.current()
	if _, _, err := creds.machine(); err != nil {
		return nil, err
	}
	return c.connect(&verifier{bundle: c.Bundle, now: c.cfg.Now}, creds)
}

// refused turns what a call failed with into a refusal that says all that can be known: the handshake's own, the server's,
// and whether the clocks differ.
func (c *Client) refused(ctx context.Context, conn *connection, err error) *refusal.Error {
	e, there := fromStatus(err)
	if failed := conn.verifier.failed.Load(); failed != nil && there.IsZero() {
		e = failed
		if errors.Is(failed, ErrClock) {
			if by, ok := c.askTime(ctx, conn.verifier); ok {
				e = clockDiffers(c.cfg.Now(), by)
			}
		}
	} else if here := c.cfg.Now(); !there.IsZero() && here.Sub(there).Abs() > wordClockSkew {
		e.Why += "; " + howFar(here, there)
	}
	if e.Code == ErrUnreachable.Code {
		e.What = "server " + c.cfg.Server
	}
	c.meter.Count("agentclient_refused", 1, "code", e.Code)
	return e
}

// askTime asks the server's time although its certificate is not of this time, to be told in an error and for nothing
// else: all the rest of it is verified, and nothing is sent.
func (c *Client) askTime(ctx context.Context, v *verifier) (time.Time, bool) {
	conn, err := c.connect(&verifier{pin: v.pin, bundle: v.bundle, now: v.now, anyEnd: true}, nil)
	if err != nil {
		return time.Time{}, false
	}
	defer conn.close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	answer, err := conn.stub.Time(ctx, &agentpb.TimeRequest{})
	if err != nil {
		return time.Time{}, false
	}
	at := fromMillis(answer.GetServerTime())
	return at, !at.IsZero()
}
