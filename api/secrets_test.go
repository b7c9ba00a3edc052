package api_test

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/fleet"
)

// events iterates over everything recorded, from the fleet itself.
func (s *site) events(t *testing.T) iter.Seq2[fleet.StoredEvent, error] {
	return func(yield func(fleet.StoredEvent, error) bool) {
		after := uint64(0)
		for {
			page, err := s.Fleet.Events(context.WithoutCancel(t.Context()), fleet.EventQuery{After: after, Limit: 500})
			if err != nil {
				yield(fleet.StoredEvent{}, err)
				return
			}
			for _, e := range page {
				if after = e.Position; !yield(e, nil) {
					return
				}
			}
			if len(page) < 500 {
				return
			}
		}
	}
}

// secret looks like what an operator might paste into the wrong place. No answer and no log line repeats it.
const secret = "hunter2-S3CR3T-do-not-echo"

func TestNoAnswerRepeatsWhatWasSubmitted(t *testing.T) {
	s := serve(t)
	bodies := []string{
		secret, `"` + secret + `"`, `{"` + secret + `":1}`, `[{"x":"` + secret + `"}]`, `{"machine":{"x":"` + secret + `"}}`,
		`{"machine":"` + secret + `","` + secret + `":"` + secret + `"}`,
		`{"reason":["` + secret + `"],"expires_in":"` + secret + `","spki":"` + secret + `"}`,
		`{"machine":"` + secret + `","expires_in":"` + secret + `"}`, `{"machine":"m1","expires_in":"PT5M","replace":"` + secret + `"}`,
		`{"files":"` + secret + `"}`, `{"files":[{"name":"` + secret + `","content":5}]}`, `{"files":[{"nome":"` + secret + `"}]}`,
		`{"version":"` + secret + `","to":"` + secret + `"}`, `{"identity":"` + secret + `","reason":"x"}`,
		`{"identity":"spiffe://` + secret + `/` + secret + `","reason":"x"}`, `{"service":{"` + secret + `":true},"all":"` + secret + `"}`,
		`{"labels":{"a":{"` + secret + `":1}}}`, `{"labels":{"` + secret + `":5}}`, `{"instance":"` + secret + `"}`,
		`{"facts":[{"name":"` + secret + `","value":{"x":"` + secret + `"},"source":"kernel","epoch":1}]}`,
		`{"facts":[{"name":"a b","value":"` + secret + `","source":"kernel","epoch":"` + secret + `"}]}`,
		`{"principal":{"uid":{"type":"` + secret + `","id":"x"}},"action":{"type":"` + secret + `","id":"` + secret + `"},"resource":{"uid":{"type":"R","id":"r"}}}`,
		`{"principal":{"uid":{"type":"User","id":"x"}},"action":{"type":"Net::Action","id":"connect"},"resource":{"uid":{"type":"R","id":"r"}},"context":{"` + secret + `":{"__extn":{"fn":"` + secret + `","arg":"` + secret + `"}}}}`,
		`{"machine":"m1","machine":"` + secret + `"}`, `{"machine":"m1"} ` + secret, `{"expires_in":123456789` + secret + `}`,
		strings.Repeat(`{"a":`, 100) + `"` + secret + `"`,
	}
	queries := []string{
		"limit=" + secret, "cursor=" + secret, secret + "=1", "limit=1&state=" + secret, "since=" + secret + "&until=" + secret,
		"layer=" + secret + "&verdict=" + secret, "identity=" + secret, "from=" + secret, "order=" + secret, "follow=" + secret + "&identity=" + secret,
		"limit=999999&workload=" + strings.Repeat(secret, 20),
	}
	check := func(what string, r reply) {
		t.Helper()
		if strings.Contains(r.body, secret) || strings.Contains(strings.ToLower(r.body), strings.ToLower(secret[:12])) {
			t.Errorf("%s: %d repeats it: %s", what, r.status, r.body)
		}
		for name, values := range r.header {
			if strings.Contains(strings.Join(values, " "), secret) {
				t.Errorf("%s: header %s repeats it", what, name)
			}
		}
		if r.status >= 400 {
			r.problem(t)
		}
	}
	refused := 0
	for _, op := range s.operations() {
		if op.RequestBody != nil {
			for _, b := range bodies {
				r := s.call(op.Method, op.address(), b, "If-Match", "*")
				check(fmt.Sprintf("%s with body %.60s", op.ID, b), r)
				if r.status >= 400 {
					refused++
				}
			}
			check(op.ID+" with a foreign type", s.call(op.Method, op.address(), secret, "Content-Type", "text/"+secret))
		}
		if op.Method == "GET" {
			for _, q := range queries {
				check(op.ID+"?"+q, s.call("GET", op.address()+"?"+q, ""))
			}
		}
		for _, h := range []string{"If-Match", "If-None-Match", "Idempotency-Key", "Last-Event-ID", "X-Request-ID", "Traceparent"} {
			if slices.Contains([]string{"X-Request-ID"}, h) {
				check(op.ID+" "+h, s.call(op.Method, op.address(), "{}", h, secret+"!"))
				continue
			}
			check(op.ID+" "+h, s.call(op.Method, op.address(), "{}", h, `"`+secret+"\" \x80"))
		}
		path := strings.NewReplacer("{id}", secret, "{instance}", secret, "{version}", secret).Replace(op.Path)
		check(op.ID+" path", s.call(op.Method, path, `{"reason":"x"}`))
	}
	if refused < 280 {
		t.Errorf("only %d of the bad bodies were refused: they are not bad enough", refused)
	}
	const number = "123456789012345678901234567890" // a card number, say: it is whole, but fits nothing
	for _, path := range []string{"/v1/policy-set/confirm", "/v1/policy-set/rollback"} {
		if r := s.call("POST", path, `{"version":`+number+`,"to":`+number+`}`); r.status < 400 || strings.Contains(r.body, number[:12]) {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
		if r := s.call("POST", path, `{"`+map[bool]string{true: "version", false: "to"}[strings.HasSuffix(path, "confirm")]+`":`+number+`}`); r.status < 400 || strings.Contains(r.body, number[:12]) {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	check("path", s.call("GET", "/v1/"+secret, ""))
	check("method", s.call("BREW", "/v1/status", ""))
	check("credential", s.call("GET", "/v1/status", "", "Authorization", "Bearer "+secret))
	stored := uint64(0)
	eventually(t, func() bool { // until all decisions were recorded
		before := stored
		stored = into[client.Page[fleet.StoredEvent]](t, s.call("GET", "/v1/events?limit=1", "")).Items[0].Position
		return stored > 500 && stored <= before+3
	})
	for item, err := range s.events(t) {
		if err != nil || strings.Contains(compact(t, item), secret) {
			t.Errorf("a recorded event repeats it (%v): %s", err, compact(t, item))
			break
		}
	}
	if strings.Contains(s.Log.String(), secret) {
		for line := range strings.SplitSeq(s.Log.String(), "\n") {
			if strings.Contains(line, secret) {
				t.Errorf("the log repeats it: %s", line)
				break
			}
		}
	}
	if strings.Contains(s.Log.String(), s.Secret) {
		t.Error("the operator's credential is in the log")
	}
}
