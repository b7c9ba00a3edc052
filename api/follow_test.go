package api_test

import (
	"bufio"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/apitest"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

func record(t testing.TB, h *apitest.House, kind, message string) {
	t.Helper()
	e := event.New(event.Control, kind)
	e.Message = message
	if err := h.Fleet.Record(context.Background(), e); err != nil {
		t.Fatal(err)
	}
}

// tail reads a stream of the API by hand.
type tail struct {
	resp  *http.Response
	lines *bufio.Scanner
}

func (s *site) follow(t *testing.T, query, last string) *tail {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	t.Cleanup(cancel)
	req, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/v1/events?"+query, nil)
	req.Header.Set("Authorization", "Bearer "+s.Secret)
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return &tail{resp, bufio.NewScanner(resp.Body)}
}

// until reads lines up to one that contains want.
func (x *tail) until(t *testing.T, want string) string {
	t.Helper()
	var all strings.Builder
	for x.lines.Scan() {
		all.WriteString(x.lines.Text() + "\n")
		if strings.Contains(x.lines.Text(), want) {
			return all.String()
		}
	}
	t.Fatalf("the stream ended (%v) without %q:\n%s", x.lines.Err(), want, all.String())
	return ""
}

func TestEventsAreFollowedAndResumed(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Heartbeat, c.Sink = 50*time.Millisecond, nil })
	record(t, s.House, "a.before", "before")
	x := s.follow(t, "follow&kind=b.one", "")
	if got := x.resp.Header.Get("Content-Type"); x.resp.StatusCode != 200 || got != "text/event-stream" {
		t.Fatalf("%d %s", x.resp.StatusCode, got)
	}
	if head := x.until(t, "id:"); !strings.Contains(head, "id: 1\n") || !strings.Contains(head, "retry:") {
		t.Errorf("the stream begins with %q", head)
	}
	record(t, s.House, "b.two", "not asked for")
	record(t, s.House, "b.one", "asked for")
	if text := x.until(t, "asked for"); !strings.Contains(text, "id: 3\n") || strings.Contains(text, "before") || strings.Contains(text, "not asked") {
		t.Errorf("got %s", text)
	}
	x.until(t, ": still here")
	x.resp.Body.Close()
	record(t, s.House, "b.one", "while away")
	if text := s.follow(t, "follow=true&kind=b.one", "3").until(t, "while away"); strings.Contains(text, "gap") || strings.Contains(text, "asked for") {
		t.Errorf("resumed with %s", text)
	}
	for _, bad := range []string{"x", "-1", "99999999999999999999"} {
		if r := s.follow(t, "follow", bad).resp; r.StatusCode != 422 && r.StatusCode != 400 {
			t.Errorf("Last-Event-ID %s: %d", bad, r.StatusCode)
		}
	}
}

func TestGapIsTold(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Sink = nil; c.Events = trimmed{c.Events} })
	for range 5 {
		record(t, s.House, "x", "kept")
	}
	if text := s.follow(t, "follow", "1").until(t, `"before":4`); !strings.Contains(text, "event: gap\n") || !strings.Contains(text, `{"after":1,"before":4}`) {
		t.Errorf("got %s", text)
	}
	if s.Meter.Of("api_follow_gaps") != 1 {
		t.Error("not counted")
	}
}

// trimmed no longer has the first three events.
type stored = api.Events

type trimmed struct{ stored }

func (e trimmed) Events(ctx context.Context, q fleet.EventQuery) ([]fleet.StoredEvent, error) {
	q.After = max(q.After, 3)
	return e.stored.Events(ctx, q)
}

func TestFollowersAreBounded(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Sink = nil })
	var streams []*tail
	for range 64 {
		x := s.follow(t, "follow", "")
		if x.resp.StatusCode != 200 {
			t.Fatalf("status %d", x.resp.StatusCode)
		}
		streams = append(streams, x)
	}
	if r := s.call("GET", "/v1/events?follow", ""); r.status != 429 || r.problem(t).Code != "too-many-followers" {
		t.Errorf("the 65th: %d", r.status)
	}
	if s.Meter.Of("api_followers_refused") != 1 {
		t.Error("not counted")
	}
	if r := s.call("GET", "/v1/events", ""); r.status != 200 {
		t.Errorf("a page meanwhile: %d", r.status)
	}
	streams[0].resp.Body.Close()
	eventually(t, func() bool { return s.follow(t, "follow", "").resp.StatusCode == 200 })
}

// Fails if a stream goes on after the right to it has ended.
func TestStreamEndsWithTheRightToIt(t *testing.T) {
	s := serve(t, func(c *api.Config) { c.Heartbeat, c.Sink = 20*time.Millisecond, nil })
	x := s.follow(t, "follow", "")
	x.until(t, ": still here")
	s.Engine.Answer(policy.Deny, policy.Enforce)
	for x.lines.Scan() {
	}
	if err := x.lines.Err(); err != nil {
		t.Errorf("it broke off: %v", err)
	}
	if s.Meter.Of("api_follow_ended") != 1 {
		t.Error("not counted")
	}
}

func TestStreamsEndWhenTheServerDrains(t *testing.T) {
	drain := make(chan struct{})
	s := serve(t, func(c *api.Config) { c.Drain, c.Sink = drain, nil })
	x := s.follow(t, "follow", "")
	x.until(t, "id:")
	close(drain)
	for x.lines.Scan() {
	}
	if err := x.lines.Err(); err != nil {
		t.Errorf("it broke off: %v", err)
	}
}

func TestClientFollowsThroughBreaks(t *testing.T) {
	s := serveTLS(t, func(c *api.Config) { c.Sink, c.Heartbeat = nil, 20*time.Millisecond })
	c := s.client(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	go func() {
		for i, kind := range []string{"k", "k", "k"} {
			time.Sleep(100 * time.Millisecond)
			record(t, s.House, kind, string(rune('a'+i)))
			if i == 0 {
				s.Engine.Answer(policy.Deny, policy.Enforce) // ends the stream
				time.Sleep(60 * time.Millisecond)
				s.Engine.Answer("", "")
			}
		}
	}()
	var got []string
	for e, err := range c.Follow(ctx, client.EventFilter{Kind: "k"}, 0) {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, e.Event.Message); len(got) == 3 {
			break
		}
	}
	if strings.Join(got, "") != "abc" {
		t.Errorf("got %v", got)
	}
	s.Engine.Answer(policy.Deny, policy.Enforce)
	for _, err := range c.Follow(ctx, client.EventFilter{}, 0) {
		if r := refusal.As(err); r == nil || r.Kind != refusal.Denied {
			t.Errorf("a refused stream: %v", err)
		}
	}
	s.Engine.Answer("", "")
	over, end := context.WithCancel(ctx)
	end()
	for _, err := range c.Follow(over, client.EventFilter{}, 0) {
		t.Errorf("after its end: %v", err)
	}
}

func TestClientIsToldOfGaps(t *testing.T) {
	s := serveTLS(t, func(c *api.Config) { c.Sink = nil; c.Events = trimmed{c.Events} })
	for range 5 {
		record(t, s.House, "x", "kept")
	}
	var gap *client.Gap
	n := 0
	for e, err := range s.client(t, nil).Follow(t.Context(), client.EventFilter{}, 1) {
		if n == 0 && (!errors.As(err, &gap) || gap.Before != 4) {
			t.Fatalf("first: %+v %v", e, err)
		}
		if n++; n == 3 {
			break
		}
	}
}
