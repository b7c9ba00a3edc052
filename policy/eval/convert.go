package eval

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of one request.
const (
	maxValueDepth   = 16      // records and sets within one another
	maxValues       = 10_000  // values of all records together
	maxRequestBytes = 1 << 20 // of all keys, strings and ids together
	maxEntities     = 1_000   // principal, resource and others
	maxParents      = 1_000   // of one entity
)

// codeRequest is the code of every refusal of a request or record that does not fit the schema or the bounds.
const codeRequest = "malformed-request"

// question is a request in Cedar's types. It is its own store of entities.
//
// Concurrency: of one goroutine.
type question struct {
	principal, action, resource types.EntityUID
	context                     types.Record
	entities                    []types.Entity // few: searched one by one below a handful, else by byUID
	byUID                       map[types.EntityUID]int
	model                       *model
}

// Get implements types.EntityGetter: the entities of the request, and the actions of the schema.
func (q *question) Get(uid types.EntityUID) (types.Entity, bool) {
	if q.byUID != nil {
		if i, ok := q.byUID[uid]; ok {
			return q.entities[i], true
		}
		return q.model.action(uid)
	}
	for i := range q.entities {
		if q.entities[i].UID == uid {
			return q.entities[i], true
		}
	}
	return q.model.action(uid)
}

// ask converts a request. Of two entities with one UID the first counts: principal, then resource, then others.
//
// Errors: a refusal with code malformed-request that names the key, like `principal.attrs.uid`.
func ask(r *policy.Request, m *model) (*question, error) {
	if len(r.Others)+2 > maxEntities {
		return nil, malformed("others", fmt.Sprintf("there are more than %d entities", maxEntities-2))
	}
	c := converter{model: m}
	q := &question{
		principal: cedarUID(r.Principal.UID), action: cedarUID(r.Action), resource: cedarUID(r.Resource.UID),
		entities: make([]types.Entity, 0, 2+len(r.Others)), model: m,
	}
	shape, err := m.applies(q)
	if err != nil {
		return nil, err
	}
	for i := -2; i < len(r.Others); i++ {
		var e *policy.Entity
		var at string
		switch i {
		case -2:
			e, at = &r.Principal, "principal"
		case -1:
			e, at = &r.Resource, "resource"
		default:
			e = &r.Others[i]
		}
		entity, err := c.entity(e)
		if err != nil {
			if at == "" {
				at = "others[" + strconv.Itoa(i) + "]"
			}
			return nil, err.under(at).refusal()
		}
		if q.byUID == nil && len(r.Others) > 6 {
			q.byUID = make(map[types.EntityUID]int, 2+len(r.Others))
		}
		if q.byUID != nil {
			if _, dup := q.byUID[entity.UID]; dup {
				continue
			}
			q.byUID[entity.UID] = len(q.entities)
		}
		q.entities = append(q.entities, entity)
	}
	context, fault := c.record(r.Context, shape, 0)
	if fault != nil {
		return nil, fault.under("context").refusal()
	}
	q.context = context
	return q, nil
}

// applies checks action, principal and resource against the schema, and returns the shape of the context, nil for any.
func (m *model) applies(q *question) (*resolved.RecordType, error) {
	if m == nil {
		return nil, nil
	}
	a, ok := m.schema.Actions[q.action]
	if !ok || a.AppliesTo == nil {
		return nil, malformed("action", "the schema has no action "+quote(q.action.String()))
	}
	if !slices.Contains(a.AppliesTo.Principals, q.principal.Type) {
		return nil, malformed("principal", fmt.Sprintf("%s does not apply to a principal of type %s", q.action, quote(string(q.principal.Type))))
	}
	if !slices.Contains(a.AppliesTo.Resources, q.resource.Type) {
		return nil, malformed("resource", fmt.Sprintf("%s does not apply to a resource of type %s", q.action, quote(string(q.resource.Type))))
	}
	return &a.AppliesTo.Context, nil
}

func malformed(key, why string) *refusal.Error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeRequest, What: "policy request", Why: key + ": " + why,
		Do: "ask in the terms of the published schema",
	}
}

// fault is a value that cannot be converted, and where: keys are put before one another on the way up.
type fault struct{ at, why string }

func (f *fault) under(key string) *fault {
	switch {
	case f.at == "":
		f.at = key
	case f.at[0] == '[':
		f.at = key + f.at
	default:
		f.at = key + "." + f.at
	}
	return f
}

func (f *fault) refusal() *refusal.Error { return malformed(quote(f.at), f.why) }

// converter counts one request's values and bytes against the bounds.
type converter struct {
	model  *model
	values int
	bytes  int
}

func (c *converter) count(bytes int) *fault {
	c.values++
	c.bytes += bytes
	switch {
	case c.values > maxValues:
		return &fault{why: fmt.Sprintf("the request has more than %d values", maxValues)}
	case c.bytes > maxRequestBytes:
		return &fault{why: fmt.Sprintf("the request is larger than %d bytes", maxRequestBytes)}
	}
	return nil
}

func (c *converter) uid(u policy.UID) (types.EntityUID, *fault) {
	if u.Type == "" {
		return types.EntityUID{}, &fault{why: "the entity has no type"}
	}
	if f := c.count(len(u.Type) + len(u.ID)); f != nil {
		return types.EntityUID{}, f
	}
	uid := cedarUID(u)
	if !c.model.knows(uid) {
		return types.EntityUID{}, &fault{why: "the schema has no entity type " + quote(u.Type)}
	}
	return uid, nil
}

// knows reports whether the schema has the type of uid, or the action that uid is.
func (m *model) knows(uid types.EntityUID) bool {
	if m == nil {
		return true
	}
	if _, ok := m.schema.Entities[uid.Type]; ok {
		return true
	}
	_, ok := m.schema.Actions[uid]
	return ok
}

func (c *converter) entity(e *policy.Entity) (types.Entity, *fault) {
	var out types.Entity
	uid, f := c.uid(e.UID)
	if f != nil {
		return out, f.under("uid")
	}
	out.UID = uid
	var shape *resolved.RecordType
	var kind resolved.Entity
	if c.model != nil {
		kind = c.model.schema.Entities[uid.Type]
		shape = &kind.Shape
	}
	if len(e.Parents) > maxParents {
		return out, &fault{at: "parents", why: fmt.Sprintf("there are more than %d", maxParents)}
	}
	if len(e.Parents) > 0 {
		parents := make([]types.EntityUID, len(e.Parents))
		for i, p := range e.Parents {
			if parents[i], f = c.uid(p); f != nil {
				return out, f.under("parents[" + strconv.Itoa(i) + "]")
			}
			if c.model != nil && !slices.Contains(kind.ParentTypes, parents[i].Type) {
				return out, &fault{at: "parents[" + strconv.Itoa(i) + "]", why: fmt.Sprintf("the schema has no %s in a %s", uid.Type, p.Type)}
			}
		}
		out.Parents = types.NewEntityUIDSet(parents...)
	}
	if out.Attributes, f = c.record(e.Attrs, shape, 0); f != nil {
		return out, f.under("attrs")
	}
	if len(e.Tags) > 0 {
		if c.model != nil && kind.Tags == nil {
			return out, &fault{at: "tags", why: "the schema has no tags on a " + string(uid.Type)}
		}
		tags := make(types.RecordMap, len(e.Tags))
		for k, v := range e.Tags {
			if f := c.count(len(k) + len(v)); f != nil {
				return out, f.under("tags")
			}
			tags[types.String(k)] = types.String(v)
		}
		out.Tags = types.NewRecord(tags)
	}
	return out, nil
}

// record converts a record of the given shape, nil for any.
func (c *converter) record(r policy.Record, shape *resolved.RecordType, depth int) (types.Record, *fault) {
	if depth > maxValueDepth {
		return types.Record{}, &fault{why: fmt.Sprintf("records and sets are nested deeper than %d", maxValueDepth)}
	}
	if shape != nil {
		for k, a := range *shape {
			if _, ok := r[string(k)]; !ok && !a.Optional {
				return types.Record{}, &fault{at: string(k), why: "the schema requires it, and it is absent"}
			}
		}
	}
	if len(r) == 0 {
		return types.Record{}, nil
	}
	m := make(types.RecordMap, len(r))
	for k, v := range r {
		if f := c.count(len(k)); f != nil {
			return types.Record{}, f
		}
		var want resolved.IsType
		if shape != nil {
			a, ok := (*shape)[types.String(k)]
			if !ok {
				return types.Record{}, &fault{at: k, why: "the schema does not have it here"}
			}
			want = a.Type
		}
		value, f := c.value(v, want, depth+1)
		if f != nil {
			return types.Record{}, f.under(k)
		}
		m[types.String(k)] = value
	}
	return types.NewRecord(m), nil
}

// value converts one value of the given type, nil for any.
func (c *converter) value(v any, want resolved.IsType, depth int) (types.Value, *fault) {
	switch v := v.(type) {
	case string:
		if f := c.count(len(v)); f != nil {
			return nil, f
		}
		return types.String(v), mismatch(want, resolved.StringType{}, "a string")
	case bool:
		return types.Boolean(v), mismatch(want, resolved.BoolType{}, "a bool")
	case int64:
		return types.Long(v), mismatch(want, resolved.LongType{}, "a whole number")
	case time.Time:
		return types.NewDatetime(v), mismatch(want, resolved.ExtensionType("datetime"), "a time")
	case netip.Addr:
		ip, f := address(netip.PrefixFrom(v, v.BitLen()))
		if f != nil {
			return nil, f
		}
		return ip, mismatch(want, resolved.ExtensionType("ipaddr"), "an address")
	case netip.Prefix:
		ip, f := address(v)
		if f != nil {
			return nil, f
		}
		return ip, mismatch(want, resolved.ExtensionType("ipaddr"), "an address")
	case policy.UID:
		uid, f := c.uid(v)
		if f != nil {
			return nil, f
		}
		return uid, mismatch(want, resolved.EntityType(v.Type), "an entity of type "+quote(v.Type))
	case policy.Record:
		if want == nil {
			return boxed(c.record(v, nil, depth))
		}
		shape, ok := want.(resolved.RecordType)
		if !ok {
			return nil, &fault{why: "it is a record, and the schema wants " + typeName(want)}
		}
		return boxed(c.record(v, &shape, depth))
	case []any:
		return c.set(v, want, depth)
	default:
		return nil, &fault{why: fmt.Sprintf("a %T is no value of a policy", v)}
	}
}

func boxed(r types.Record, f *fault) (types.Value, *fault) { return r, f }

func (c *converter) set(items []any, want resolved.IsType, depth int) (types.Value, *fault) {
	if depth > maxValueDepth {
		return nil, &fault{why: fmt.Sprintf("records and sets are nested deeper than %d", maxValueDepth)}
	}
	var element resolved.IsType
	if want != nil {
		s, ok := want.(resolved.SetType)
		if !ok {
			return nil, &fault{why: "it is a set, and the schema wants " + typeName(want)}
		}
		element = s.Element
	}
	values := make([]types.Value, len(items))
	for i, item := range items {
		f := c.count(0)
		if f == nil {
			values[i], f = c.value(item, element, depth+1)
		}
		if f != nil {
			return nil, f.under("[" + strconv.Itoa(i) + "]")
		}
	}
	return types.NewSet(values...), nil
}

// address converts an address or range. One of IPv4 within IPv6 becomes the IPv4 one that it is, since a range of IPv4
// in a policy would not hold it, and a socket that listens on both reports it so. A zone is left out: Cedar has none.
func address(p netip.Prefix) (types.IPAddr, *fault) {
	a := p.Addr()
	switch {
	case !p.IsValid():
		return types.IPAddr{}, &fault{why: "it is no valid address"}
	case a.Is4In6() && p.Bits() < 96:
		return types.IPAddr{}, &fault{why: "a range of IPv4 within IPv6 must have 96 bits or more"}
	case a.Is4In6():
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return types.IPAddr(p), nil
}

func mismatch(want, got resolved.IsType, is string) *fault {
	if want == nil || want == got {
		return nil
	}
	return &fault{why: "it is " + is + ", and the schema wants " + typeName(want)}
}

func typeName(t resolved.IsType) string {
	switch t := t.(type) {
	case resolved.StringType:
		return "a string"
	case resolved.LongType:
		return "a whole number"
	case resolved.BoolType:
		return "a bool"
	case resolved.SetType:
		return "a set"
	case resolved.RecordType:
		return "a record"
	case resolved.EntityType:
		return "an entity of type " + string(t)
	case resolved.ExtensionType:
		return "a value of type " + string(t)
	default:
		return "another type"
	}
}

func cedarUID(u policy.UID) types.EntityUID {
	return types.EntityUID{Type: types.EntityType(u.Type), ID: types.String(u.ID)}
}
