package set_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy/set"
)

// policies returns n permits, each for services of its own.
func policies(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "@id(\"p%d\")\npermit(principal in Service::\"s%d\", action == Net::Action::\"connect\", resource == Service::\"t%d\")\nwhen { context has port && context.port == 8080 };\n", i, i, i)
	}
	return b.String()
}

func BenchmarkParse1000(b *testing.B) {
	files := []set.File{cedarFile(policies(1000)), yml(everything)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := set.Parse(files); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1000} {
		s := mustParse(b, cedarFile(policies(n)), yml(enforceAll))
		r := connect(workload(fmt.Sprintf("s%d", n/2), nil), entity("Service", fmt.Sprintf("t%d", n/2)))
		r.Context = map[string]any{"port": int64(8080)}
		b.Run(fmt.Sprintf("permit/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := s.Decide(b.Context(), r, set.DecideOptions{Machine: "m1"}); !d.Allowed() {
					b.Fatal(d.Explanation.Summary)
				}
			}
		})
		miss := connect(workload("other", nil), entity("Service", "t1"))
		b.Run(fmt.Sprintf("default-deny/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d := s.Decide(b.Context(), miss, set.DecideOptions{Machine: "m1"}); d.Allowed() {
					b.Fatal(d.Explanation.Summary)
				}
			}
		})
	}
}

func BenchmarkIssue(b *testing.B) {
	var text strings.Builder
	for i := range 100 {
		text.WriteString(rule(fmt.Sprintf("r%d", i), fmt.Sprintf(`context.service == "s%d"`, i), "/service/{workload.service}", i))
	}
	s := mustParse(b, yml(text.String()))
	f := facts(b, identity.FactService, "s50", identity.FactMachine, "m1")
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := s.Issue(domain, f); err != nil {
			b.Fatal(err)
		}
	}
}
