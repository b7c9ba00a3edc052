package client

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/refusal"
)

// Whatever a server answers, the client says something of it and does not fall over.
func FuzzProblemOf(f *testing.F) {
	f.Add(404, "application/problem+json", []byte(`{"type":"`+ProblemBase+`unknown","title":"t","status":404,"code":"c","what":"w","why":"y"}`))
	f.Add(500, "application/problem+json", []byte(`{"type":"`+ProblemInternal+`","title":"t","code":"internal","request":"q-1"}`))
	f.Add(200, "text/html", []byte(`<html>`))
	f.Add(418, "application/problem+json;;", []byte(`{"type":"about:blank"}`))
	f.Fuzz(func(t *testing.T, status int, media string, body []byte) {
		resp := &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {media}}}
		err := problemOf(resp, body)
		if err == nil || err.Error() == "" {
			t.Fatal("nothing is said")
		}
		if r := refusal.As(err); r != nil && r.Code == "" {
			t.Fatalf("a refusal without code: %v", r)
		}
	})
}

func FuzzMessages(f *testing.F) {
	f.Add("id: 7\ndata: {\"position\":7}\n\n: comment\n\nevent: gap\ndata: {\"after\":1,\"before\":4}\n\nevent: later\ndata: x\n\n")
	f.Add("data\ndata:\nid\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		var place string
		m := message{place: &place}
		for line := range strings.SplitSeq(text, "\n") {
			whole, err := m.line(line)
			if err != nil {
				return
			}
			if whole {
				if e, err := m.take(); err == nil {
					if _, err := json.Marshal(e); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	})
}

func TestMessagesAreBounded(t *testing.T) {
	var place string
	m := message{place: &place}
	line := "data: " + strings.Repeat("x", maxMessage/2)
	for range 2 {
		if _, err := m.line(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.line(line); err == nil {
		t.Error("a message without end is taken")
	}
}
