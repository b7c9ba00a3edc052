package policy_test

import (
	"testing"

	"github.com/redoubtsec/redoubt/policy"
)

func TestDecisionsLetThroughWhatTheyMay(t *testing.T) {
	for _, c := range []struct {
		verdict        policy.Verdict
		mode           policy.Mode
		allowed, would bool
	}{
		{policy.Permit, policy.Enforce, true, false},
		{policy.Permit, policy.Observe, true, false},
		{policy.Deny, policy.Enforce, false, false},
		{policy.Deny, policy.Observe, true, true},
		{"", "", false, false},
	} {
		d := policy.Decision{Verdict: c.verdict, Mode: c.mode}
		if d.Allowed() != c.allowed || d.WouldDeny() != c.would {
			t.Errorf("%s in %s: allowed %v, would deny %v", c.verdict, c.mode, d.Allowed(), d.WouldDeny())
		}
	}
}

func TestActionsKnowTheirNamespace(t *testing.T) {
	if a := policy.Action(policy.Net, "connect"); a.String() != `Net::Action::"connect"` || a.Namespace() != policy.Net {
		t.Errorf("got %s in %q", a, a.Namespace())
	}
	if ns := (policy.UID{Type: "Workload", ID: "x"}).Namespace(); ns != "" || !(policy.UID{}).IsZero() {
		t.Errorf("got %q", ns)
	}
}
