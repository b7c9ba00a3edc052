package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

// ListEvents returns a page of events, newest first (list-events).
func (c *Client) ListEvents(ctx context.Context, f EventFilter, p Paging) (Page[fleet.StoredEvent], error) {
	return list[fleet.StoredEvent](ctx, c, "/v1/events", f, p)
}

// Events iterates over every event that is kept, newest first.
func (c *Client) Events(ctx context.Context, f EventFilter) iter.Seq2[fleet.StoredEvent, error] {
	return all(ctx, func(p Paging) (Page[fleet.StoredEvent], error) { return c.ListEvents(ctx, f, p) })
}

// Gap says that a stream skipped events that are no longer kept: those with positions between After and Before.
type Gap struct {
	After  uint64 `json:"after"`
	Before uint64 `json:"before"`
}

// Error implements error.
func (g *Gap) Error() string {
	return fmt.Sprintf("events between positions %d and %d are no longer kept by the server", g.After, g.Before)
}

// The bounds of following.
const (
	maxFollowPause = 30 * time.Second
	silence        = 45 * time.Second // three heartbeats: a connection that is quieter is broken
	maxMessage     = 1 << 20
)

// Follow yields events as they happen, from the one after the position from on or, if from is 0, from now on. It
// reconnects by itself and resumes where it was. A *[Gap] is yielded as an error after which it goes on; after any other
// error it ends: when ctx ends, with nothing, and when the server refuses, with the refusal.
func (c *Client) Follow(ctx context.Context, f EventFilter, from uint64) iter.Seq2[fleet.StoredEvent, error] {
	return func(yield func(fleet.StoredEvent, error) bool) {
		query := url.Values{"follow": {"true"}}
		encode(query, f)
		place := ""
		if from != 0 {
			place = strconv.FormatUint(from, 10)
		}
		pause := attemptPause
		for ctx.Err() == nil {
			before := place
			err := c.followOnce(ctx, query, &place, yield)
			var refused *refusal.Error
			switch {
			case errors.Is(err, errStopped) || ctx.Err() != nil:
				return
			case !errors.As(err, &refused), refused.Kind != refusal.Unavailable:
				yield(fleet.StoredEvent{}, err)
				return
			}
			if pause = min(2*pause, maxFollowPause); place != before {
				pause = attemptPause
			}
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

// errStopped says that the consumer wants no more.
var errStopped = errors.New("stopped")

// followOnce follows one connection until it breaks, and keeps place at the last position told; "" is none yet.
func (c *Client) followOnce(ctx context.Context, query url.Values, place *string, yield func(fleet.StoredEvent, error) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	quiet := time.AfterFunc(silence, cancel)
	defer quiet.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base.String()+"/v1/events?"+query.Encode(), nil)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("User-Agent", c.agent)
	if c.credential != "" {
		req.Header.Set("Authorization", "Bearer "+string(c.credential))
	}
	if *place != "" {
		req.Header.Set("Last-Event-ID", *place)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return unreached(err)
	}
	defer func() { _ = resp.Body.Close() }() // it ended, or is not wanted any more
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
		return problemOf(resp, body)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 0, 64<<10), maxMessage)
	m := message{place: place}
	for lines.Scan() {
		quiet.Reset(silence)
		whole, err := m.line(lines.Text())
		if err != nil {
			return err
		}
		if !whole {
			continue
		}
		event, err := m.take()
		var gap *Gap
		switch {
		case err != nil && !errors.As(err, &gap):
			return err
		case err == nil && event.Position == 0:
			continue
		}
		if !yield(event, err) {
			return errStopped
		}
	}
	return unreached(errors.Join(lines.Err(), io.ErrUnexpectedEOF))
}

// message gathers the lines of one server-sent event. Source: WHATWG HTML, section 9.2.6.
type message struct {
	place *string
	kind  string
	data  strings.Builder
}

// line takes a line and reports whether the message is whole. Errors: the message is too long.
func (m *message) line(text string) (bool, error) {
	field, value, _ := strings.Cut(text, ":")
	value = strings.TrimPrefix(value, " ")
	switch {
	case text == "":
		return m.data.Len() > 0, nil
	case field == "id":
		*m.place = value
	case field == "event":
		m.kind = value
	case field == "data":
		if m.data.Len()+len(value) > maxMessage {
			return false, fmt.Errorf("the server's event is longer than %d bytes", maxMessage)
		}
		m.data.WriteString(value)
	}
	return false, nil
}

// take returns what the message says, and begins a new one.
func (m *message) take() (fleet.StoredEvent, error) {
	kind, data := m.kind, m.data.String()
	m.kind = ""
	m.data.Reset()
	switch kind {
	case "", "message":
		var e fleet.StoredEvent
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			return fleet.StoredEvent{}, fmt.Errorf("the server's event is not understood: %w", err)
		}
		return e, nil
	case "gap":
		var g Gap
		if err := json.Unmarshal([]byte(data), &g); err != nil {
			return fleet.StoredEvent{}, fmt.Errorf("the server's event is not understood: %w", err)
		}
		return fleet.StoredEvent{}, &g
	default:
		return fleet.StoredEvent{}, nil // a kind of a later server
	}
}
