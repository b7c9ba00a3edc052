// Command spiffeclient is the official go-spiffe client as a program: an independent check of the Workload API. It prints
// one JSON line for each thing that it learns. It is a program of its own because its generated protobuf code and ours
// have the same names, of which a process can hold one set only.
//
//	spiffeclient x509 [-write DIR]                     one line; DIR gets svid.pem, key.pem and bundle.pem
//	spiffeclient watch                                 a line for each update and each error, until killed
//	spiffeclient bundles                               one line
//	spiffeclient jwt -audience A [-subject ID]         one line
//	spiffeclient validate -audience A                  one line; the token is read from standard input
//
// The endpoint is SPIFFE_ENDPOINT_SOCKET, as the standard has it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
)

// line is what is printed; every command fills in what it has.
type line struct {
	Kind        string         `json:"kind"` // x509, bundles, jwt, validated, error
	SVIDs       []svid         `json:"svids,omitempty"`
	X509Bundles map[string]int `json:"x509_bundles,omitempty"` // authorities by trust domain
	JWTBundles  map[string]int `json:"jwt_bundles,omitempty"`
	ID          string         `json:"id,omitempty"`
	Token       string         `json:"token,omitempty"`
	Audience    []string       `json:"audience,omitempty"`
	Verified    bool           `json:"verified,omitempty"` // by go-spiffe, against the bundles from the same API
	Code        string         `json:"code,omitempty"`
	Message     string         `json:"message,omitempty"`
}

type svid struct {
	ID      string    `json:"id"`
	Hint    string    `json:"hint,omitempty"`
	Serial  string    `json:"serial"`
	Chain   int       `json:"chain"`
	Expires time.Time `json:"expires"`
}

var printing sync.Mutex

func printLine(l line) {
	printing.Lock()
	defer printing.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(l)
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: spiffeclient x509|watch|bundles|jwt|validate [flags]")
		os.Exit(2)
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	audience := flags.String("audience", "", "audience of the JWT-SVID")
	subject := flags.String("subject", "", "SPIFFE ID of the JWT-SVID")
	write := flags.String("write", "", "directory to write svid.pem, key.pem and bundle.pem to")
	_ = flags.Parse(os.Args[2:])
	if err := run(os.Args[1], *audience, *subject, *write); err != nil {
		st := status.Convert(err)
		printLine(line{Kind: "error", Code: st.Code().String(), Message: st.Message()})
		os.Exit(1)
	}
}

func run(command, audience, subject, dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	switch command {
	case "x509":
		got, err := client.FetchX509Context(ctx)
		if err != nil {
			return err
		}
		printLine(describe(got))
		if dir != "" {
			return save(dir, got)
		}
		return nil
	case "watch":
		return client.WatchX509Context(context.Background(), watcher{})
	case "bundles":
		return bundles(ctx, client)
	case "jwt":
		return jwt(ctx, client, audience, subject)
	case "validate":
		token, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		got, err := client.ValidateJWTSVID(ctx, strings.TrimSpace(string(token)), audience)
		if err != nil {
			return err
		}
		printLine(line{Kind: "validated", ID: got.ID.String(), Audience: got.Audience})
		return nil
	default:
		return fmt.Errorf("no command %q", command)
	}
}

type watcher struct{}

func (watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { printLine(describe(c)) }

func (watcher) OnX509ContextWatchError(err error) {
	st := status.Convert(err)
	printLine(line{Kind: "error", Code: st.Code().String(), Message: st.Message()})
}

// describe verifies each SVID against the bundles that came with it.
func describe(c *workloadapi.X509Context) line {
	l := line{Kind: "x509", X509Bundles: map[string]int{}, Verified: true}
	for _, s := range c.SVIDs {
		leaf := s.Certificates[0]
		l.SVIDs = append(l.SVIDs, svid{
			ID: s.ID.String(), Hint: s.Hint, Serial: leaf.SerialNumber.Text(16), Chain: len(s.Certificates), Expires: leaf.NotAfter,
		})
		if _, _, err := x509svid.Verify(s.Certificates, c.Bundles); err != nil {
			l.Verified, l.Message = false, err.Error()
		}
	}
	for _, b := range c.Bundles.Bundles() {
		l.X509Bundles[b.TrustDomain().IDString()] = len(b.X509Authorities())
	}
	return l
}

func save(dir string, c *workloadapi.X509Context) error {
	s := c.DefaultSVID()
	chain, key, err := s.Marshal()
	if err != nil {
		return err
	}
	bundle, err := c.Bundles.GetX509BundleForTrustDomain(s.ID.TrustDomain())
	if err != nil {
		return err
	}
	roots, err := bundle.Marshal()
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{"svid.pem": chain, "key.pem": key, "bundle.pem": roots} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func bundles(ctx context.Context, client *workloadapi.Client) error {
	x, err := client.FetchX509Bundles(ctx)
	if err != nil {
		return err
	}
	j, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	l := line{Kind: "bundles", X509Bundles: map[string]int{}, JWTBundles: map[string]int{}}
	for _, b := range x.Bundles() {
		l.X509Bundles[b.TrustDomain().IDString()] = len(b.X509Authorities())
	}
	for _, b := range j.Bundles() {
		l.JWTBundles[b.TrustDomain().IDString()] = len(b.JWTAuthorities())
	}
	printLine(l)
	return nil
}

func jwt(ctx context.Context, client *workloadapi.Client, audience, subject string) error {
	params := jwtsvid.Params{Audience: audience}
	if subject != "" {
		id, err := spiffeid.FromString(subject)
		if err != nil {
			return err
		}
		params.Subject = id
	}
	got, err := client.FetchJWTSVID(ctx, params)
	if err != nil {
		return err
	}
	keys, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	l := line{Kind: "jwt", ID: got.ID.String(), Audience: got.Audience, Token: got.Marshal()}
	if _, err := jwtsvid.ParseAndValidate(got.Marshal(), jwtbundle.Source(keys), []string{audience}); err != nil {
		l.Message = err.Error()
	} else {
		l.Verified = true
	}
	printLine(l)
	return nil
}
