package event_test

import (
	"encoding/json"
	"testing"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/policy"
)

func TestEventOfADecisionCarriesItWhole(t *testing.T) {
	for namespace, layer := range map[string]event.Layer{
		policy.Run: event.Runtime, policy.Net: event.Network, policy.API: event.API, policy.Access: event.Access, "Other": event.Control,
	} {
		d := &policy.Decision{ID: policy.NewID(), Verdict: policy.Deny, Mode: policy.Observe, Request: policy.Request{Action: policy.Action(namespace, "x")}}
		e := event.OfDecision(d)
		var back policy.Decision
		if err := json.Unmarshal(e.Detail, &back); err != nil || back.ID != d.ID || e.Layer != layer || e.Decision != d.ID || e.Verdict != d.Verdict {
			t.Errorf("%s: %+v, %v", namespace, e, err)
		}
	}
}

func TestRecordRendersTheSameBytesAlways(t *testing.T) {
	r := event.NewRecord(`User::"operator"`, "policy-set.apply", "1")
	r.Detail = map[string]string{"b": "2", "a": "1"}
	one, err := r.Leaf()
	two, _ := r.Leaf()
	if err != nil || string(one) != string(two) || r.ID == event.NewRecord("", "", "").ID {
		t.Errorf("%s, %s, %v", one, two, err)
	}
	event.NoMeter.Count("x", 1)
	event.NoSink.Emit(event.New(event.Control, "x"))
}
