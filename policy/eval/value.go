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

// converter checks and converts one request's values, and counts them against the bounds. Everything is checked; only what
// policies mention is converted, since a conversion costs ten times the check.
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

// uid checks an entity's UID.
func (c *converter) uid(u policy.UID) *fault {
	if u.Type == "" {
		return &fault{why: "the entity has no type"}
	}
	if !c.model.knows(cedarUID(u)) {
		return &fault{why: "the schema has no entity type " + quote(u.Type)}
	}
	return c.count(len(u.Type) + len(u.ID))
}

// check checks an entity without converting it.
func (c *converter) check(e *policy.Entity) *fault {
	if f := c.uid(e.UID); f != nil {
		return f.under("uid")
	}
	var attrs *shape
	var kind resolved.Entity
	if c.model != nil {
		kind = c.model.schema.Entities[types.EntityType(e.UID.Type)]
		attrs = c.model.shapes[types.EntityType(e.UID.Type)]
	}
	if len(e.Parents) > maxParents {
		return &fault{at: "parents", why: fmt.Sprintf("there are more than %d", maxParents)}
	}
	for i, p := range e.Parents {
		f := c.uid(p)
		if f == nil && c.model != nil && !slices.Contains(kind.ParentTypes, types.EntityType(p.Type)) {
			f = &fault{why: "the schema has no " + quote(e.UID.Type) + " in a " + quote(p.Type)}
		}
		if f != nil {
			return f.under("parents[" + strconv.Itoa(i) + "]")
		}
	}
	if len(e.Tags) > 0 && c.model != nil && kind.Tags == nil {
		return &fault{at: "tags", why: "the schema has no tags on a " + quote(e.UID.Type)}
	}
	for k, v := range e.Tags {
		if f := c.count(len(k) + len(v)); f != nil {
			return f.under("tags")
		}
	}
	if _, f := c.record(e.Attrs, attrs, 0, nothing); f != nil {
		return f.under("attrs")
	}
	return nil
}

// filter says which keys of a record are converted.
type filter func(key string) bool

func everything(string) bool { return true }

func nothing(string) bool { return false }

// record checks a record of the given shape, nil for any, and converts the keys that keep keeps.
func (c *converter) record(r policy.Record, want *shape, depth int, keep filter) (types.Record, *fault) {
	if depth > maxValueDepth {
		return types.Record{}, &fault{why: fmt.Sprintf("records and sets are nested deeper than %d", maxValueDepth)}
	}
	if want != nil {
		for _, k := range want.required {
			if _, ok := r[string(k)]; !ok {
				return types.Record{}, &fault{at: string(k), why: "the schema requires it, and it is absent"}
			}
		}
	}
	var m types.RecordMap
	for k, v := range r {
		if f := c.count(len(k)); f != nil {
			return types.Record{}, f
		}
		var t resolved.IsType
		if want != nil {
			a, ok := want.attrs[types.String(k)]
			if !ok {
				return types.Record{}, &fault{at: k, why: "the schema does not have it here"}
			}
			t = a.Type
		}
		kept := keep(k)
		value, f := c.value(v, t, depth+1, kept)
		if f != nil {
			return types.Record{}, f.under(k)
		}
		if kept {
			if m == nil {
				m = make(types.RecordMap, 4)
			}
			m[types.String(k)] = value
		}
	}
	return types.NewRecord(m), nil
}

// value checks one value of the given type, nil for any, and converts it if keep says so; else it returns nil.
func (c *converter) value(v any, want resolved.IsType, depth int, keep bool) (out types.Value, f *fault) {
	switch v := v.(type) {
	case string:
		if f := c.count(len(v)); f != nil {
			return nil, f
		}
		if keep {
			out = types.String(v)
		}
		return out, mismatch(want, resolved.StringType{}, "a string")
	case bool:
		if keep {
			out = types.Boolean(v)
		}
		return out, mismatch(want, resolved.BoolType{}, "a bool")
	case int64:
		if keep {
			out = types.Long(v)
		}
		return out, mismatch(want, resolved.LongType{}, "a whole number")
	case time.Time:
		if keep {
			out = types.NewDatetime(v)
		}
		return out, mismatch(want, datetime, "a time")
	case netip.Addr:
		return c.value(netip.PrefixFrom(v, v.BitLen()), want, depth, keep)
	case netip.Prefix:
		ip, f := address(v)
		if f != nil {
			return nil, f
		}
		if keep {
			out = ip
		}
		return out, mismatch(want, ipaddr, "an address")
	case policy.UID:
		if f := c.uid(v); f != nil {
			return nil, f
		}
		if keep {
			out = cedarUID(v)
		}
		if t, ok := want.(resolved.EntityType); want != nil && (!ok || string(t) != v.Type) {
			return nil, unwanted(want, "an entity of type "+quote(v.Type))
		}
		return out, nil
	case policy.Record:
		var attrs *shape
		if want != nil {
			r, ok := want.(resolved.RecordType)
			if !ok {
				return nil, unwanted(want, "a record")
			}
			attrs = newShape(r)
		}
		if !keep {
			_, f := c.record(v, attrs, depth, nothing)
			return nil, f
		}
		return boxed(c.record(v, attrs, depth, everything))
	case []any:
		return c.set(v, want, depth, keep)
	default:
		return nil, &fault{why: fmt.Sprintf("a %T is no value of a policy", v)}
	}
}

func boxed(r types.Record, f *fault) (types.Value, *fault) { return r, f }

func (c *converter) set(items []any, want resolved.IsType, depth int, keep bool) (types.Value, *fault) {
	if depth > maxValueDepth {
		return nil, &fault{why: fmt.Sprintf("records and sets are nested deeper than %d", maxValueDepth)}
	}
	var element resolved.IsType
	if want != nil {
		s, ok := want.(resolved.SetType)
		if !ok {
			return nil, unwanted(want, "a set")
		}
		element = s.Element
	}
	var values []types.Value
	for i, item := range items {
		f := c.count(0)
		var v types.Value
		if f == nil {
			v, f = c.value(item, element, depth+1, keep)
		}
		if f != nil {
			return nil, f.under("[" + strconv.Itoa(i) + "]")
		}
		if keep {
			values = append(values, v)
		}
	}
	if !keep {
		return nil, nil
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

// The types of the schema that values of Go's are compared with, made once.
var (
	datetime resolved.IsType = resolved.ExtensionType("datetime")
	ipaddr   resolved.IsType = resolved.ExtensionType("ipaddr")
)

func mismatch(want, got resolved.IsType, is string) *fault {
	if want == nil || want == got {
		return nil
	}
	return unwanted(want, is)
}

func unwanted(want resolved.IsType, is string) *fault {
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
