package policy

import (
	"github.com/redoubtsec/redoubt/identity"
)

// UID names one entity: a type of the schema ("Workload", "Net::Action") and an id within it.
//
// Shape: comparable. Zero value: no entity.
type UID struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// String renders Cedar's form, Type::"id". It is for reading; ids are not escaped here.
func (u UID) String() string { return u.Type + `::"` + u.ID + `"` }

// IsZero reports whether u names nothing.
func (u UID) IsZero() bool { return u == UID{} }

// Record is a bag of named values.
//
// Shape: a value is a string, bool, int64, time.Time (Cedar datetime), netip.Addr or netip.Prefix (Cedar ipaddr), [UID],
// []any of values (Cedar set) or Record. An engine refuses anything else with an error that names the key.
type Record map[string]any

// Entity is one thing that a request or a policy speaks of.
//
// Tags hold labels, which have no fixed names (Cedar entity tags).
type Entity struct {
	UID     UID               `json:"uid"`
	Parents []UID             `json:"parents,omitempty"`
	Attrs   Record            `json:"attrs,omitempty"`
	Tags    map[string]string `json:"tags,omitempty"`
}

// Request asks: may this principal do this action to this resource, in this context?
//
// Others are further entities that policies may speak of (parents with attributes of their own). Principal and
// Resource carry what is known of them now; an engine adds nothing.
type Request struct {
	Principal Entity   `json:"principal"`
	Action    UID      `json:"action"`
	Resource  Entity   `json:"resource"`
	Context   Record   `json:"context,omitempty"`
	Others    []Entity `json:"others,omitempty"`
	// Point is who asks: "api", "agent", "mesh". It is recorded with the decision.
	Point string `json:"point,omitempty"`
	// Trace is the W3C trace id of the work in hand, 32 hex digits or empty.
	Trace string `json:"trace,omitempty"`
	// Facts are the facts behind Principal, with their epochs, for the record; engines do not read them.
	Facts identity.FactSet `json:"facts,omitzero"`
}

// The namespaces of actions, which are the layers.
const (
	Run    = "Run"
	Net    = "Net"
	API    = "Api"
	Access = "Access"
)

// Action returns the UID of an action: Action(Net, "connect") is Net::Action::"connect".
func Action(namespace, name string) UID { return UID{Type: namespace + "::Action", ID: name} }

// Namespace returns the namespace of an action's UID ("Net"), or "" if it has none.
func (u UID) Namespace() string {
	for i := 0; i+1 < len(u.Type); i++ {
		if u.Type[i] == ':' && u.Type[i+1] == ':' {
			return u.Type[:i]
		}
	}
	return ""
}
