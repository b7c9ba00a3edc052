package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Credentials are what an agent is: its key, the certificate chain it was given, and the roots it trusts.
//
// Shape: Chain and Bundle are empty of an agent that is about to join. Trust: Key is secret; the type redacts itself.
type Credentials struct {
	Key    crypto.Signer
	Chain  []*x509.Certificate // leaf first
	Bundle *identity.Bundle
}

// String names the credentials without the key.
func (c *Credentials) String() string {
	if c == nil || len(c.Chain) == 0 {
		return "credentials of an agent that has not joined"
	}
	return "credentials of " + c.Chain[0].URIs[0].String()
}

// GoString is [Credentials.String].
func (c *Credentials) GoString() string { return c.String() }

// machine returns who the credentials are of.
func (c *Credentials) machine() (string, identity.ID, error) {
	if c == nil || len(c.Chain) == 0 {
		return "", identity.ID{}, refuse(ErrNotJoined, refusal.Precondition, "agent", "it has not joined", joinAnew)
	}
	id, err := identity.IDFromCertificate(c.Chain[0])
	if err != nil {
		return "", identity.ID{}, err
	}
	machine, err := fleet.MachineOf(id.TrustDomain(), id)
	return machine, id, err
}

func (c *Credentials) certificate() *tls.Certificate {
	return &tls.Certificate{Certificate: chainTo(c.Chain), PrivateKey: c.Key, Leaf: c.Chain[0]}
}

// CredentialStore keeps the credentials of one agent.
type CredentialStore interface {
	// Load returns what was saved last. Errors: matches os.ErrNotExist if nothing ever was.
	Load(ctx context.Context) (*Credentials, error)
	// Save replaces what was saved, all of it or nothing. Durability: on disk when it returns.
	Save(ctx context.Context, c *Credentials) error
}

// FileCredentials keeps credentials in a directory (made 0700 if needed), in one file (0600): agent.pem, which has the
// key (PKCS #8), the chain, and the bundle as a block of its own, so that they never disagree.
//
// Trust: the directory belongs to root of the machine. A file that others can read is refused.
func FileCredentials(dir string) CredentialStore { return fileCredentials(dir) }

type fileCredentials string

const (
	credentialsFile    = "agent.pem"
	maxCredentialBytes = 1 << 20
	pemKey             = "PRIVATE KEY"
	pemCertificate     = "CERTIFICATE"
	pemBundle          = "SPIFFE BUNDLE"
)

func unreadable(path, why string) error {
	return refuse(ErrCredentials, refusal.Invalid, "credentials of the agent in "+path, why,
		"restore the file, or remove it and join anew with a token made with redoubt token create --replace")
}

// Load implements [CredentialStore].
func (dir fileCredentials) Load(context.Context) (*Credentials, error) {
	path := filepath.Join(string(dir), credentialsFile)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, unreadable(path, fmt.Sprintf("others may read it (mode %04o)", info.Mode().Perm()))
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxCredentialBytes+1))
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	c, err := parseCredentials(raw)
	if err != nil {
		return nil, unreadable(path, err.Error())
	}
	return c, nil
}

// parseCredentials reads the file. Errors do not quote it.
func parseCredentials(raw []byte) (*Credentials, error) {
	if len(raw) > maxCredentialBytes {
		return nil, errors.New("it is too large")
	}
	c := &Credentials{}
	var bundle []byte
	for {
		var block *pem.Block
		if block, raw = pem.Decode(raw); block == nil {
			break
		}
		switch block.Type {
		case pemKey:
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			signer, ok := key.(crypto.Signer)
			if err != nil || !ok {
				return nil, errors.New("its private key cannot be parsed")
			}
			c.Key = signer
		case pemCertificate:
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil || len(c.Chain) >= maxChain {
				return nil, errors.New("a certificate in it cannot be parsed")
			}
			c.Chain = append(c.Chain, cert)
		case pemBundle:
			bundle = block.Bytes
		}
	}
	if c.Key == nil {
		return nil, errors.New("it has no private key")
	}
	if len(c.Chain) == 0 {
		return c, nil
	}
	_, id, err := c.machine()
	if err != nil {
		return nil, errors.New("its certificate is not that of a machine")
	}
	if pub, ok := c.Key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(c.Chain[0].PublicKey) {
		return nil, errors.New("its key is not that of its certificate")
	}
	if c.Bundle, err = identity.ParseBundle(id.TrustDomain(), bundle); err != nil || len(c.Bundle.X509Authorities) == 0 {
		return nil, errors.New("its trust bundle cannot be parsed")
	}
	return c, nil
}

// Save implements [CredentialStore].
func (dir fileCredentials) Save(_ context.Context, c *Credentials) error {
	key, err := x509.MarshalPKCS8PrivateKey(c.Key)
	if err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	var b bytes.Buffer
	_ = pem.Encode(&b, &pem.Block{Type: pemKey, Bytes: key}) // a buffer does not fail
	for _, cert := range c.Chain {
		_ = pem.Encode(&b, &pem.Block{Type: pemCertificate, Bytes: cert.Raw})
	}
	if c.Bundle != nil {
		doc, err := json.Marshal(c.Bundle)
		if err != nil {
			return fmt.Errorf("save credentials: %w", err)
		}
		_ = pem.Encode(&b, &pem.Block{Type: pemBundle, Bytes: doc})
	}
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	if err := replaceFile(filepath.Join(string(dir), credentialsFile), b.Bytes()); err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	return nil
}

// replaceFile writes a file whole or not at all, and onto the disk.
func replaceFile(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".agent-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(content); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}
