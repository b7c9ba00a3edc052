package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxDepth bounds how deeply a body may nest.
const maxDepth = 64

// checkJSON refuses what JSON parsers disagree about before any of them reads it: a name that comes twice in one object
// (also in another case, since encoding/json matches names without regard to it), nesting without end, and trailing
// bytes. The empty body passes: whether one is needed is the operation's to say. Trust: body is attacker-controlled.
// Source: RFC 8259, section 4; RFC 7493, section 2.3.
func checkJSON(body []byte) error {
	if len(body) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if err := checkValue(dec, 0); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return malformed(dec.InputOffset(), "there is more after its end")
	}
	return nil
}

func checkValue(dec *json.Decoder, depth int) error {
	token, err := dec.Token()
	if err != nil {
		return malformed(dec.InputOffset(), "it is not JSON")
	}
	delim, ok := token.(json.Delim)
	if !ok {
		return nil
	}
	if depth == maxDepth {
		return malformed(dec.InputOffset(), "it nests deeper than 64 levels")
	}
	names := map[string]bool{}
	for dec.More() {
		if delim == '{' {
			name, err := dec.Token()
			text, ok := name.(string)
			if err != nil || !ok {
				return malformed(dec.InputOffset(), "it is not JSON")
			}
			folded := strings.ToLower(strings.ToUpper(text)) // as bytes.EqualFold sees it
			if names[folded] {
				return malformed(dec.InputOffset(), "a name comes twice in one object")
			}
			names[folded] = true
		}
		if err := checkValue(dec, depth+1); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil {
		return malformed(dec.InputOffset(), "it is not JSON")
	}
	return nil
}

func malformed(at int64, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeMalformed, What: "the body", Why: fmt.Sprintf("%s (near byte %d)", why, at), Do: "send valid JSON",
	}
}

// jsonFormat is huma's JSON format with errors that repeat nothing of what was submitted.
func jsonFormat() huma.Format {
	return huma.Format{
		Marshal: huma.DefaultJSONFormat.Marshal,
		Unmarshal: func(data []byte, v any) error {
			err := json.Unmarshal(data, v)
			if err == nil {
				return nil
			}
			var wrongType *json.UnmarshalTypeError
			switch r := refusal.As(err); {
			case r != nil: // the words' own refusals quote no values
				return errors.New(r.What + ": " + r.Why)
			case errors.As(err, &wrongType):
				return fmt.Errorf("a value of the wrong type near byte %d", wrongType.Offset)
			default:
				return errors.New("a value of the wrong form")
			}
		},
	}
}
