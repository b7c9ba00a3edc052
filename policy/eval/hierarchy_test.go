package eval

import (
	"testing"

	"github.com/cedar-policy/cedar-go/types"

	"github.com/redoubtsec/redoubt/policy"
)

// The parents of an action come from the schema: requests do not carry them, and must not need to.
func TestActionsAreInTheirGroups(t *testing.T) {
	t.Parallel()
	m, err := newModel("test", []byte(`entity User; entity Doc;
action all; action read in [all];
action view in [read] appliesTo { principal: [User], resource: [Doc] };
action drop appliesTo { principal: [User], resource: [Doc] };`))
	if err != nil {
		t.Fatal(err)
	}
	e, err := compile([]File{{Name: "a", Text: []byte(`permit(principal, action in Action::"all", resource) when { action in Action::"read" };`)}}, m, true, fileName)
	if err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string]policy.Verdict{"view": policy.Permit, "drop": policy.Deny} {
		verdict, x, err := e.Decide(t.Context(), &policy.Request{
			Principal: policy.Entity{UID: policy.UID{Type: "User", ID: "a"}}, Action: policy.UID{Type: "Action", ID: action},
			Resource: policy.Entity{UID: policy.UID{Type: "Doc", ID: "d"}},
		})
		if err != nil || verdict != want {
			t.Errorf("%s: %s %+v %v", action, verdict, x, err)
		}
	}
}

// A required attribute that is absent is refused, so that a policy that relies on it cannot fail at run time.
func TestRequiredAttributesMustBeThere(t *testing.T) {
	t.Parallel()
	m, err := newModel("test", []byte(`entity User { level: Long, at?: { x: Long } }; entity Doc;
action view appliesTo { principal: [User], resource: [Doc], context: { n: Long } };`))
	if err != nil {
		t.Fatal(err)
	}
	said := newMentions()
	ask1 := func(attrs, context policy.Record) error {
		_, err := ask(&policy.Request{
			Principal: policy.Entity{UID: policy.UID{Type: "User", ID: "a"}, Attrs: attrs}, Action: policy.UID{Type: "Action", ID: "view"},
			Resource: policy.Entity{UID: policy.UID{Type: "Doc", ID: "d"}}, Context: context,
		}, m, &said)
		return err
	}
	good := policy.Record{"n": int64(1)}
	if err := ask1(policy.Record{"level": int64(1)}, good); err != nil {
		t.Error(err)
	}
	for _, attrs := range []policy.Record{nil, {"level": int64(1), "at": policy.Record{}}} {
		if err := ask1(attrs, good); err == nil {
			t.Errorf("%v was taken", attrs)
		}
	}
	if err := ask1(policy.Record{"level": int64(1)}, nil); err == nil {
		t.Error("a context without n was taken")
	}
}

// With many ancestors the list of those seen becomes a map; both must find the same, cycles included.
func TestAncestryOfManyGenerations(t *testing.T) {
	t.Parallel()
	const generations = 200
	store := types.EntityMap{}
	person := func(i int) types.EntityUID {
		return types.NewEntityUID("P", types.String(rune('0'+i%generations)))
	}
	for i := range generations {
		store[person(i)] = types.Entity{UID: person(i), Parents: types.NewEntityUIDSet(person(i+1), person(i+2), person(i))}
	}
	var s scratch
	if got := len(s.ancestry(person(0), stored{store})); got != generations {
		t.Errorf("%d ancestors, want %d", got, generations)
	}
}
