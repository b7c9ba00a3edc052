package set

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/redoubtsec/redoubt/policy"
)

// declare returns the request with what the set declares about the entities in it: of a Service its groups, owner and
// protocols, of an address or host name the Address documents it lies in. What the point said is never replaced.
func (s *Set) declare(req *policy.Request) *policy.Request {
	r := *req
	if len(s.declared) == 0 {
		return &r
	}
	r.Principal, r.Resource = s.located(r.Principal), s.located(r.Resource)
	known := map[policy.UID]bool{r.Principal.UID: true, r.Resource.UID: true}
	others := slices.Clone(r.Others)
	for i, o := range others {
		others[i] = s.described(o)
		known[o.UID] = true
	}
	r.Principal, r.Resource = s.described(r.Principal), s.described(r.Resource)
	for _, e := range []policy.Entity{r.Principal, r.Resource} {
		for _, uid := range e.Parents {
			if d, ok := s.declared[uid]; ok && !known[uid] {
				others = append(others, d)
				known[uid] = true
			}
		}
	}
	r.Others = others
	return &r
}

// described adds to an entity what a document of its name declares.
func (s *Set) described(e policy.Entity) policy.Entity {
	d, ok := s.declared[e.UID]
	if !ok {
		return e
	}
	e.Parents = union(e.Parents, d.Parents)
	if len(d.Attrs) > 0 {
		attrs := maps.Clone(d.Attrs)
		maps.Copy(attrs, e.Attrs)
		e.Attrs = attrs
	}
	return e
}

// located adds to a literal address or host name the Address documents it lies in.
func (s *Set) located(e policy.Entity) policy.Entity {
	if e.UID.Type != "Address" || len(s.docs.addresses) == 0 || s.declared[e.UID].UID == e.UID {
		return e
	}
	ip, known := e.Attrs["ip"].(netip.Addr)
	if !known {
		ip, _ = netip.ParseAddr(e.UID.ID)
	}
	host, _ := e.Attrs["name"].(string)
	if host == "" && !ip.IsValid() {
		host = e.UID.ID
	}
	ip, host = ip.Unmap().WithZone(""), strings.ToLower(strings.TrimSuffix(host, "."))
	var parents []policy.UID
	for i := range s.docs.addresses {
		if a := &s.docs.addresses[i]; a.contains(ip, host) {
			parents = append(parents, policy.UID{Type: "Address", ID: a.Name})
		}
	}
	e.Parents = union(e.Parents, parents)
	attrs := policy.Record{}
	if ip.IsValid() {
		attrs["ip"], attrs["external"] = ip, len(parents) == 0
	}
	maps.Copy(attrs, e.Attrs)
	e.Attrs = attrs
	return e
}

func union(a, b []policy.UID) []policy.UID {
	out := slices.Clip(a)
	for _, uid := range b {
		if !slices.Contains(out, uid) {
			out = append(out, uid)
		}
	}
	return out
}

// entities prepares the entities that Service and Address documents declare.
func (d *documents) entities() map[policy.UID]policy.Entity {
	out := map[policy.UID]policy.Entity{}
	for _, v := range d.services {
		e := policy.Entity{UID: policy.UID{Type: "Service", ID: v.Name}, Parents: groups(v.Groups), Attrs: policy.Record{}}
		if v.Owner != "" {
			e.Attrs["owner"] = v.Owner
		}
		var protocols []any
		for _, end := range v.Endpoints {
			if !slices.Contains(protocols, any(end.Protocol)) {
				protocols = append(protocols, end.Protocol)
			}
		}
		if len(protocols) > 0 {
			e.Attrs["protocols"] = protocols
		}
		out[e.UID] = e
	}
	for _, a := range d.addresses {
		e := policy.Entity{UID: policy.UID{Type: "Address", ID: a.Name}, Parents: groups(a.Groups)}
		out[e.UID] = e
	}
	return out
}

func groups(names []string) []policy.UID {
	var out []policy.UID
	for _, n := range names {
		out = append(out, policy.UID{Type: "Group", ID: n})
	}
	return out
}
