package fleet

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// JoinSecret is what an operator carries to a machine: a token's id, its secret, and the root key by which the agent
// knows the server.
//
// Shape: rj1.<id>.<secret: 43 of base64url>.<root: 64 hex digits, SHA-256 of the root's SubjectPublicKeyInfo>.
// Trust: secret. Formatting it, in JSON too, redacts it; [JoinSecret.Reveal] does not.
type JoinSecret struct {
	ID     string
	Root   [32]byte
	secret [32]byte
}

const (
	secretPrefix  = "rj1"
	maxSecretText = 160
)

// ParseJoinSecret reads the text form. Errors: [ErrTokenMalformed], which never quotes text.
// Trust: text is attacker-controlled.
func ParseJoinSecret(text string) (JoinSecret, error) {
	malformed := refuse(ErrTokenMalformed, refusal.Invalid, "join token", "it does not have the form rj1.<id>.<secret>.<root>",
		"copy the whole token as redoubt token create printed it")
	if len(text) > maxSecretText {
		return JoinSecret{}, malformed
	}
	parts := strings.Split(text, ".")
	if len(parts) != 4 || parts[0] != secretPrefix || !identity.IsUnique("t", parts[1]) {
		return JoinSecret{}, malformed
	}
	s := JoinSecret{ID: parts[1]}
	secret, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil || len(secret) != len(s.secret) || len(parts[2]) != base64.RawURLEncoding.EncodedLen(len(s.secret)) {
		return JoinSecret{}, malformed
	}
	root, err := hex.DecodeString(parts[3])
	if err != nil || len(root) != len(s.Root) || strings.ToLower(parts[3]) != parts[3] {
		return JoinSecret{}, malformed
	}
	copy(s.secret[:], secret)
	copy(s.Root[:], root)
	return s, nil
}

// Reveal returns the text form, secret included: for the one who asked for the token, once, and for the server's join.
func (s JoinSecret) Reveal() string {
	return strings.Join([]string{
		secretPrefix, s.ID, base64.RawURLEncoding.EncodeToString(s.secret[:]), hex.EncodeToString(s.Root[:]),
	}, ".")
}

// String names the token without its secret.
func (s JoinSecret) String() string { return "join token " + s.ID + " (secret redacted)" }

// GoString is [JoinSecret.String].
func (s JoinSecret) GoString() string { return s.String() }

// hash is what is stored of the secret. 256 random bits cannot be guessed from it, so it is not stretched.
func (s JoinSecret) hash() [32]byte { return sha256.Sum256(s.secret[:]) }

// TokenRequest asks for a join token. TTL zero is [DefaultTokenTTL].
type TokenRequest struct {
	Machine string
	TTL     time.Duration
	Replace bool
}

// The lifetimes of join tokens.
const (
	DefaultTokenTTL = time.Hour
	MinTokenTTL     = time.Minute
	MaxTokenTTL     = 30 * 24 * time.Hour
)

// CreateToken makes a join token for one machine. The secret is in the answer and nowhere else. rec is the audit record,
// whose actor becomes the author. Errors: [ErrMachineID], [ErrTokenTTL], [ErrTokens]; [ErrMachineExists] if it has joined
// and Replace is not set.
func (f *Fleet) CreateToken(ctx context.Context, req TokenRequest, rec event.Record) (JoinToken, JoinSecret, error) {
	if err := checkMachineID(req.Machine); err != nil {
		return JoinToken{}, JoinSecret{}, err
	}
	if req.TTL == 0 {
		req.TTL = DefaultTokenTTL
	}
	if req.TTL < MinTokenTTL || req.TTL > MaxTokenTTL {
		return JoinToken{}, JoinSecret{}, refuse(ErrTokenTTL, refusal.Invalid, "join token for machine "+req.Machine,
			fmt.Sprintf("its lifetime %s is not between %s and %s", req.TTL, MinTokenTTL, MaxTokenTTL), "ask for one in between")
	}
	root, err := f.root()
	if err != nil {
		return JoinToken{}, JoinSecret{}, err
	}
	secret := JoinSecret{ID: identity.Unique("t"), Root: root}
	_, _ = rand.Read(secret.secret[:]) // crypto/rand.Read never fails since Go 1.24
	now := f.now()
	t := JoinToken{
		ID: secret.ID, Machine: req.Machine, Replace: req.Replace, Author: rec.Actor,
		Created: now, Expires: now.Add(req.TTL), Hash: secret.hash(),
	}
	err = f.update(ctx, func(u *unit) error {
		n, err := u.Tokens.CountOutstanding(ctx, now)
		if err != nil {
			return err
		}
		if n >= f.cfg.MaxTokens {
			f.meter.Count("fleet_tokens_refused", 1, "code", ErrTokens.Code)
			return exhausted(ErrTokens, "join token for machine "+req.Machine, f.cfg.MaxTokens, "use or delete outstanding ones first")
		}
		if _, err := u.Machines.Machine(ctx, req.Machine); err == nil && !req.Replace {
			return machineExists("join token for machine " + req.Machine)
		} else if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if err := u.Tokens.PutToken(ctx, t); err != nil {
			return err
		}
		return u.Audit.PutRecord(ctx, rec)
	})
	if err != nil {
		return JoinToken{}, JoinSecret{}, err
	}
	f.meter.Count("fleet_tokens_created", 1)
	return t, secret, nil
}

// Tokens lists join tokens in order of id, after the id given; limit is bounded to [MaxPage].
func (f *Fleet) Tokens(ctx context.Context, after string, limit int) ([]JoinToken, error) {
	var out []JoinToken
	err := f.view(ctx, func(tx Tx) (err error) {
		out, err = tx.Tokens.Tokens(ctx, after, page(limit))
		return err
	})
	return out, err
}

// DeleteToken ends a token that was not used: it expires now. Errors: [ErrUnknown]; [ErrTokenUsed] if it is too late.
func (f *Fleet) DeleteToken(ctx context.Context, id string, rec event.Record) error {
	return f.update(ctx, func(u *unit) error {
		t, err := u.Tokens.Token(ctx, id)
		switch {
		case errors.Is(err, ErrNotFound):
			return unknown("join token", "list those outstanding with redoubt get tokens")
		case err != nil:
			return err
		case !t.Used.IsZero():
			return refuse(ErrTokenUsed, refusal.Conflict, "deletion of join token "+t.ID, "it was used at "+stamp(t.Used),
				"revoke machine "+t.Machine+" if it should not have joined")
		}
		t.Expires = f.now()
		if err := u.Tokens.PutToken(ctx, t); err != nil {
			return err
		}
		return u.Audit.PutRecord(ctx, rec)
	})
}

// root is the hash of the root by which an agent that joins knows the server.
func (f *Fleet) root() ([32]byte, error) {
	b := f.cfg.Authority.Bundle()
	if b == nil || len(b.X509Authorities) == 0 {
		return [32]byte{}, errors.New("fleet: the bundle has no X.509 authority")
	}
	return sha256.Sum256(b.X509Authorities[0].RawSubjectPublicKeyInfo), nil
}

// checkMachineID returns the refusal of an id that no machine can have.
func checkMachineID(id string) error {
	ok := len(id) >= 1 && len(id) <= 63 && id != ServerMachine
	for i := range len(id) {
		c := id[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		edge := i == 0 || i == len(id)-1
		if !alnum && (edge || c != '-' && c != '.') {
			ok = false
			break
		}
	}
	if ok {
		return nil
	}
	return refuse(ErrMachineID, refusal.Invalid, "machine id",
		`it is not 1 to 63 lower-case letters, digits, dots and hyphens that begin and end with a letter or digit, or it is "server"`,
		"choose an id like the short host name")
}

// ServerMachine stands for the server where a machine id is expected (decisions, events); no machine can have it.
const ServerMachine = "server"

func machineExists(what string) *refusal.Error {
	return refuse(ErrMachineExists, refusal.Conflict, what, "a machine of that id has joined already",
		"choose another id, or make a token that replaces it: redoubt token create --replace")
}

func unknown(what, do string) *refusal.Error {
	return refuse(ErrUnknown, refusal.Unknown, what, "there is none of that id", do)
}

func page(limit int) int {
	if limit <= 0 || limit > MaxPage {
		return MaxPage
	}
	return limit
}
