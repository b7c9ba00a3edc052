package api

import (
	"net/http"
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
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			ok = false
		}
	}
	if !ok {
		return newRequestID()
	}
	return id
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
