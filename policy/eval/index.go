package eval

import (
	"slices"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// index finds the policies whose scope can match a request. Each of the three parts of a scope (principal, action,
// resource) is a constraint; the constraints of all policies are numbered, a policy lies in the bucket of its three
// numbers, and a request looks into the buckets of the constraints it meets. `in [..]` of an action is several
// constraints, any of which will do; `is T in E` is filed under `in E`, and the evaluator checks the type.
//
// What the index returns is a superset of what matches, and the evaluator, which reads the scope again, has the last
// word: the index can be slow, but not permit.
//
// Concurrency: immutable.
type index struct {
	parts   [3]constraints
	buckets map[bucket][]int32
	pairs   [3]map[bucket][]int32 // permits only, with one part left open: what nearly matched, for explanations
	size    int
}

// The parts of a scope.
const (
	ofPrincipal = iota
	ofAction
	ofResource
)

// partNames are the parts in words.
var partNames = [3]string{"principal", "action", "resource"}

// bucket is the numbers of one constraint for each part.
type bucket [3]int32

// any and open are numbers of no numbered constraint: the part is not constrained; the part is left open (in pairs).
const (
	unconstrained int32 = 0
	open          int32 = -1
)

// constraints numbers what policies say of one part of their scope.
type constraints struct {
	count int32
	eq    map[types.EntityUID]int32
	in    map[types.EntityUID]int32
	is    map[types.EntityType]int32
}

func newIndex(policies []compiled) index {
	x := index{buckets: map[bucket][]int32{}, size: len(policies)}
	for part := range x.parts {
		x.parts[part] = constraints{
			eq: map[types.EntityUID]int32{}, in: map[types.EntityUID]int32{}, is: map[types.EntityType]int32{},
		}
		x.pairs[part] = map[bucket][]int32{}
	}
	for i := range policies {
		p := policies[i].ast
		principals := x.parts[ofPrincipal].file(p.Principal)
		actions := x.parts[ofAction].file(p.Action)
		resources := x.parts[ofResource].file(p.Resource)
		for _, a := range actions {
			b := bucket{principals[0], a, resources[0]}
			x.buckets[b] = append(x.buckets[b], int32(i))
			if p.Effect == ast.EffectForbid {
				continue
			}
			for part := range x.pairs {
				b := b
				b[part] = open
				if l := x.pairs[part][b]; len(l) == 0 || l[len(l)-1] != int32(i) {
					x.pairs[part][b] = append(l, int32(i))
				}
			}
		}
	}
	return x
}

// file returns the numbers of a scope's constraint, numbering it if it is new. Only an action `in [..]` has more than
// one, and `in []`, which nothing meets, has none.
func (c *constraints) file(scope ast.IsScopeNode) []int32 {
	switch s := scope.(type) {
	case ast.ScopeTypeEq:
		return []int32{number(c, c.eq, s.Entity)}
	case ast.ScopeTypeIn:
		return []int32{number(c, c.in, s.Entity)}
	case ast.ScopeTypeIsIn:
		return []int32{number(c, c.in, s.Entity)}
	case ast.ScopeTypeIs:
		return []int32{number(c, c.is, s.Type)}
	case ast.ScopeTypeInSet:
		ns := make([]int32, 0, len(s.Entities))
		for _, e := range s.Entities {
			if n := number(c, c.in, e); !slices.Contains(ns, n) {
				ns = append(ns, n)
			}
		}
		return ns
	default: // ast.ScopeTypeAll
		return []int32{unconstrained}
	}
}

func number[K comparable](c *constraints, m map[K]int32, k K) int32 {
	n, ok := m[k]
	if !ok {
		c.count++
		n = c.count
		m[k] = n
	}
	return n
}

// met appends the numbers of the constraints that uid meets; family is uid itself and everything it is in.
func (c *constraints) met(into []int32, uid types.EntityUID, family []types.EntityUID) []int32 {
	into = append(into, unconstrained)
	if n, ok := c.eq[uid]; ok {
		into = append(into, n)
	}
	if n, ok := c.is[uid.Type]; ok {
		into = append(into, n)
	}
	if len(c.in) == 0 {
		return into
	}
	for _, f := range family {
		if n, ok := c.in[f]; ok {
			into = append(into, n)
		}
	}
	return into
}

// lineage knows the direct parents of entities.
type lineage interface {
	// parents appends the parents of uid; of an entity that is not known, none.
	parents(into []types.EntityUID, uid types.EntityUID) []types.EntityUID
}

// scratch is what one decision works with; decisions reuse it through a pool.
type scratch struct {
	family, parents []types.EntityUID
	met             [3][]int32
	matches         []int32
}

// candidates fills s.matches with the policies whose scope can match, in order, once each.
func (x *index) candidates(s *scratch, principal, action, resource types.EntityUID, kin lineage) {
	for part, uid := range [3]types.EntityUID{principal, action, resource} {
		s.family = s.family[:0]
		if len(x.parts[part].in) > 0 {
			s.family = s.ancestry(uid, kin)
		}
		s.met[part] = x.parts[part].met(s.met[part][:0], uid, s.family)
	}
	s.matches = s.matches[:0]
	if len(s.met[0])*len(s.met[1])*len(s.met[2]) > max(x.size, minBuckets) { // more buckets than policies: ask them all
		for i := range x.size {
			s.matches = append(s.matches, int32(i))
		}
		return
	}
	for _, p := range s.met[ofPrincipal] {
		for _, a := range s.met[ofAction] {
			for _, r := range s.met[ofResource] {
				s.matches = append(s.matches, x.buckets[bucket{p, a, r}]...)
			}
		}
	}
	slices.Sort(s.matches)
	s.matches = slices.Compact(s.matches) // an action may meet several members of one `in [..]`
}

// minBuckets is how many buckets are looked into however few policies there are.
const minBuckets = 64

// ancestry returns uid and all its ancestors: what uid is `in`, as Cedar has it. A parent that is not known itself is
// still a parent. The result is good until the next call.
func (s *scratch) ancestry(uid types.EntityUID, kin lineage) []types.EntityUID {
	const few = 32 // up to here a list is quicker to search than a map
	found := append(s.family[:0], uid)
	var seen map[types.EntityUID]struct{}
	for i := 0; i < len(found); i++ {
		s.parents = kin.parents(s.parents[:0], found[i])
		for _, p := range s.parents {
			if seen == nil && len(found) > few {
				seen = make(map[types.EntityUID]struct{}, 2*len(found))
				for _, u := range found {
					seen[u] = struct{}{}
				}
			}
			if seen == nil {
				if !slices.Contains(found, p) {
					found = append(found, p)
				}
			} else if _, dup := seen[p]; !dup {
				seen[p] = struct{}{}
				found = append(found, p)
			}
		}
	}
	s.family = found
	return found
}
