package audit

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"

	"github.com/redoubtsec/redoubt/refusal"
)

// The names of files in the audit directory.
const (
	SignerFile   = "signer.key"   // the note signer, 0600
	VerifierFile = "verifier.pub" // the note verifier, for anyone
	LogDir       = "log"          // what C2SP tlog-tiles lays out
)

// keyPair is a note signer and the encoded verifier of it.
type keyPair struct {
	signer   note.Signer
	verifier note.Verifier
	vkey     string
}

// loadKey returns the key pair of dir, or of the given signer text, and makes one if there is none.
// Durability: a new key is on disk when it returns.
func loadKey(dir, origin, given string) (keyPair, error) {
	text := strings.TrimSpace(given)
	path := filepath.Join(dir, SignerFile)
	if text == "" {
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if text, err = makeKey(path, origin); err != nil {
				return keyPair{}, err
			}
		case err != nil:
			return keyPair{}, fmt.Errorf("audit signing key: %w", err)
		case !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0:
			// Who reads this key can write another history under our name.
			return keyPair{}, keyRefusal("signer.key is no regular file, or others may read it", "chmod 600 it, and find out who could read it")
		default:
			raw, err := os.ReadFile(path)
			if err != nil {
				return keyPair{}, fmt.Errorf("audit signing key: %w", err)
			}
			text = strings.TrimSpace(string(raw))
		}
	}
	return parseKey(dir, origin, text)
}

func parseKey(dir, origin, text string) (keyPair, error) {
	signer, err := note.NewSigner(text)
	if err != nil {
		// The cause is left out: it may quote the key.
		return keyPair{}, keyRefusal("the signing key is no Ed25519 note signer", "restore signer.key from a back-up")
	}
	if signer.Name() != origin {
		return keyPair{}, keyRefusal(fmt.Sprintf("the signing key is for the origin %q, not %q", signer.Name(), origin),
			"give the origin of this log; a log cannot be renamed")
	}
	verifier, err := torchwood.NewVerifierFromSigner(text)
	if err != nil {
		return keyPair{}, keyRefusal("the signing key is no Ed25519 note signer", "restore signer.key from a back-up")
	}
	vkey, err := verifierText(text)
	if err != nil {
		return keyPair{}, err
	}
	if err := publishVerifier(filepath.Join(dir, VerifierFile), vkey); err != nil {
		return keyPair{}, err
	}
	return keyPair{signer: signer, verifier: verifier, vkey: vkey}, nil
}

func makeKey(path, origin string) (string, error) {
	skey, _, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return "", fmt.Errorf("make audit signing key: %w", err)
	}
	// Exclusive: a key that another process made meanwhile is never overwritten.
	if err := writeNew(path, []byte(skey+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("keep audit signing key: %w", fullOr("audit signing key", err))
	}
	return skey, nil
}

// publishVerifier writes the verifier key unless the file holds it already.
func publishVerifier(path, vkey string) error {
	if old, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(old)) == vkey {
		return nil
	}
	tmp := path + ".new"
	_ = os.Remove(tmp)
	if err := writeNew(tmp, []byte(vkey+"\n"), 0o644); err != nil {
		return fmt.Errorf("publish audit verifier key: %w", fullOr("audit verifier key", err))
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("publish audit verifier key: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// writeNew writes a file that must not exist and syncs it and its directory.
func writeNew(path string, data []byte, perm fs.FileMode) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			_ = os.Remove(path)
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

func fullOr(what string, err error) error {
	if isFull(err) {
		return diskFull(what, err)
	}
	return err
}

func keyRefusal(why, do string) error {
	return &refusal.Error{Kind: refusal.Invalid, Code: ErrKey.Code, What: "audit signing key", Why: why, Do: do}
}

// verifierText returns the encoded verifier of an encoded Ed25519 signer.
func verifierText(skey string) (string, error) {
	// "PRIVATE+KEY+<name>+<hash>+<base64 of 1 and the seed>"; NewSigner accepted it, so the parts are there.
	parts := strings.SplitN(skey, "+", 5)
	if len(parts) != 5 {
		return "", keyRefusal("the signing key is no Ed25519 note signer", "restore signer.key from a back-up")
	}
	raw, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(raw) != 1+ed25519.SeedSize {
		return "", keyRefusal("the signing key is no Ed25519 note signer", "restore signer.key from a back-up")
	}
	public := ed25519.NewKeyFromSeed(raw[1:]).Public().(ed25519.PublicKey)
	vkey, err := note.NewEd25519VerifierKey(parts[2], public)
	if err != nil {
		return "", fmt.Errorf("audit verifier key: %w", err)
	}
	return vkey, nil
}
