package set

import (
	"cmp"
	"slices"

	"github.com/redoubtsec/redoubt/policy"
)

// Notice is one thing that a set says and that nothing acts on yet. Whoever applies the set is told, since what is
// silently not enforced is worse than what is refused.
type Notice struct {
	Document
	Text string `json:"text"`
}

// String renders "not done yet: Route/shop (routes.yaml:1): …".
func (n Notice) String() string {
	return "not done yet: " + place{file: n.File, kind: n.Kind, name: n.Name}.what(n.Line, "") + ": " + n.Text
}

// KindPolicy is the kind of notices and changes that are about Cedar policies.
const KindPolicy = "policy"

// actions are those of the published schema, by namespace.
var actions = map[string][]string{
	policy.Run:    {"exec", "read", "write", "setuid", "mount", "trace", "load", "mapexec"},
	policy.Net:    {"connect", "listen", "resolve"},
	policy.API:    {"call"},
	policy.Access: {"login", "use", "open", "assume", "issue", "administer"},
}

// Unenforced returns what of the set no point acts on, in order of file and line: documents, and policies whose scope
// names an action of a namespace in which nothing acts. namespaces are those whose actions a point of this build asks
// about and acts on; without any, only Access is.
func Unenforced(s *Set, namespaces ...string) []Notice {
	if len(namespaces) == 0 {
		namespaces = []string{policy.Access}
	}
	var out []Notice
	add := func(d Document, text string) { out = append(out, Notice{Document: d, Text: text}) }
	for _, r := range s.docs.routes {
		add(r.Document, "there is no gateway yet: the route is kept, and leads nowhere")
	}
	for _, i := range s.docs.issuers {
		add(i.Document, "no login and no token endpoint reads issuers yet: its tokens are not accepted anywhere")
	}
	for _, r := range s.docs.responses {
		add(r.Document, "there is no detection yet: the response never runs")
	}
	for _, v := range s.docs.services {
		if v.OpenAPI != nil {
			add(v.Document, "the OpenAPI document is kept, but no point holds calls against it yet")
		}
	}
	for _, m := range s.docs.modes {
		for _, ns := range m.Namespaces {
			if m.Mode == policy.Enforce && !slices.Contains(namespaces, ns) {
				add(m.Document, "no point acts in "+ns+" yet: what it would refuse there goes through")
			}
		}
	}
	told := map[string]bool{}
	for _, ns := range []string{policy.Run, policy.Net, policy.API, policy.Access} {
		if slices.Contains(namespaces, ns) {
			continue
		}
		for _, action := range actions[ns] {
			for _, ref := range s.engine.Names(policy.Action(ns, action)) {
				if key := ns + "\x00" + ref.ID; ref.File != builtinName && !told[key] {
					told[key] = true
					add(Document{Kind: KindPolicy, Name: ref.ID, File: ref.File}, "no point acts in "+ns+" yet: what it says of "+ns+" is answered when asked, and held by nothing")
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Notice) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	return out
}
