package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/refusal"
)

// TestADecisionIsNamedOnce: by the refusal if it does, else by the command.
func TestADecisionIsNamedOnce(t *testing.T) {
	for _, do := range []string{"ask for a policy that permits it", "look at the decision with redoubt why d-7"} {
		var out bytes.Buffer
		c := &cli{streams: streams{err: &out}}
		err := &refusal.Error{Kind: refusal.Denied, Code: "not-permitted", What: "operation get-status", Why: "no policy permits it", Do: do, Decision: "d-7"}
		if code := c.report(fmt.Errorf("status: %w", err)); code != exitFailed {
			t.Errorf("exit code %d", code)
		}
		if n := strings.Count(out.String(), "redoubt why d-7"); n != 1 {
			t.Errorf("the decision is named %d times:\n%s", n, out.String())
		}
	}
}
