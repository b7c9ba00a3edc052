package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
)

// credentialPrefix leads every operator credential, so that secret scanners and people know one when they see it.
const credentialPrefix = "ro1."

// credentialBytes is the entropy of a credential. At 256 random bits a plain hash is enough: there is nothing to guess
// (NIST SP 800-63B, 5.1.2.2).
const credentialBytes = 32

// Verifier says whose credential a bearer secret is.
//
// Concurrency: safe. Trust: credential is attacker-controlled; implementations take the same time whichever byte of it
// is wrong, and keep hashes only. [Credentials] is one.
type Verifier interface {
	// Verify returns the name of the operator ("operator"), and whether there is one.
	Verify(ctx context.Context, credential string) (name string, ok bool)
}

// NewCredential makes an operator credential. secret is "ro1." and 43 characters of base64url, for the operator's file
// (0600) and nowhere else; hash is what a server keeps, 64 hex digits.
func NewCredential() (secret, hash string) {
	var b [credentialBytes]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails since Go 1.24
	secret = credentialPrefix + base64.RawURLEncoding.EncodeToString(b[:])
	return secret, HashCredential(secret)
}

// HashCredential returns what a server keeps of a credential: the SHA-256, in hex.
func HashCredential(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// Credentials verifies against the hashes of a few operators.
//
// Shape: immutable. Concurrency: safe.
type Credentials struct {
	names  []string
	hashes [][sha256.Size]byte
}

// NewCredentials returns the verifier of these operators: hash (as [HashCredential] makes it) by name. Errors: a hash
// that is not 64 hex digits, or an empty name; the hash is not quoted.
func NewCredentials(operators map[string]string) (*Credentials, error) {
	c := &Credentials{}
	for name, text := range operators {
		raw, err := hex.DecodeString(text)
		if err != nil || len(raw) != sha256.Size {
			return nil, errors.New("operator credential: its hash is not 64 hex digits")
		}
		if name == "" {
			return nil, errors.New("operator credential: it has no name")
		}
		c.names = append(c.names, name)
		c.hashes = append(c.hashes, [sha256.Size]byte(raw))
	}
	return c, nil
}

// Verify implements [Verifier]: every hash is compared, in constant time.
func (c *Credentials) Verify(_ context.Context, credential string) (string, bool) {
	sum := sha256.Sum256([]byte(credential))
	found := -1
	for i := range c.hashes {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(sum[:], c.hashes[i][:]), i, found)
	}
	if found < 0 || !strings.HasPrefix(credential, credentialPrefix) {
		return "", false
	}
	return c.names[found], true
}
