package api_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/client"
)

// events is those of a house.
type events = api.Events

// failing is a fleet that lost events and cannot publish, or one that recovered.
type failing struct {
	events
	dropped uint64
	problem string
}

func (f failing) Dropped() uint64        { return f.dropped }
func (f failing) PublishProblem() string { return f.problem }

func TestStatusShowsWhatTheFleetLost(t *testing.T) {
	for _, f := range []failing{{}, {dropped: 7}, {problem: "the disk is full"}, {dropped: 1, problem: "it is too large"}} {
		s := serve(t, func(c *api.Config) { f.events = c.Events; c.Events = f })
		problems := into[client.Status](t, s.call("GET", "/v1/status", "")).Problems
		has := func(text string) bool {
			return slices.ContainsFunc(problems, func(p string) bool { return strings.Contains(p, text) })
		}
		if has("were dropped") != (f.dropped > 0) || has("did not reach the agents: "+f.problem) != (f.problem != "") {
			t.Errorf("%d dropped, %q: %q", f.dropped, f.problem, problems)
		}
	}
}
