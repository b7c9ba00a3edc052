package api

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"slices"
	"strings"

	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of an If-Match or If-None-Match header.
const (
	maxMatchBytes = 4 << 10
	maxMatchTags  = 32
)

// tag is one entity tag. Shape: opaque has no quotes. Source: RFC 9110, 8.8.3.
type tag struct {
	opaque string
	weak   bool
}

// matcher is a parsed If-Match or If-None-Match header. Zero value: the header is absent.
type matcher struct {
	any  bool
	tags []tag
}

// absent reports whether the request stated nothing.
func (m matcher) absent() bool { return !m.any && len(m.tags) == 0 }

// strong reports whether one of the tags is this one, both strong (RFC 9110, 13.1.1: If-Match compares strongly).
func (m matcher) strong(current string) bool {
	return m.any || slices.Contains(m.tags, tag{opaque: current})
}

// loose reports whether one of the tags is this one, weak or strong (RFC 9110, 13.1.2: If-None-Match compares weakly).
func (m matcher) loose(current string) bool {
	return m.any || slices.ContainsFunc(m.tags, func(t tag) bool { return t.opaque == current })
}

// parseMatch parses the values of an If-Match or If-None-Match header: `*`, or a list of entity tags. Errors: a refusal
// with code malformed-entity-tag. Trust: values are attacker-controlled. Source: RFC 9110, 8.8.3, 13.1.1 and 5.6.1.
func parseMatch(name string, values []string) (matcher, error) {
	if len(values) == 0 {
		return matcher{}, nil
	}
	text := strings.Join(values, ",")
	if len(text) > maxMatchBytes {
		return matcher{}, badTag(name, "it is longer than 4096 bytes")
	}
	if strings.Trim(text, " \t") == "*" {
		return matcher{any: true}, nil
	}
	var m matcher
	for text = strings.TrimLeft(text, " \t,"); text != ""; text = strings.TrimLeft(text, " \t,") {
		t, rest, ok := cutTag(text)
		if !ok {
			return matcher{}, badTag(name, `it is neither * nor a list of entity tags in double quotes`)
		}
		if len(m.tags) == maxMatchTags {
			return matcher{}, badTag(name, "it has more than 32 entity tags")
		}
		m.tags = append(m.tags, t)
		text = strings.TrimLeft(rest, " \t")
		if text != "" && text[0] != ',' {
			return matcher{}, badTag(name, "its entity tags are not separated by commas")
		}
	}
	if m.absent() {
		return matcher{}, badTag(name, "it is empty")
	}
	return m, nil
}

func cutTag(s string) (t tag, rest string, ok bool) {
	s, t.weak = strings.CutPrefix(s, "W/")
	if s == "" || s[0] != '"' {
		return tag{}, "", false
	}
	end := strings.IndexByte(s[1:], '"')
	if end < 0 {
		return tag{}, "", false
	}
	t.opaque = s[1 : end+1]
	for i := range len(t.opaque) { // etagc = %x21 / %x23-7E / obs-text
		if c := t.opaque[i]; c < 0x21 || c == 0x7f {
			return tag{}, "", false
		}
	}
	return t, s[end+2:], true
}

func badTag(name, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeBadTag, What: "header " + name, Why: why,
		Do: "send the ETag of the answer you read, quotes included",
	}
}

// bodyTag is the entity tag of an answer that has no version of its own: 128 bits of its SHA-256.
func bodyTag(body []byte) string {
	sum := sha256.Sum256(body)
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

func quote(opaque string) string { return `"` + opaque + `"` }

// matched holds what a replacing request says it saw against what is there now. current is "" where nothing is.
// Errors: if-match-required if it says nothing, if-match-failed if that has gone. Source: RFC 6585, section 3; RFC 9110,
// 13.1.1.
func matched(header http.Header, what, current string, required bool) error {
	m, err := parseMatch("If-Match", header.Values("If-Match"))
	switch {
	case err != nil:
		return err
	case m.absent() && required:
		return &refusal.Error{
			Kind: refusal.Precondition, Code: codeIfMatch, What: what, Why: "the request does not say which version it replaces",
			Do: "GET it first and send its ETag in If-Match",
		}
	case m.absent():
		return nil
	case current == "" || !m.strong(current):
		return &refusal.Error{
			Kind: refusal.Conflict, Code: codeStale, What: what, Why: "it is no longer the version named in If-Match",
			Do: "GET it again, look at what changed, and send the new ETag",
		}
	}
	return nil
}
