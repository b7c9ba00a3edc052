package identity

import (
	"net/url"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxIDBytes is the longest SPIFFE ID accepted (SPIFFE-ID, section 2.3), scheme included.
const maxIDBytes = 2048

// maxTrustDomainBytes bounds the trust domain name, as DNS does (SPIFFE-ID, section 2.1).
const maxTrustDomainBytes = 255

// ErrMalformedID is the code of every refusal of an [ID] or [TrustDomain].
var ErrMalformedID = &refusal.Error{Code: "malformed-spiffe-id"}

// TrustDomain is the name of a trust domain: `[a-z0-9._-]+`, at most 255 bytes, without the spiffe:// scheme.
//
// Zero value: no trust domain.
type TrustDomain string

// ParseTrustDomain returns the trust domain named s. Errors: matches [ErrMalformedID]. Trust: s is attacker-controlled.
// Source: SPIFFE-ID, section 2.1.
func ParseTrustDomain(s string) (TrustDomain, error) {
	if s == "" || len(s) > maxTrustDomainBytes {
		return "", malformed("trust domain", "its length is not between 1 and 255 bytes")
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
			return "", malformed("trust domain", "it has a character that is not a lower-case letter, digit, dot, hyphen or underscore")
		}
	}
	return TrustDomain(s), nil
}

// String returns the bare name.
func (td TrustDomain) String() string { return string(td) }

// ID returns the ID of the trust domain itself (no path).
func (td TrustDomain) ID() ID { return ID{trustDomain: td} }

// ID is a SPIFFE ID: `spiffe://<trust domain>[/<segment>]*`.
//
// Shape: comparable; two equal IDs are the same identity. Zero value: no identity ([ID.IsZero]).
type ID struct {
	trustDomain TrustDomain
	path        string // "" or begins with a slash
}

// ParseID parses s strictly: no query, fragment, port, user, percent-encoding, empty, `.` or `..` segment, no trailing
// slash. Errors: matches [ErrMalformedID]. Trust: s is attacker-controlled. Source: SPIFFE-ID, section 2.
func ParseID(s string) (ID, error) {
	if len(s) > maxIDBytes {
		return ID{}, malformed("SPIFFE ID", "it is longer than 2048 bytes")
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return ID{}, malformed("SPIFFE ID", "it does not begin with spiffe://")
	}
	name, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		name, path = rest[:i], rest[i:]
	}
	td, err := ParseTrustDomain(name)
	if err != nil {
		return ID{}, err
	}
	if err := checkPath(path); err != nil {
		return ID{}, err
	}
	return ID{trustDomain: td, path: path}, nil
}

// MakeID returns the ID with the given path, which is "" or begins with a slash. Errors: matches [ErrMalformedID].
func MakeID(td TrustDomain, path string) (ID, error) {
	return ParseID("spiffe://" + string(td) + path)
}

func checkPath(path string) error {
	if path == "" {
		return nil
	}
	for segment := range strings.SplitSeq(path[1:], "/") {
		switch segment {
		case "":
			return malformed("SPIFFE ID", "its path has an empty segment or a trailing slash")
		case ".", "..":
			return malformed("SPIFFE ID", "its path has a relative segment")
		}
		for i := range len(segment) {
			c := segment[i]
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
				return malformed("SPIFFE ID", "its path has a character that is not a letter, digit, dot, hyphen or underscore")
			}
		}
	}
	return nil
}

func malformed(what, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ErrMalformedID.Code, What: what, Why: why,
		Do: "use the form spiffe://<trust-domain>/<segment>/…",
	}
}

// TrustDomain returns the trust domain of id.
func (id ID) TrustDomain() TrustDomain { return id.trustDomain }

// Path returns the path of id: "" or a string that begins with a slash.
func (id ID) Path() string { return id.path }

// IsZero reports whether id names nobody.
func (id ID) IsZero() bool { return id.trustDomain == "" }

// String returns the URI form, or "" of the zero value.
func (id ID) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + string(id.trustDomain) + id.path
}

// URL returns the URI form as the SAN of an X.509 certificate wants it.
func (id ID) URL() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: string(id.trustDomain), Path: id.path}
}

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler; the empty text is the zero ID.
func (id *ID) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = ID{}
		return nil
	}
	parsed, err := ParseID(string(b))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}
