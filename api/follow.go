package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
)

// The bounds of streams.
const (
	maxFollowers  = 64
	followWrite   = 10 * time.Second // for a follower to take one message; a slower one is cut off and resumes
	followPage    = 200
	reconnectTime = 2 * time.Second // told to the client
)

// stream writes server-sent events. Source: WHATWG HTML, section 9.2.
type stream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	failed  error
}

func (st *stream) printf(format string, args ...any) {
	if st.failed == nil {
		_ = st.control.SetWriteDeadline(time.Now().Add(followWrite)) // not all writers have deadlines
		_, st.failed = fmt.Fprintf(st.w, format, args...)
	}
}

func (st *stream) flush() {
	if st.failed == nil {
		st.failed = st.control.Flush()
	}
}

// follow streams the events that q selects, from the position after from on, until the client goes or may no longer:
// who asks, and whether policy permits it, is established again at every heartbeat.
func (s *server) follow(w http.ResponseWriter, r *http.Request, c *call, q fleet.EventQuery, from uint64, resumed bool) {
	ctx := r.Context()
	st := &stream{w: w, control: http.NewResponseController(w)}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	// The position alone, so that a client which is cut off before the first event misses none either.
	st.printf("retry: %d\nid: %d\n\n", reconnectTime.Milliseconds(), from)
	if resumed {
		s.tellGap(ctx, st, from)
	}
	st.flush()
	beat := time.NewTicker(s.heartbeat)
	defer beat.Stop()
	for st.failed == nil {
		stored := s.events.EventsStored()
		q.After, q.Limit = from, followPage
		items, err := s.events.Events(ctx, q)
		if err != nil {
			s.log.ErrorContext(ctx, "events could not be read for a follower", "error", err)
			return
		}
		for _, e := range items {
			from = e.Position
			if data, err := json.Marshal(e); err == nil { // an event was JSON before
				st.printf("id: %d\ndata: %s\n\n", e.Position, data)
			}
		}
		if len(items) > 0 {
			st.flush()
		}
		if len(items) == followPage {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-s.drain:
			return
		case <-stored:
		case <-beat.C:
			if !s.still(c, r) {
				return
			}
			st.printf(": still here\n\n")
			st.flush()
		}
	}
}

// still reports whether the follower is who it was and may follow yet: a revoked machine, a changed credential or a new
// policy ends a stream that began before. Only a refusal is recorded: a permit is the one already recorded.
func (s *server) still(c *call, r *http.Request) bool {
	who, err := s.identify(r)
	if err == nil && who.entity.UID == c.who.entity.UID {
		again := *c
		again.who = who
		d, err := s.judge(r.Context(), s.ask(&again, r))
		if err == nil {
			return true
		}
		if d != nil {
			s.sink.Emit(event.OfDecision(d))
		}
	}
	s.meter.Count("api_follow_ended", 1)
	return false
}

// tellGap says so if events after from are no longer kept: a stream that resumes must not skip them in silence.
func (s *server) tellGap(ctx context.Context, st *stream, from uint64) {
	oldest, err := s.events.Events(ctx, fleet.EventQuery{Limit: 1})
	if err == nil && len(oldest) > 0 && oldest[0].Position > from+1 {
		s.meter.Count("api_follow_gaps", 1)
		st.printf("event: gap\ndata: {\"after\":%d,\"before\":%d}\n\n", from, oldest[0].Position)
	}
}
