package api

import (
	"net/http"
	"regexp"
	"strings"
)

// requestHeader carries the id of a request, in and out.
const requestHeader = "X-Request-ID"

// maxRequestID bounds the id that a client gives its request.
const maxRequestID = 64

// requestID returns the client's id for its request if it is fit to be logged and repeated, else a fresh one.
// Trust: attacker-controlled; it correlates, and proves nothing.
func requestID(header http.Header) string {
	id := header.Get(requestHeader)
	ok := id != "" && len(id) <= maxRequestID
	for i := range len(id) {
		c := id[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			ok = false
		}
	}
	if !ok {
		return newRequestID()
	}
	return id
}

// idForm is the form of every id that a path may name: of machines, instances, tokens and so on, and of editions.
var idForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// recordable is a path as it may be recorded with a decision: what stands in the place of an id and has not the form of
// one becomes *. Somebody may have pasted a join token there.
func recordable(template, path string) string {
	names, parts := strings.Split(template, "/"), strings.Split(path, "/")
	if len(names) != len(parts) { // an escaped slash
		return template
	}
	for i, name := range names {
		if strings.HasPrefix(name, "{") && !idForm.MatchString(parts[i]) {
			parts[i] = "*"
		}
	}
	return strings.Join(parts, "/")
}

// traceOf returns the trace id of a traceparent header, or "". Source: W3C Trace Context, section 3.2.
func traceOf(header http.Header) string {
	parts := strings.Split(header.Get("Traceparent"), "-")
	if len(parts) < 4 || len(parts[0]) != 2 || len(parts[1]) != 32 || parts[0] == "ff" || parts[0] == "00" && len(parts) != 4 ||
		strings.Trim(parts[1], "0123456789abcdef") != "" || strings.Trim(parts[1], "0") == "" {
		return ""
	}
	return parts[1]
}
