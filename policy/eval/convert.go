package eval

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"

	"github.com/redoubtsec/redoubt/policy"
)

// question is a request in Cedar's types, and the store of its entities. Entities are converted when they are first asked
// for, and only the attributes and tags that a policy mentions.
//
// Concurrency: of one goroutine.
type question struct {
	principal, action, resource types.EntityUID
	context                     types.Record
	entities                    []asked                   // in the order in which they count
	byUID                       map[types.EntityUID]int32 // nil while they are few
	model                       *model
	mentions                    *mentions
}

// asked is one entity of a request.
type asked struct {
	uid       types.EntityUID
	source    *policy.Entity
	converted bool
	entity    types.Entity
}

// few is how many entities are searched one by one.
const few = 8

// ask checks a request and makes a question of it. Of two entities with one UID the first counts: principal, then
// resource, then others.
//
// Errors: a refusal with code malformed-request that names the key, like `principal.attrs.uid`.
func ask(r *policy.Request, m *model, said *mentions) (*question, error) {
	if len(r.Others)+2 > maxEntities {
		return nil, malformed("others", fmt.Sprintf("there are more than %d entities", maxEntities-2))
	}
	q := &question{
		principal: cedarUID(r.Principal.UID), action: cedarUID(r.Action), resource: cedarUID(r.Resource.UID),
		entities: make([]asked, 0, 2+len(r.Others)), model: m, mentions: said,
	}
	shape, err := m.applies(q)
	if err != nil {
		return nil, err
	}
	if len(r.Others)+2 > few {
		q.byUID = make(map[types.EntityUID]int32, 2+len(r.Others))
	}
	c := converter{model: m}
	if f := c.check(&r.Principal); f != nil {
		return nil, f.under("principal").refusal()
	}
	q.add(&r.Principal)
	if f := c.check(&r.Resource); f != nil {
		return nil, f.under("resource").refusal()
	}
	q.add(&r.Resource)
	for i := range r.Others {
		if f := c.check(&r.Others[i]); f != nil {
			return nil, f.under("others[" + strconv.Itoa(i) + "]").refusal()
		}
		q.add(&r.Others[i])
	}
	keep := said.attr
	if said.wholeContext {
		keep = everything
	}
	context, f := c.record(r.Context, shape, 0, keep)
	if f != nil {
		return nil, f.under("context").refusal()
	}
	q.context = context
	return q, nil
}

// applies checks action, principal and resource against the schema, and returns the shape of the context, nil for any.
func (m *model) applies(q *question) (*shape, error) {
	if m == nil {
		return nil, nil
	}
	a, ok := m.schema.Actions[q.action]
	if !ok || a.AppliesTo == nil {
		return nil, malformed("action", "the schema has no action "+uid(q.action))
	}
	if !slices.Contains(a.AppliesTo.Principals, q.principal.Type) {
		return nil, malformed("principal", fmt.Sprintf("%s does not apply to a principal of type %q", uid(q.action), quote(string(q.principal.Type))))
	}
	if !slices.Contains(a.AppliesTo.Resources, q.resource.Type) {
		return nil, malformed("resource", fmt.Sprintf("%s does not apply to a resource of type %q", uid(q.action), quote(string(q.resource.Type))))
	}
	return m.contexts[q.action], nil
}

// knows reports whether the schema has the type of uid, or the action that uid is.
func (m *model) knows(uid types.EntityUID) bool {
	if m == nil {
		return true
	}
	_, entity := m.schema.Entities[uid.Type]
	_, enum := m.schema.Enums[uid.Type]
	_, action := m.schema.Actions[uid]
	return entity || enum || action
}

func (q *question) add(e *policy.Entity) {
	uid := cedarUID(e.UID)
	if q.find(uid) != nil {
		return
	}
	if q.byUID != nil {
		q.byUID[uid] = int32(len(q.entities))
	}
	q.entities = append(q.entities, asked{uid: uid, source: e})
}

func (q *question) find(uid types.EntityUID) *asked {
	if q.byUID != nil {
		if i, ok := q.byUID[uid]; ok {
			return &q.entities[i]
		}
		return nil
	}
	for i := range q.entities {
		if q.entities[i].uid == uid {
			return &q.entities[i]
		}
	}
	return nil
}

// Get implements types.EntityGetter: the entities of the request, and the actions of the schema.
func (q *question) Get(uid types.EntityUID) (types.Entity, bool) {
	a := q.find(uid)
	if a == nil {
		return q.model.action(uid)
	}
	if !a.converted {
		a.convert(q.mentions)
	}
	return a.entity, true
}

// parents implements lineage.
func (q *question) parents(into []types.EntityUID, uid types.EntityUID) []types.EntityUID {
	a := q.find(uid)
	if a == nil {
		if e, ok := q.model.action(uid); ok {
			into = slices.AppendSeq(into, e.Parents.All())
		}
		return into
	}
	for _, p := range a.source.Parents {
		into = append(into, cedarUID(p))
	}
	return into
}

// convert converts an entity that was checked before, and so cannot fail.
func (a *asked) convert(said *mentions) {
	a.converted = true
	a.entity.UID = a.uid
	if n := len(a.source.Parents); n > 0 {
		parents := make([]types.EntityUID, n)
		for i, p := range a.source.Parents {
			parents[i] = cedarUID(p)
		}
		a.entity.Parents = types.NewEntityUIDSet(parents...)
	}
	var c converter
	a.entity.Attributes, _ = c.record(a.source.Attrs, nil, 0, said.attr)
	var tags types.RecordMap
	for k, v := range a.source.Tags {
		if said.tag(k) {
			if tags == nil {
				tags = make(types.RecordMap, 4)
			}
			tags[types.String(k)] = types.String(v)
		}
	}
	a.entity.Tags = types.NewRecord(tags)
}

// mentions is what the conditions of a set of policies speak of. An attribute that none mentions cannot change an
// answer, and need not be converted: the attributes of an entity are reached by `.name` and `has name` only. Tags are
// reached by name too, unless a policy computes the name; so is context, unless a policy takes it whole, to compare it.
type mentions struct {
	attrs        map[string]bool
	tags         map[string]bool
	allTags      bool
	wholeContext bool
}

func newMentions() mentions { return mentions{attrs: map[string]bool{}, tags: map[string]bool{}} }

func (m *mentions) attr(name string) bool { return m.attrs[name] }

func (m *mentions) tag(name string) bool { return m.allTags || m.tags[name] }

// read takes in one condition.
func (m *mentions) read(n ast.IsNode) {
	contexts, taken := 0, 0 // how often context is spoken of, and how often one of its keys is taken
	name := func(n ast.StrOpNode) {
		m.attrs[string(n.Value)] = true
		if v, ok := n.Arg.(ast.NodeTypeVariable); ok && v.Name == "context" {
			taken++
		}
	}
	tag := func(n ast.BinaryNode) {
		if v, ok := n.Right.(ast.NodeValue); ok {
			if s, ok := v.Value.(types.String); ok {
				m.tags[string(s)] = true
				return
			}
		}
		m.allTags = true
	}
	ast.Inspect(ast.NewNode(n), func(n ast.IsNode) bool {
		switch n := n.(type) {
		case ast.NodeTypeVariable:
			if n.Name == "context" {
				contexts++
			}
		case ast.NodeTypeAccess:
			name(n.StrOpNode)
		case ast.NodeTypeHas:
			name(n.StrOpNode)
		case ast.NodeTypeGetTag:
			tag(n.BinaryNode)
		case ast.NodeTypeHasTag:
			tag(n.BinaryNode)
		}
		return true
	})
	if contexts > taken {
		m.wholeContext = true
	}
}
