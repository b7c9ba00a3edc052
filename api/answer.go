package api

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"mime"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// errPanicked stands for a panic in an answer; what it was is in the log only.
var errPanicked = errors.New("operation panicked")

// recorder takes an answer without sending it. Zero value: no header map; set one.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (b *recorder) Header() http.Header { return b.header }

// WriteHeader implements http.ResponseWriter; the first status counts.
func (b *recorder) WriteHeader(status int) {
	if b.status == 0 {
		b.status = status
	}
}

// Write implements http.ResponseWriter.
func (b *recorder) Write(p []byte) (int, error) {
	b.WriteHeader(http.StatusOK)
	return b.body.Write(p)
}

func (b *recorder) answer() *answer {
	b.WriteHeader(http.StatusOK)
	return &answer{status: b.status, header: b.header, body: b.body.Bytes()}
}

// send writes the answer: with an entity tag if it is a thing that was read, and as 304 if the client has it already.
// The client has this long to take it. Source: RFC 9110, 13.1.2 and 15.4.5.
func (a *answer) send(w http.ResponseWriter, r *http.Request, within time.Duration) {
	header := w.Header()
	maps.Copy(header, a.header)
	read := r.Method == http.MethodGet || r.Method == http.MethodHead
	status, body := a.status, a.body
	if read && status == http.StatusOK {
		if header.Get("ETag") == "" {
			header.Set("ETag", quote(bodyTag(body)))
		}
		m, err := parseMatch("If-None-Match", r.Header.Values("If-None-Match"))
		if err == nil && m.loose(strings.Trim(header.Get("ETag"), `"`)) { // one that is malformed matches nothing
			status, body = http.StatusNotModified, nil
			header.Del("Content-Type")
		}
	}
	if status != http.StatusNotModified && status != http.StatusNoContent {
		header.Set("Content-Length", strconv.Itoa(len(body)))
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(within)) // not all writers have deadlines
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // a client that went away cannot be told
	}
}

// requestBody is a whole body, within its bound.
type requestBody []byte

func (b requestBody) reader() io.ReadCloser { return io.NopCloser(bytes.NewReader(b)) }

// readBody reads the body of an operation that takes one: JSON, within the operation's bound and in time. Any other
// operation's body is not read.
func readBody(op *operation, within time.Duration, w http.ResponseWriter, r *http.Request) (requestBody, error) {
	if op.maxBody == 0 {
		return nil, nil
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		if r.ContentLength != 0 || r.Header.Get("Content-Type") != "" {
			return nil, &refusal.Error{
				Kind: refusal.Invalid, Code: codeMediaType, What: "the body", Why: "its Content-Type is not application/json",
				Do: "send JSON and say so",
			}
		}
	}
	deadline := http.NewResponseController(w)
	_ = deadline.SetReadDeadline(time.Now().Add(within)) // not all writers have deadlines
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, op.maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &refusal.Error{
			Kind: refusal.Exhausted, Code: codeTooLarge, What: "the body",
			Why: "it is longer than " + strconv.FormatInt(op.maxBody, 10) + " bytes", Do: "send less",
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &refusal.Error{
			Kind: refusal.Exhausted, Code: codeSlow, What: "the body", Why: "it did not arrive within " + within.String(),
			Do: "send it faster",
		}
	case err != nil:
		return nil, &refusal.Error{
			Kind: refusal.Invalid, Code: codeMalformed, What: "the body", Why: "it broke off", Do: "send it again", Err: err,
		}
	}
	_ = deadline.SetReadDeadline(time.Time{})
	if err := checkJSON(body); err != nil {
		return nil, err
	}
	return body, nil
}
