package api

import (
	"crypto/sha256"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of remembered answers.
const (
	maxKeys       = 1024
	keyLife       = time.Hour
	maxKeyBytes   = 255
	maxKeptAnswer = 256 << 10 // a larger answer is not kept: its key then stays in use, and a retry is refused
)

// answers remembers what was answered to requests that create something, so that a client which lost the answer can ask
// again without creating another. They are kept in memory only (an answer may hold a secret that is shown once), for
// [keyLife] at most, and not beyond a restart.
//
// A full store refuses new keys rather than forget old ones: forgetting would break what the key promises.
//
// Source: draft-ietf-httpapi-idempotency-key-header-07.
//
// Concurrency: safe.
type answers struct {
	now func() time.Time

	mu   sync.Mutex
	kept map[string]*kept // guarded by mu; by principal, operation and key
}

// kept is one key: in use while answer is nil.
type kept struct {
	body    [sha256.Size]byte // of the request
	expires time.Time
	answer  *answer // immutable once set
}

// answer is a whole answer, ready to be sent.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func newAnswers(now func() time.Time) *answers { return &answers{now: now, kept: map[string]*kept{}} }

// begin claims a key for a request with this body. It returns the answer that was given before, if there was one; else
// the caller does the work and ends with keep or release.
func (a *answers) begin(key string, body []byte) (*answer, error) {
	sum := sha256.Sum256(body)
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if k, ok := a.kept[key]; ok && k.expires.After(now) {
		switch {
		case k.body != sum:
			return nil, &refusal.Error{
				Kind: refusal.Invalid, Code: codeKeyReused, What: "header Idempotency-Key",
				Why: "this key came before, with another body", Do: "send a new key with a new request",
			}
		case k.answer == nil:
			return nil, &refusal.Error{
				Kind: refusal.Conflict, Code: codeKeyBusy, What: "header Idempotency-Key",
				Why: "the first request with this key is not answered yet, or ended without an answer",
				Do:  "wait, then look whether it was done",
			}
		}
		return k.answer, nil
	}
	if len(a.kept) >= maxKeys {
		for other, k := range a.kept {
			if !k.expires.After(now) {
				delete(a.kept, other)
			}
		}
		if len(a.kept) >= maxKeys {
			return nil, &refusal.Error{
				Kind: refusal.Exhausted, Code: codeKeysFull, What: "header Idempotency-Key",
				Why: "as many keys are remembered as this server keeps", Do: "leave the header out, or wait",
			}
		}
	}
	a.kept[key] = &kept{body: sum, expires: now.Add(keyLife)}
	return nil, nil
}

// keep ends a claim with the answer that every repetition gets.
func (a *answers) keep(key string, given *answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if k, ok := a.kept[key]; ok && len(given.body) <= maxKeptAnswer {
		a.kept[key] = &kept{body: k.body, expires: k.expires, answer: given}
	}
}

// release ends a claim whose request was refused: nothing was created, so the key may come again.
func (a *answers) release(key string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.kept, key)
}

// parseKey reads an Idempotency-Key header: a structured-field string ("…"), or the same without quotes, of 1 to 255
// visible ASCII characters. "" is no key. Trust: attacker-controlled. Source: RFC 9651, 3.3.3 (String).
func parseKey(header http.Header) (string, error) {
	values := header.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	bad := &refusal.Error{
		Kind: refusal.Invalid, Code: codeBadKey, What: "header Idempotency-Key",
		Why: "it is not one string of 1 to 255 visible ASCII characters", Do: `send a random one, such as "8e03978e-40d5-43dd-bc93-6894a57f9324"`,
	}
	if len(values) != 1 {
		return "", bad
	}
	key := values[0]
	if inner, ok := strings.CutPrefix(key, `"`); ok {
		if key, ok = strings.CutSuffix(inner, `"`); !ok {
			return "", bad
		}
	}
	if key == "" || len(key) > maxKeyBytes {
		return "", bad
	}
	for i := range len(key) {
		if c := key[i]; c < 0x21 || c > 0x7e || c == '"' || c == '\\' || c == ',' || c == ';' {
			return "", bad
		}
	}
	return key, nil
}
