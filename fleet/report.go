package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Report takes what an agent says of its machine, and answers every workload present with its identity or the refusal of
// one, in the order of r.Present. Facts that only the server may state are taken out and counted. A workload that cannot
// be accepted (a bad name, too many facts, another machine's) is refused by itself; the others go on.
//
// The caller has authenticated the machine. Errors: [ErrReport] of a report that is too large; [ErrMachineRevoked].
func (f *Fleet) Report(ctx context.Context, machine string, r Report) ([]Assigned, error) {
	if len(r.Present)+len(r.Gone) > 2*f.cfg.MaxWorkloads {
		f.meter.Count("fleet_reports_refused", 1, "code", ErrReport.Code)
		return nil, refuse(ErrReport, refusal.Exhausted, "report of machine "+machine,
			fmt.Sprintf("it names %d workloads, and %d is the limit", len(r.Present)+len(r.Gone), 2*f.cfg.MaxWorkloads), "report in parts")
	}
	var out []Assigned
	err := f.update(ctx, func(u *unit) error {
		if f.expelled(machine) { // since the door looked
			return machineRevoked(machine, "it was revoked")
		}
		out = make([]Assigned, 0, len(r.Present))
		named := make(map[string]bool, len(r.Present))
		for _, o := range r.Present {
			a, err := f.present(ctx, u, machine, o)
			if err != nil {
				return err
			}
			named[o.Instance] = true
			out = append(out, a)
		}
		gone := r.Gone
		if r.Full {
			known, err := f.presentOn(ctx, u.Tx, machine)
			if err != nil {
				return err
			}
			gone = nil
			for _, w := range known {
				if !named[w.Instance] {
					gone = append(gone, w.Instance)
				}
			}
		}
		for _, instance := range gone {
			w, err := u.Workloads.Workload(ctx, instance)
			if errors.Is(err, ErrNotFound) || err == nil && w.Machine != machine {
				continue // nothing of this machine's, so nothing to end
			}
			if err != nil {
				return err
			}
			if err := f.end(ctx, u, w); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	f.meter.Count("fleet_reports", 1)
	return out, nil
}

// present takes one workload. An error is a failure of the store; a refusal is in the answer.
func (f *Fleet) present(ctx context.Context, u *unit, machine string, o Observed) (Assigned, error) {
	refused := func(e *refusal.Error) Assigned {
		f.meter.Count("fleet_workloads_refused", 1, "code", e.Code)
		return Assigned{Instance: clip(o.Instance, maxInstance), Refusal: RefusalOf(e)}
	}
	if e := checkInstance(o.Instance); e != nil {
		return refused(e), nil
	}
	if e := checkListen(o.Instance, o.Listen); e != nil {
		return refused(e), nil
	}
	facts, e := f.workloadFacts(machine, o)
	if e != nil {
		return refused(e), nil
	}
	old, err := u.Workloads.Workload(ctx, o.Instance)
	switch {
	case errors.Is(err, ErrNotFound):
		if e, err := f.room(ctx, u, machine); err != nil || e != nil {
			if err != nil {
				return Assigned{}, err
			}
			return refused(e), nil
		}
		old = Workload{Instance: o.Instance, Machine: machine, Since: f.now()}
	case err != nil:
		return Assigned{}, err
	case old.Machine != machine:
		if rec, due := f.accuse(ctx, machine, o.Instance, old.Machine, "report"); due {
			if err := u.Audit.PutRecord(ctx, rec); err != nil {
				return Assigned{}, err
			}
		}
		return refused(foreign(o.Instance)), nil
	}
	w := old
	w.Listen, w.State, w.Seen = slices.Clone(o.Listen), WorkloadPresent, f.now()
	if old.State == WorkloadGone {
		w.Since = w.Seen
	}
	w = f.evaluate(old, w, facts)
	if e, err := f.fits(ctx, u, machine, old, w); err != nil || e != nil {
		if err != nil {
			return Assigned{}, err
		}
		return refused(e), nil
	}
	if err := f.settle(ctx, u, old, w); err != nil {
		return Assigned{}, err
	}
	return Assigned{Instance: w.Instance, ID: w.ID, Refusal: w.Refusal, Issuance: w.Issuance, Facts: w.Facts, Epoch: w.Epoch}, nil
}

// evaluate gives w its identity and facts: what the issuance rules say of facts, and what the server adds. Issuance rules
// do not see quarantine: an identity names, and does not change with risk.
func (f *Fleet) evaluate(old, w Workload, facts identity.FactSet) Workload {
	w.Service = facts.Text(identity.FactService)
	id, how, err := f.cfg.Rules.Issue(f.cfg.TrustDomain, facts)
	if err == nil {
		err = f.assignable(w.Instance, id)
	}
	w.ID, w.Issuance, w.Refusal = id, how, nil
	if err != nil {
		w.ID = identity.ID{}
		if w.Refusal = RefusalOf(err); w.Refusal == nil {
			f.log.Error("issuance rules failed", "instance", w.Instance, "error", err)
			w.Refusal = RefusalOf(refuse(ErrIssuance, refusal.Unavailable, "identity of workload "+w.Instance,
				"the issuance rules could not be evaluated", "look at the server's log"))
		}
	}
	if q, ok := f.quarantinedBy(w.ID, w.Instance); ok {
		facts = withServerFact(facts, identity.FactQuarantined, true, "quarantine "+q.ID)
	}
	// Epochs: every fact that changed carries the workload's new epoch, so that they rise whoever comes and goes.
	next := old.Epoch + 1
	stamped := make([]identity.Fact, 0, facts.Len())
	same := facts.Len() == old.Facts.Len() && w.ID == old.ID && sameRefusal(w.Refusal, old.Refusal) && old.Epoch > 0
	for _, fact := range facts.All() {
		was, ok := old.Facts.Get(fact.Name)
		if ok && sameFact(was, fact) {
			fact.Epoch = was.Epoch
		} else {
			fact.Epoch, same = next, false
		}
		stamped = append(stamped, fact)
	}
	w.Facts, _ = identity.NewFactSet(stamped...) // they were of a good shape before
	if w.Epoch = old.Epoch; !same {
		w.Epoch = next
	}
	return w
}

// assignable refuses what an issuance rule may not give, however it is written: IDs of machines and of Redoubt itself,
// and of other trust domains.
func (f *Fleet) assignable(instance string, id identity.ID) error {
	path := id.Path()
	switch {
	case id.TrustDomain() == f.cfg.TrustDomain && path != "" && path != serverPath &&
		!strings.HasPrefix(path+"/", machinePath) && !strings.HasPrefix(path+"/", redoubtPath):
		return nil
	default:
		return refuse(ErrReserved, refusal.Denied, "identity of workload "+instance,
			"the issuance rule gives "+id.String()+", which is kept for machines, for Redoubt itself, or for another trust domain",
			"correct the template of the rule: /service/<service> is the default")
	}
}

// settle stores w and pushes what others must learn of the difference to old.
func (f *Fleet) settle(ctx context.Context, u *unit, old, w Workload) error {
	rose := w.Epoch != old.Epoch || w.State != old.State
	ports := !slices.Equal(old.Listen, w.Listen)
	if rose || ports || w.Seen.Sub(old.Seen) >= touchWorkload {
		if err := u.Workloads.PutWorkload(ctx, w); err != nil {
			return err
		}
	}
	if rose {
		before, after := identityOf(old), identityOf(w)
		switch {
		case after != nil:
			if err := u.push(ctx, KindIdentity, w.Instance, after); err != nil {
				return err
			}
		case before != nil:
			if err := u.push(ctx, KindIdentity, w.Instance, nil); err != nil {
				return err
			}
		}
	}
	if !rose && !ports {
		return nil
	}
	before, after := endpointsOf(old), endpointsOf(w)
	for _, key := range slices.Sorted(maps.Keys(before)) {
		if _, ok := after[key]; !ok {
			if err := u.push(ctx, KindEndpoint, key, nil); err != nil {
				return err
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(after)) {
		e := after[key]
		if was, ok := before[key]; !ok || was != e {
			if err := u.push(ctx, KindEndpoint, key, e); err != nil {
				return err
			}
		}
	}
	return nil
}

// end marks a workload as gone.
func (f *Fleet) end(ctx context.Context, u *unit, old Workload) error {
	if old.State == WorkloadGone {
		return nil
	}
	w := old
	w.State, w.Seen = WorkloadGone, f.now()
	return f.settle(ctx, u, old, w)
}

func (f *Fleet) endWorkloads(ctx context.Context, u *unit, machine string) error {
	known, err := f.presentOn(ctx, u.Tx, machine)
	if err != nil {
		return err
	}
	for _, w := range known {
		if err := f.end(ctx, u, w); err != nil {
			return err
		}
	}
	return nil
}

// presentOn returns the workloads present on a machine; there are at most [Config.MaxWorkloads].
func (f *Fleet) presentOn(ctx context.Context, tx Tx, machine string) ([]Workload, error) {
	var out []Workload
	q := WorkloadQuery{Machine: machine, State: WorkloadPresent, Limit: MaxPage}
	for {
		page, err := tx.Workloads.Workloads(ctx, q)
		if err != nil {
			return nil, err
		}
		out = append(out, page...)
		if len(page) < q.Limit {
			return out, nil
		}
		q.After = page[len(page)-1].Instance
	}
}

// identityOf is what others learn of a workload: nothing, if it is gone or has no identity.
func identityOf(w Workload) *Identity {
	if w.State != WorkloadPresent || w.ID.IsZero() {
		return nil
	}
	return &Identity{Instance: w.Instance, ID: w.ID, Service: w.Service, Machine: w.Machine, Facts: w.Facts, Epoch: w.Epoch}
}

func endpointsOf(w Workload) map[string]Endpoint {
	if w.State != WorkloadPresent || w.ID.IsZero() {
		return nil
	}
	out := make(map[string]Endpoint, len(w.Listen))
	for _, l := range w.Listen {
		out[fmt.Sprintf("%s/%d", w.Instance, l.Port)] = Endpoint{
			Service: w.Service, ID: w.ID, Machine: w.Machine, Netns: l.Netns, Address: l.Address,
			Port: l.Port, Protocol: l.Protocol, Instance: w.Instance,
		}
	}
	return out
}

// workloadFacts returns the facts of an observed workload that an agent may state, and those that follow from who it is.
func (f *Fleet) workloadFacts(machine string, o Observed) (identity.FactSet, *refusal.Error) {
	kept := make([]identity.Fact, 0, o.Facts.Len())
	for _, fact := range o.Facts.All() {
		if !agentMayState(fact) {
			f.meter.Count("fleet_facts_dropped", 1)
			continue
		}
		fact.Evidence = clip(fact.Evidence, maxEvidence)
		kept = append(kept, fact)
	}
	facts, e := bounded("workload "+o.Instance, kept)
	if e != nil {
		return identity.FactSet{}, e
	}
	facts = withServerFact(facts, identity.FactMachine, machine, "certificate of the agent")
	return withServerFact(facts, identity.FactInstance, o.Instance, "report of the agent"), nil
}

func machineFacts(s identity.FactSet) (identity.FactSet, error) {
	kept := make([]identity.Fact, 0, s.Len())
	for _, fact := range s.All() {
		if agentMayState(fact) {
			fact.Evidence = clip(fact.Evidence, maxEvidence)
			kept = append(kept, fact)
		}
	}
	facts, e := bounded("machine", kept)
	if e != nil {
		return identity.FactSet{}, e
	}
	return facts, nil
}

const maxEvidence = 256

// agentMayState reports whether a fact may come from an agent: by its source, and by its name, since a name that the
// server owns must not be stated by anybody else under another source.
func agentMayState(fact identity.Fact) bool {
	switch fact.Source {
	case identity.FromKernel, identity.FromContainer, identity.FromOperator:
	default:
		return false
	}
	return fact.Name != identity.FactMachine && fact.Name != identity.FactInstance && !strings.HasPrefix(fact.Name, "risk.")
}

func bounded(what string, facts []identity.Fact) (identity.FactSet, *refusal.Error) {
	tooMany := func(why string) *refusal.Error {
		return refuse(ErrWorkloadFacts, refusal.Exhausted, what, why, "give it fewer or shorter labels")
	}
	if len(facts) > MaxFacts {
		return identity.FactSet{}, tooMany(fmt.Sprintf("it has %d facts, and %d is the limit", len(facts), MaxFacts))
	}
	s, err := identity.NewFactSet(facts...)
	if err != nil {
		return identity.FactSet{}, tooMany("a fact is of a wrong shape")
	}
	raw, err := json.Marshal(s)
	if err != nil || len(raw) > MaxFactBytes {
		return identity.FactSet{}, tooMany(fmt.Sprintf("its facts are longer than %d bytes", MaxFactBytes))
	}
	return s, nil
}

func withServerFact(s identity.FactSet, name string, value any, evidence string) identity.FactSet {
	out, err := s.With(identity.Fact{Name: name, Value: value, Source: identity.FromServer, Evidence: evidence})
	if err != nil {
		return s // the server's own values are of a good shape
	}
	return out
}

func sameFact(a, b identity.Fact) bool {
	if a.Source != b.Source || !a.Expires.Equal(b.Expires) {
		return false
	}
	x, _ := a.Value.([]string)
	y, _ := b.Value.([]string)
	if x != nil || y != nil {
		return slices.Equal(x, y)
	}
	return a.Value == b.Value
}

func sameRefusal(a, b *Refusal) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

const maxInstance = 64

func checkInstance(instance string) *refusal.Error {
	ok := strings.HasPrefix(instance, "w-") && len(instance) > 2 && len(instance) <= maxInstance
	for i := 0; ok && i < len(instance); i++ {
		c := instance[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if ok {
		return nil
	}
	return refuse(ErrReport, refusal.Invalid, "workload", "its instance is not w- and lower-case letters, digits or hyphens, 64 at most",
		"update the agent: it makes these names")
}

func checkListen(instance string, listen []Listen) *refusal.Error {
	bad := func(why string) *refusal.Error {
		return refuse(ErrReport, refusal.Invalid, "workload "+instance, why, "declare ports as 8080/http")
	}
	if len(listen) > MaxListen {
		return bad(fmt.Sprintf("it declares %d ports, and %d is the limit", len(listen), MaxListen))
	}
	seen := map[uint16]bool{}
	for _, l := range listen {
		if l.Port == 0 || seen[l.Port] {
			return bad("a declared port is 0 or declared twice")
		}
		seen[l.Port] = true
		if len(l.Protocol) == 0 || len(l.Protocol) > 16 || strings.ContainsFunc(l.Protocol, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
		}) {
			return bad("the protocol of a declared port is not a word of lower-case letters and digits")
		}
		if l.Address != "" {
			if _, err := netip.ParseAddr(l.Address); err != nil {
				return bad("the address of a declared port is no IP address")
			}
		}
		if len(l.Netns) > 20 || strings.ContainsFunc(l.Netns, func(r rune) bool { return r < '0' || r > '9' }) {
			return bad("the network namespace of a declared port is not an inode number")
		}
	}
	return nil
}
