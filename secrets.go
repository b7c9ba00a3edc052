package redoubt

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/refusal"
)

// OperatorFile is the operator's credential within the server's data directory, 0600.
const OperatorFile = "operator.json"

// Operator is how an operator reaches a server: where it is, whose certificate it has, and the credential.
// Trust: Credential is secret; the type redacts itself.
type Operator struct {
	Server     string `json:"server"`
	CA         string `json:"ca"` // PEM of the domain's roots
	Credential string `json:"credential"`
}

// String names the server only.
func (o Operator) String() string { return "operator of " + o.Server }

// GoString is [Operator.String].
func (o Operator) GoString() string { return o.String() }

// LoadOperator reads the credential from a data directory. Errors: refusal "no-operator".
func LoadOperator(dir string) (Operator, error) {
	name := filepath.Join(dir, OperatorFile)
	raw, err := os.ReadFile(name)
	if err != nil {
		why := "there is no " + name
		if errors.Is(err, fs.ErrPermission) {
			why = name + " is readable for its owner only"
		}
		return Operator{}, &refusal.Error{
			Kind: refusal.Unproven, Code: "no-operator", What: "find the operator's credential", Why: why,
			Do: "run this on the server's machine as its user, or name the server's data directory with --data", Err: err,
		}
	}
	var o Operator
	if err := json.Unmarshal(raw, &o); err != nil {
		return Operator{}, &refusal.Error{
			Kind: refusal.Unproven, Code: "no-operator", What: "read the operator's credential", Why: name + " is no JSON document",
			Do: "delete it and restart the server, which makes another",
		}
	}
	return o, nil
}

func (o Operator) save(dir string) error {
	raw, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	return writePrivate(filepath.Join(dir, OperatorFile), append(raw, '\n'))
}

// loadCredential returns the operator's credential and its hash, and makes one at the first start.
func loadCredential(dir string) (secret, hash string, err error) {
	o, err := LoadOperator(dir)
	if err != nil && errors.Is(err, fs.ErrNotExist) {
		secret, hash = api.NewCredential()
		return secret, hash, nil
	}
	if err != nil {
		return "", "", err
	}
	if !strings.HasPrefix(o.Credential, "ro1.") || len(o.Credential) != 47 {
		return "", "", &refusal.Error{
			Kind: refusal.Invalid, Code: "bad-operator", What: "operator credential in " + filepath.Join(dir, OperatorFile),
			Why: "it is damaged, and nobody could administer this server with it", Do: "delete the file, and start again: another is made",
		}
	}
	return o.Credential, api.HashCredential(o.Credential), nil
}

// loadKEK reads the key-encryption key, or makes the default one at the first start.
func loadKEK(cfg Config) ([]byte, error) {
	name, ours := cfg.Server.Authority.KEKFile, false
	if name == "" {
		name, ours = filepath.Join(cfg.Data, "kek"), true
	}
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && ours {
		if _, err := os.Stat(filepath.Join(cfg.Data, OperatorFile)); err == nil {
			return nil, badKEK(name, "it is gone, and the authority's keys were sealed with it")
		}
		raw = make([]byte, 32)
		_, _ = rand.Read(raw) // crypto/rand.Read never fails since Go 1.24
		return raw, writePrivate(name, raw)
	}
	if err != nil {
		return nil, badKEK(name, err.Error())
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, badKEK(name, err.Error())
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, badKEK(name, "others than its owner may read it")
	}
	if len(raw) != 32 {
		text := bytes.TrimSpace(raw)
		decoded, err := hex.DecodeString(string(text))
		if err != nil || len(decoded) != 32 {
			return nil, badKEK(name, "it is neither 32 bytes nor 64 hex digits")
		}
		raw = decoded
	}
	return raw, nil
}

func badKEK(name, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: "bad-kek", What: "key-encryption key " + name, Why: why,
		Do: "put back the key (chmod 600) that this authority was made with, or restore a back-up",
	}
}

// writePrivate replaces a file as a whole, 0600.
func writePrivate(name string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(tmp.Name(), name)
}

func makeDataDir(dir string) error {
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.Chmod(dir, 0o700)
	}
	if err != nil {
		return &refusal.Error{
			Kind: refusal.Unavailable, Code: "data-dir", What: "data directory " + dir, Why: err.Error(),
			Do: "name another with --data, or run as a user who may write there", Err: err,
		}
	}
	return nil
}

func pemOf(certs []*x509.Certificate) string {
	var b strings.Builder
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a builder never fails
	}
	return b.String()
}

// serverCertificate is the server's own SVID, with the DNS names that clients check, renewed at half-life.
type serverCertificate struct {
	ca *ca.Authority
	id identity.ID

	mu      sync.Mutex
	names   []string         // guarded by mu
	current *tls.Certificate // guarded by mu
	renewAt time.Time        // guarded by mu
}

func newServerCertificate(ctx context.Context, authority *ca.Authority, id identity.ID, names []string) (*serverCertificate, error) {
	c := &serverCertificate{ca: authority, id: id}
	return c, c.rename(ctx, names)
}

// rename signs a certificate for these names.
func (c *serverCertificate) rename(ctx context.Context, names []string) error {
	var opts ca.SignOptions
	for _, n := range slices.Compact(slices.Sorted(slices.Values(names))) {
		if ip, err := netip.ParseAddr(n); err == nil {
			opts.Addresses = append(opts.Addresses, ip)
		} else {
			opts.DNSNames = append(opts.DNSNames, strings.ToLower(n))
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	chain, err := c.ca.SignX509(ctx, c.id, key.Public(), 0, opts)
	if err != nil {
		return fmt.Errorf("certificate of the server: %w", err)
	}
	cert := &tls.Certificate{PrivateKey: crypto.PrivateKey(key), Leaf: chain[0]}
	for _, x := range chain {
		cert.Certificate = append(cert.Certificate, x.Raw)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names, c.current = names, cert
	// Without its monotonic reading the time is that of the wall, which goes on while the machine sleeps.
	c.renewAt = time.Now().Add(time.Until(chain[0].NotAfter) / 2).Round(0)
	return nil
}

func (c *serverCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current, nil
}

const certificateNap = 15 * time.Second

// run renews until ctx ends.
func (c *serverCertificate) run(ctx context.Context, log *slog.Logger) error {
	for {
		c.mu.Lock()
		wait := time.Until(c.renewAt)
		c.mu.Unlock()
		// Timers stand still while a machine sleeps, and clocks are set: no nap is long.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(min(max(wait, time.Second), certificateNap)):
		}
		c.mu.Lock()
		due, names := !time.Now().Round(0).Before(c.renewAt), c.names
		c.mu.Unlock()
		if !due {
			continue
		}
		if err := c.rename(ctx, names); err != nil && ctx.Err() == nil {
			log.Error("the server's certificate was not renewed; it will be tried again", "error", err)
		}
	}
}
