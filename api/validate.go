package api

import (
	"errors"
	"net/http"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/refusal"
)

// maxFieldErrors bounds the list of defects in one answer.
const maxFieldErrors = 100

// errHuma stands for a failure of huma's own; its message is in the log only.
var errHuma = errors.New("request could not be read or answered")

// sanitize is huma's transformer that turns its own errors into problems of ours. What was submitted is in three places
// of such an error: Value, which is dropped; the location, which may have a submitted name in it; and the message, which
// for some formats ends with the parser's own words.
func (s *server) sanitize(ctx huma.Context, _ string, v any) (any, error) {
	m, ok := v.(*huma.ErrorModel)
	if !ok {
		return v, nil
	}
	code, status := codeInvalid, m.Status
	kind := refusal.Invalid
	switch {
	case status == http.StatusUnsupportedMediaType:
		code = codeMediaType
	case status == http.StatusBadRequest:
		code = codeMalformed
	case status >= http.StatusInternalServerError:
		p, _ := render(errHuma, callOf(ctx.Context()).request)
		s.log.Error("request could not be read or answered", "request", p.Request, "detail", m.Detail)
		return p, nil
	}
	p, _ := render(&refusal.Error{
		Kind: kind, Code: code, What: "the request", Why: "it does not have the form that the operation takes",
		Do: "see /v1/openapi.json; the errors member says what is wrong where",
	}, callOf(ctx.Context()).request)
	p.Status = status
	for _, e := range m.Errors {
		if e != nil && len(p.Errors) < maxFieldErrors {
			p.Errors = append(p.Errors, client.FieldError{Location: s.place(e.Location), Message: plain(e.Message)})
		}
	}
	if len(m.Errors) == 0 {
		p.Errors = []client.FieldError{{Location: "body", Message: m.Detail}}
	}
	s.meter.Count("api_invalid", 1, "operation", ctx.Operation().OperationID)
	return p, nil
}

// place keeps of a location the names that the API itself has, and puts * for what the client made up.
func (s *server) place(location string) string {
	parts := strings.FieldsFunc(location, func(r rune) bool { return r == '.' || r == '[' || r == ']' })
	for i, part := range parts {
		if !s.names[part] && strings.Trim(part, "0123456789") != "" || len(part) > 64 {
			parts[i] = "*"
		}
	}
	return strings.Join(parts, ".")
}

// plain cuts a parser's own words off a message: they repeat the value.
func plain(message string) string {
	for _, lead := range []string{"expected string to be RFC", "expected string to be regex", "expected duration", "invalid value"} {
		if strings.HasPrefix(message, lead) {
			message, _, _ = strings.Cut(message, ":")
		}
	}
	return message
}
