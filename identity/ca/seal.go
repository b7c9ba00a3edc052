package ca

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
)

// kekBytes is the length of the key-encryption key: AES-256.
const kekBytes = 32

// sealer encrypts private keys at rest with AES-256-GCM. A KEK seals a few keys in a month, far from the bound of random
// nonces (2^32 messages: NIST SP 800-38D, 8.3).
type sealer struct{ aead cipher.AEAD }

func newSealer(kek []byte) (*sealer, error) {
	if len(kek) != kekBytes {
		return nil, badConfig("KEK", fmt.Sprintf("it has %d bytes, and must have %d", len(kek), kekBytes))
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	return &sealer{aead: aead}, nil
}

// additional binds a sealed key to its record, so that one cannot be put in the place of another.
func additional(rec KeyRecord) []byte { return []byte(rec.ID + "|" + string(rec.Use)) }

func (s *sealer) seal(rec KeyRecord, private []byte) []byte {
	return s.aead.Seal(nil, nil, private, additional(rec))
}

// errSealed says that a sealed key did not open, for which there are two reasons that cannot be told apart from it alone:
// another KEK, or a damaged record.
var errSealed = errors.New("the sealed key does not open")

func (s *sealer) open(rec KeyRecord) ([]byte, error) {
	private, err := s.aead.Open(nil, nil, rec.Sealed, additional(rec))
	if err != nil {
		return nil, errSealed
	}
	return private, nil
}
