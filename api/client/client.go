package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of refusals that the client makes itself; compare with errors.Is.
var (
	// ErrUnreachable: no answer came. Whether the request was carried out is not known.
	ErrUnreachable = &refusal.Error{Code: "server-unreachable"}
	// ErrUntrusted: what answered did not prove to be the server.
	ErrUntrusted = &refusal.Error{Code: "server-not-trusted"}
	// ErrConfig: the client's own configuration.
	ErrConfig = &refusal.Error{Code: "client-config"}
)

// Credential is an operator's bearer secret. It redacts itself wherever it is formatted, logged or rendered.
type Credential string

// String implements fmt.Stringer.
func (Credential) String() string { return "(redacted)" }

// GoString implements fmt.GoStringer.
func (Credential) GoString() string { return "(redacted)" }

// MarshalText implements encoding.TextMarshaler.
func (Credential) MarshalText() ([]byte, error) { return []byte("(redacted)"), nil }

// LogValue implements slog.LogValuer.
func (Credential) LogValue() slog.Value { return slog.StringValue("(redacted)") }

// Config is how to reach a server, and as whom.
type Config struct {
	// Base is https://host:port, or unix:///path/to/socket. Plain http is refused: the credential would be readable.
	Base string
	// Roots are the CA certificates, in PEM, of which one must have issued the server's; no others are believed. Needed
	// for https.
	Roots []byte
	// ServerName is the name expected in the server's certificate, if it is not the host of Base.
	ServerName string
	// Credential is sent in the Authorization header.
	Credential Credential
	// Certificate is shown to the server instead of a Credential: a machine's SVID.
	Certificate *tls.Certificate
	// Timeout bounds one request, streams excepted; default 90 s, which is longer than any operation takes.
	Timeout time.Duration
	// UserAgent names the program; default "redoubt".
	UserAgent string
}

// The bounds of the client.
const (
	defaultTimeout = 90 * time.Second
	maxAnswer      = 64 << 20
	attempts       = 3 // of what may be repeated, if no answer came
	attemptPause   = 200 * time.Millisecond
)

// Client speaks to one server. Concurrency: safe.
type Client struct {
	base       *url.URL
	http       *http.Client
	credential Credential
	timeout    time.Duration
	agent      string
}

// New returns a client; it connects when it is first used. Errors: matches [ErrConfig].
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.Base)
	if err != nil {
		return nil, badConfig("the server's address", "it is no URL")
	}
	c := &Client{
		base: base, credential: cfg.Credential, timeout: cmp.Or(cfg.Timeout, defaultTimeout), agent: cmp.Or(cfg.UserAgent, "redoubt"),
	}
	transport := &http.Transport{ // no proxy: the server is ours, and near
		MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second, TLSHandshakeTimeout: 10 * time.Second, ForceAttemptHTTP2: true,
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	dialer.SetMultipathTCP(false)
	transport.DialContext = dialer.DialContext
	switch {
	case base.User != nil || base.RawQuery != "" || base.Fragment != "":
		return nil, badConfig("the server's address", "it has user, query or fragment")
	case base.Scheme == "https" && base.Host != "" && strings.Trim(base.Path, "/") == "":
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(cfg.Roots) {
			return nil, badConfig("the CA bundle", "it has no certificate in PEM")
		}
		transport.TLSClientConfig = &tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: cfg.ServerName,
			CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		}
		if cfg.Certificate != nil {
			transport.TLSClientConfig.Certificates = []tls.Certificate{*cfg.Certificate}
		}
		c.base = &url.URL{Scheme: "https", Host: base.Host}
	case base.Scheme == "unix" && base.Host == "" && base.Path != "":
		path := base.Path
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) }
		c.base = &url.URL{Scheme: "http", Host: "redoubt"}
	default:
		return nil, badConfig("the server's address", "it is neither https://host:port nor unix:///path")
	}
	c.http = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func badConfig(what, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrConfig.Code, What: what, Why: why, Do: "see redoubt help for --server and --data",
	}
}

// exchange is one request and where its answer goes.
type exchange struct {
	method  string
	path    string // escaped
	query   url.Values
	in      any // rendered as JSON, unless nil
	out     any // filled from JSON, or *[]byte; unless nil
	ifMatch string
	creates bool
}

// do makes the exchange, and returns the header of the answer. What may be repeated is, if no answer came: reading, and
// creating under an idempotency key.
func (c *Client) do(ctx context.Context, e exchange) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var body []byte
	if e.in != nil {
		var err error
		if body, err = json.Marshal(e.in); err != nil {
			return nil, fmt.Errorf("render request: %w", err)
		}
	}
	key := ""
	if e.creates {
		key = rand.Text()
	}
	for n := 1; ; n++ {
		resp, err := c.send(ctx, e, body, key) //nolint:bodyclose // answered closes it
		if err == nil {
			return answered(resp, e.out)
		}
		if n == attempts || ctx.Err() != nil || errors.Is(err, ErrUntrusted) || e.method != http.MethodGet && key == "" {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Duration(n) * attemptPause):
		}
	}
}

// send sends the request once. Errors: match [ErrUnreachable] or [ErrUntrusted].
func (c *Client) send(ctx context.Context, e exchange, body []byte, key string) (*http.Response, error) {
	target := *c.base
	target.RawQuery = e.query.Encode()
	text := target.Scheme + "://" + target.Host + e.path
	if target.RawQuery != "" {
		text += "?" + target.RawQuery
	}
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, e.method, text, reader)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Accept", "application/json, application/problem+json")
	req.Header.Set("User-Agent", c.agent)
	if c.credential != "" {
		req.Header.Set("Authorization", "Bearer "+string(c.credential))
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if e.ifMatch != "" {
		req.Header.Set("If-Match", e.ifMatch)
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", `"`+key+`"`)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, unreached(err)
	}
	return resp, nil
}

// unreached says why no answer came. The URL, which error texts of net/http begin with, is left out.
func unreached(err error) error {
	if inner, ok := errors.AsType[*url.Error](err); ok {
		err = inner.Err
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &refusal.Error{
			Kind: refusal.Unproven, Code: ErrUntrusted.Code, What: "the server",
			Why: "its certificate is not of the CA bundle given, not for this name, or not valid now",
			Do:  "check the address, the CA bundle and the clock", Err: err,
		}
	}
	why := err.Error()
	if errors.Is(err, context.DeadlineExceeded) {
		why = "no answer came in time"
	}
	return &refusal.Error{
		Kind: refusal.Unavailable, Code: ErrUnreachable.Code, What: "the server", Why: why,
		Do: "check that it runs, and the address", Err: err,
	}
}

// answered reads an answer into out, or returns the problem that it is.
func answered(resp *http.Response, out any) (http.Header, error) {
	defer func() { _ = resp.Body.Close() }() // it was read
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, unreached(err)
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("the server's answer is longer than %d bytes", maxAnswer)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return resp.Header, problemOf(resp, body)
	}
	switch to := out.(type) {
	case nil:
	case *[]byte:
		*to = body
	default:
		if err := json.Unmarshal(body, out); err != nil {
			return nil, fmt.Errorf("the server's answer is not understood: %w", err)
		}
	}
	return resp.Header, nil
}

// problemOf returns what an answer that is no success says: a refusal, or a plain error.
func problemOf(resp *http.Response, body []byte) error {
	var p Problem
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if media != "application/problem+json" || json.Unmarshal(body, &p) != nil || p.Type == "" {
		return fmt.Errorf("the server answered %d, which is not how this API answers: is the address right?", resp.StatusCode)
	}
	if r := p.Refusal(); r != nil {
		return r
	}
	return &p
}
