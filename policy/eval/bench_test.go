package eval_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
)

// fleetPolicies is n rules, one for each pair of services, and a forbid over all of them.
func fleetPolicies(n int) []byte {
	var b strings.Builder
	b.WriteString(`@id("quarantine") forbid(principal is Workload, action, resource) when { principal has quarantined && principal.quarantined };` + "\n")
	for i := range n - 1 {
		fmt.Fprintf(&b, `@id("rule-%d") permit(principal in Service::"app-%d", action == Net::Action::"connect", resource == Service::"svc-%d")
when { principal.hasTag("env") && principal.getTag("env") == "prod" && context has port && context.port == 8080 };`+"\n", i, i, i)
	}
	return []byte(b.String())
}

func fleetRequest(i int) *policy.Request {
	return &policy.Request{
		Principal: policy.Entity{
			UID:     policy.UID{Type: "Workload", ID: "spiffe://example.org/service/app"},
			Parents: []policy.UID{{Type: "Service", ID: fmt.Sprintf("app-%d", i)}, {Type: "Machine", ID: "m1"}},
			Attrs:   policy.Record{"uid": int64(1000), "quarantined": false, "instance": "w-1"},
			Tags:    map[string]string{"env": "prod"},
		},
		Action:   policy.Action(policy.Net, "connect"),
		Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: fmt.Sprintf("svc-%d", i)}},
		Context:  policy.Record{"port": int64(8080), "protocol": "http"},
	}
}

// BenchmarkDecide is one decision, whole: conversion of the request, index, evaluation and explanation. BenchmarkCedar is
// the same question to cedar-go as shipped, over entities that were converted before.
func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1_000, 10_000} {
		e, err := eval.Compile([]eval.File{{Name: "fleet.cedar", Text: fleetPolicies(n)}})
		if err != nil {
			b.Fatal(err)
		}
		permit, denied := fleetRequest(n/2), fleetRequest(n/2)
		denied.Resource.UID.ID = "elsewhere"
		for _, c := range []struct {
			name string
			r    *policy.Request
			want policy.Verdict
		}{{"permit", permit, policy.Permit}, {"default-deny", denied, policy.Deny}} {
			b.Run(fmt.Sprintf("%s/policies=%d", c.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if v, _, err := e.Decide(b.Context(), c.r); err != nil || v != c.want {
						b.Fatal(v, err)
					}
				}
			})
		}
	}
}

func BenchmarkCedar(b *testing.B) {
	for _, n := range []int{10, 1_000, 10_000} {
		set, err := cedar.NewPolicySetFromBytes("fleet.cedar", fleetPolicies(n))
		if err != nil {
			b.Fatal(err)
		}
		workload := cedar.NewEntityUID("Workload", "spiffe://example.org/service/app")
		entities := cedar.EntityMap{workload: {
			UID:        workload,
			Parents:    cedar.NewEntityUIDSet(cedar.NewEntityUID("Service", cedar.String(fmt.Sprintf("app-%d", n/2))), cedar.NewEntityUID("Machine", "m1")),
			Attributes: cedar.NewRecord(cedar.RecordMap{"uid": cedar.Long(1000), "quarantined": cedar.False, "instance": cedar.String("w-1")}),
			Tags:       cedar.NewRecord(cedar.RecordMap{"env": cedar.String("prod")}),
		}}
		r := cedar.Request{
			Principal: workload, Action: cedar.NewEntityUID("Net::Action", "connect"),
			Resource: cedar.NewEntityUID("Service", cedar.String(fmt.Sprintf("svc-%d", n/2))),
			Context:  cedar.NewRecord(cedar.RecordMap{"port": cedar.Long(8080), "protocol": cedar.String("http")}),
		}
		b.Run(fmt.Sprintf("permit/policies=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if v, _ := cedar.Authorize(set, entities, r); v != cedar.Allow {
					b.Fatal(v)
				}
			}
		})
	}
}

// BenchmarkCompile is what applying a set costs: parse, validate, index.
func BenchmarkCompile(b *testing.B) {
	for _, n := range []int{10, 1_000, 10_000} {
		text := fleetPolicies(n)
		b.Run(fmt.Sprintf("policies=%d", n), func(b *testing.B) {
			for b.Loop() {
				if _, err := eval.Compile([]eval.File{{Name: "fleet.cedar", Text: text}}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
