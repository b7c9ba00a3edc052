package eval_test

import (
	"testing"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
)

func TestFirstDecision(t *testing.T) {
	e, err := eval.Compile([]eval.File{{Name: "shop.cedar", Text: []byte(`
@id("shop-reads")
permit(principal in Service::"shop", action == Net::Action::"connect", resource == Service::"orders")
when { context has port && context.port == 8080 };
permit(principal, action == Net::Action::"connect", resource in Service::"orders") when { principal has uid && principal.uid == 0 };
forbid(principal is Workload, action, resource) when { principal has quarantined && principal.quarantined };
`)}})
	if err != nil {
		t.Fatal(err)
	}
	r := &policy.Request{
		Principal: policy.Entity{UID: policy.UID{Type: "Workload", ID: "w"}, Parents: []policy.UID{{Type: "Service", ID: "shop"}}},
		Action:    policy.Action(policy.Net, "connect"), Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "orders"}},
		Context: policy.Record{"port": int64(8080)},
	}
	v, x, err := e.Decide(t.Context(), r)
	t.Logf("%v %+v %v", v, x, err)
	r.Context["port"] = int64(1)
	v, x, err = e.Decide(t.Context(), r)
	t.Logf("%v %+v %v", v, x, err)
	r.Resource.UID.ID = "payments"
	v, x, err = e.Decide(t.Context(), r)
	t.Logf("%v %+v %v", v, x, err)
	r.Principal.Attrs = policy.Record{"quarantined": true}
	v, x, err = e.Decide(t.Context(), r)
	t.Logf("%v %+v %v", v, x, err)
}
