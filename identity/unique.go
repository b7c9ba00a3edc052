package identity

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"strings"
	"sync"
	"time"
)

// idEncoding is lower-case base32 whose alphabet is in ASCII order, so that ids sort as their bits do (RFC 4648,
// section 7: base32hex).
var idEncoding = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

var unique struct {
	sync.Mutex
	last uint64 // guarded by the mutex: milliseconds << 12 | counter, so that ids of one process rise strictly
}

// Unique returns a new id: prefix, a hyphen, and 128 bits in 26 characters of lower-case base32. Ids made later sort
// later (48 bits of milliseconds, 12 of counter); 68 bits are random, so that ids cannot be guessed from one another
// but are no secrets.
//
// Concurrency: safe; ids of one process rise strictly.
func Unique(prefix string) string {
	var b [16]byte
	_, _ = rand.Read(b[6:]) // crypto/rand.Read never fails since Go 1.24
	unique.Lock()
	now := uint64(time.Now().UnixMilli()) << 12
	if now <= unique.last {
		now = unique.last + 1
	}
	unique.last = now
	unique.Unlock()
	binary.BigEndian.PutUint64(b[:8], now<<4|uint64(b[7]&0x0f))
	return prefix + "-" + idEncoding.EncodeToString(b[:])
}

// IsUnique reports whether s has the shape of an id made by [Unique] with this prefix. Trust: s is attacker-controlled.
func IsUnique(prefix, s string) bool {
	body, ok := strings.CutPrefix(s, prefix+"-")
	if !ok || len(body) != 26 {
		return false
	}
	_, err := idEncoding.DecodeString(body)
	return err == nil
}
