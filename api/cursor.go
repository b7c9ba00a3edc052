package api

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/url"
	"strconv"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of a page and of a cursor.
const (
	maxLimit       = 500
	defaultLimit   = 100
	maxCursorBytes = 1024
)

// cursorVersion leads every cursor, so that a later shape can be told from this one.
const cursorVersion = 1

// fingerprintBytes is how much of the list's fingerprint a cursor carries.
const fingerprintBytes = 8

// encodeCursor makes the opaque cursor that continues this list after position. list names the operation and its
// filters: a cursor of another list, or of the same list filtered otherwise, is refused instead of answering with a page
// that belongs to neither.
//
// Shape: base64url of version, 8 bytes of SHA-256 of list, position. It holds no secret and needs no key: whoever forges
// one sees a page of what they may list anyway.
func encodeCursor(list, position string) string {
	sum := sha256.Sum256([]byte(list))
	raw := append([]byte{cursorVersion}, sum[:fingerprintBytes]...)
	return base64.RawURLEncoding.EncodeToString(append(raw, position...))
}

// decodeCursor returns the position of a cursor of this list; the empty cursor is the beginning, "". Errors: a refusal
// with code malformed-cursor. Trust: cursor is attacker-controlled.
func decodeCursor(list, cursor string) (position string, err error) {
	if cursor == "" {
		return "", nil
	}
	if len(cursor) > maxCursorBytes {
		return "", badCursor("it is longer than 1024 bytes")
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(cursor)
	// encoding/base64 skips line breaks, also when it is strict.
	if err != nil || strings.ContainsAny(cursor, "\r\n") || len(raw) <= 1+fingerprintBytes || raw[0] != cursorVersion {
		return "", badCursor("it is not one that this server made")
	}
	sum := sha256.Sum256([]byte(list))
	if subtle.ConstantTimeCompare(raw[1:1+fingerprintBytes], sum[:fingerprintBytes]) != 1 {
		return "", badCursor("it belongs to another list, or to this one with other filters")
	}
	return string(raw[1+fingerprintBytes:]), nil
}

// numberCursor is decodeCursor for positions that are numbers; absent is what the empty cursor stands for.
func numberCursor(list, cursor string, absent uint64) (uint64, error) {
	position, err := decodeCursor(list, cursor)
	if err != nil || position == "" {
		return absent, err
	}
	n, err := strconv.ParseUint(position, 10, 64)
	if err != nil {
		return 0, badCursor("it is not one that this server made")
	}
	return n, nil
}

func badCursor(why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeBadCursor, What: "the cursor", Why: why,
		Do: "use the next member of the last page as it is, or leave the cursor out to begin again",
	}
}

// listName names a list by its operation and filters, for fingerprints.
func listName(operation string, filters ...string) string {
	return operation + "\x00" + strings.Join(filters, "\x00")
}

// nextLink is the Link header to the next page, or "" of the last one. Source: RFC 8288, section 3; RFC 5988's rel=next.
func nextLink(u *url.URL, cursor string) string {
	if cursor == "" {
		return ""
	}
	query := u.Query()
	query.Set("cursor", cursor)
	return "<" + u.Path + "?" + query.Encode() + `>; rel="next"`
}
