package eval

import (
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// Cut apart, a file gives the same policies, at the same places, as when cedar-go reads it whole.
func TestSplitAgreesWithTheParser(t *testing.T) {
	t.Parallel()
	text := `
// a ; comment "with a quote
permit(principal == User::"a;\"}b", action, resource); permit ( principal,
	action, resource ) when { context.x like "*;\*" } /* ; " */ ;
	/* é */ @id("é;") forbid(principal, action, resource) unless { {"a;": ";"} == {} };permit(principal,action,resource);`
	whole, err := cedar.NewPolicyListFromBytes("", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var parts []*cedar.Policy
	split([]byte(text), func(s span) bool {
		p, err := parse(s)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, p)
		return true
	})
	if len(parts) != len(whole) {
		t.Fatalf("%d policies, want %d", len(parts), len(whole))
	}
	for i := range whole {
		if got, want := parts[i].Position(), whole[i].Position(); got != want {
			t.Errorf("policy %d is at %+v, want %+v", i, got, want)
		}
		if got, want := string(parts[i].MarshalCedar()), string(whole[i].MarshalCedar()); got != want {
			t.Errorf("policy %d is %s, want %s", i, got, want)
		}
	}
}

// What the splitter takes for one policy and the parser for two is refused, not half read.
func TestASpanThatIsNotOnePolicyIsRefused(t *testing.T) {
	t.Parallel()
	const one = "permit(principal,action,resource);"
	for _, text := range []string{one + one, "", "// nothing"} {
		if _, err := parse(span{text: []byte(text), line: 1, column: 1}); err == nil {
			t.Errorf("%q was taken for one policy", text)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add("permit(principal,action,resource);/*;*/permit(principal,action,resource)when{\"\\\";\"==\"\"};")
	f.Add("// ;\n;;\"\\")
	f.Fuzz(func(t *testing.T, text string) {
		end := 0
		var parts []string
		split([]byte(text), func(s span) bool {
			if s.offset < end || string(s.text) != text[s.offset:s.offset+len(s.text)] {
				t.Fatalf("%q is not at %d", s.text, s.offset)
			}
			if before := text[:s.offset]; s.line != 1+strings.Count(before, "\n") {
				t.Fatalf("%q is not on line %d", s.text, s.line)
			}
			end = s.offset + len(s.text)
			parts = append(parts, string(s.text))
			return true
		})
		var list cedar.PolicyList
		if len(text) > 1000 || list.UnmarshalCedar([]byte(text)) != nil {
			return
		}
		if len(parts) != len(list) {
			t.Fatalf("%d parts of %d policies: %q", len(parts), len(list), parts)
		}
	})
}
