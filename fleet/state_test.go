package fleet_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

func mustID(s string) identity.ID {
	id, err := identity.ParseID(s)
	if err != nil {
		panic(err)
	}
	return id
}

var orders = mustID("spiffe://example.org/service/orders")

func TestRevocations(t *testing.T) {
	w := newWorld(t, nil)
	k, _ := w.join("m1")
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})
	stolen := newKey(t)
	revoke := func(r fleet.Revocation) fleet.Revocation {
		t.Helper()
		r.Reason = "test"
		r, err := w.fleet.Revoke(t.Context(), r, rec())
		if err != nil {
			t.Fatal(err)
		}
		if w.live()["revocation/"+r.ID] == "" {
			t.Error("the revocation was not pushed")
		}
		return r
	}
	sign := func(k key) error {
		_, err := w.fleet.SignX509(t.Context(), "m1", "w-1", k.csr)
		return err
	}
	key := revoke(fleet.Revocation{SPKI: stolen.spki})
	want(t, sign(stolen), fleet.ErrKeyRevoked)
	if err := sign(newKey(t)); err != nil {
		t.Error(err)
	}
	id := revoke(fleet.Revocation{Identity: orders, Expires: w.clock.now().Add(time.Minute)})
	want(t, sign(newKey(t)), fleet.ErrIdentityRevoked)
	_, err := w.fleet.SignJWT(t.Context(), "m1", "w-1", []string{"db"})
	want(t, err, fleet.ErrIdentityRevoked)
	w.open() // after a restart as before
	want(t, sign(newKey(t)), fleet.ErrIdentityRevoked)
	w.clock.add(time.Minute)
	if err := sign(newKey(t)); err != nil {
		t.Errorf("after its end: %v", err)
	}
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.live()["revocation/"+id.ID] != "" {
		t.Error("the end of the revocation was not pushed")
	}
	if err := w.fleet.Lift(t.Context(), key.ID, rec()); err != nil {
		t.Fatal(err)
	}
	if err := sign(stolen); err != nil {
		t.Errorf("after it was lifted: %v", err)
	}
	want(t, w.fleet.Lift(t.Context(), key.ID, rec()), fleet.ErrUnknown)

	m := revoke(fleet.Revocation{Machine: "m1"})
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrMachineRevoked)
	want(t, w.fleet.Trusted("m1", k.spki), fleet.ErrMachineRevoked)
	if live := w.live(); live["identity/w-1"] != "" {
		t.Error("the workloads of a revoked machine must be gone")
	}
	// A replacing token does not lift it.
	secret := w.token(fleet.TokenRequest{Machine: "m1", Replace: true})
	_, err = w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: secret.Reveal(), Machine: "m1", CSR: newKey(t).csr})
	want(t, err, fleet.ErrMachineRevoked)
	w.open()
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrMachineRevoked)
	if err := w.fleet.Lift(t.Context(), m.ID, rec()); err != nil {
		t.Fatal(err)
	}
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Errorf("after it was lifted: %v", err)
	}
	own := revoke(fleet.Revocation{SPKI: k.spki})
	want(t, w.fleet.Authenticate(t.Context(), "m1", k.spki), fleet.ErrKeyRevoked)
	_ = own

	for _, bad := range []fleet.Revocation{
		{Reason: "x"},
		{Machine: "m1"},
		{Machine: "m1", SPKI: stolen.spki, Reason: "x"},
		{SPKI: "zz", Reason: "x"},
		{Identity: mustID("spiffe://other.org/a"), Reason: "x"},
		{Machine: "m1", Reason: "x", Expires: w.clock.now()},
		{Machine: "m1", Reason: strings.Repeat("x", fleet.MaxReasonBytes+1)},
	} {
		_, err := w.fleet.Revoke(t.Context(), bad, rec())
		want(t, err, fleet.ErrWithdrawal)
	}
	_, err = w.fleet.RevokeMachine(t.Context(), "m9", "x", rec())
	want(t, err, fleet.ErrUnknown)
}

func TestQuarantineIsAFactOfTheServer(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	observed := fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders"), w.observed("w-2", "orders"), w.observed("w-3", "cart")}}
	w.report("m1", observed)
	held := func(instance string) bool {
		t.Helper()
		got, err := w.fleet.Workload(t.Context(), instance)
		if err != nil {
			t.Fatal(err)
		}
		f, ok := got.Facts.Get(identity.FactQuarantined)
		if ok && (f.Source != identity.FromServer || f.Value != true || f.Epoch != got.Epoch) {
			t.Errorf("fact %+v of epoch %d", f, got.Epoch)
		}
		if pushed := strings.Contains(w.live()["identity/"+instance], identity.FactQuarantined); pushed != ok {
			t.Errorf("%s: stored %v, pushed %v", instance, ok, pushed)
		}
		return ok
	}
	hold := func(q fleet.Quarantine) fleet.Quarantine {
		t.Helper()
		q.Reason = "odd"
		q, err := w.fleet.Quarantine(t.Context(), q, rec())
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	one := hold(fleet.Quarantine{Instance: "w-3"})
	all := hold(fleet.Quarantine{Identity: orders, Expires: w.clock.now().Add(time.Minute)})
	if !held("w-1") || !held("w-2") || !held("w-3") {
		t.Error("not held")
	}
	// The agent cannot lift it by reporting, nor can a new instance of that identity escape it, nor a restart.
	w.report("m1", observed)
	w.open()
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-4", "orders"), w.observed("w-1", "orders", fact(identity.FactQuarantined, false, identity.FromServer))}})
	if !held("w-1") || !held("w-4") || !held("w-3") {
		t.Error("escaped")
	}
	if err := w.fleet.Release(t.Context(), one.ID, rec()); err != nil {
		t.Fatal(err)
	}
	if held("w-3") || !held("w-1") {
		t.Error("the wrong one was released")
	}
	w.clock.add(time.Minute)
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if held("w-1") || held("w-2") || held("w-4") {
		t.Error("held beyond the end")
	}
	want(t, w.fleet.Release(t.Context(), all.ID, rec()), fleet.ErrUnknown)
	_, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Instance: "w-9", Reason: "x"}, rec())
	want(t, err, fleet.ErrUnknown)
	_, err = w.fleet.Quarantine(t.Context(), fleet.Quarantine{Reason: "x"}, rec())
	want(t, err, fleet.ErrWithdrawal)
}

func TestWithdrawalBounds(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.MaxWithdrawn = 2 })
	for range 2 {
		if _, err := w.fleet.Revoke(t.Context(), fleet.Revocation{Identity: orders, Reason: "x"}, rec()); err != nil {
			t.Fatal(err)
		}
		if _, err := w.fleet.Quarantine(t.Context(), fleet.Quarantine{Identity: orders, Reason: "x"}, rec()); err != nil {
			t.Fatal(err)
		}
	}
	_, err := w.fleet.Revoke(t.Context(), fleet.Revocation{Identity: orders, Reason: "x"}, rec())
	want(t, err, fleet.ErrWithdrawals)
	_, err = w.fleet.Quarantine(t.Context(), fleet.Quarantine{Identity: orders, Reason: "x"}, rec())
	want(t, err, fleet.ErrWithdrawals)
	if w.meter.get("fleet_withdrawals_refused") != 2 {
		t.Error("not counted")
	}
}

// follower applies changes as an agent does.
type follower struct {
	at    uint64
	state map[string]string
	snaps int
}

func (f *follower) follow(t *testing.T, w *world) {
	t.Helper()
	for {
		list, err := w.fleet.Changes(t.Context(), f.at, 7)
		if errors.Is(err, fleet.ErrCompacted) {
			s, err := w.fleet.Snapshot(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f.snaps++
			f.at, f.state = s.Revision, map[string]string{}
			for _, c := range s.Changes {
				f.state[string(c.Kind)+"/"+c.Key] = string(c.Payload)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			return
		}
		for _, c := range list {
			if c.Revision <= f.at {
				t.Fatalf("revision %d after %d", c.Revision, f.at)
			}
			f.at = c.Revision
			if c.Deleted {
				delete(f.state, string(c.Kind)+"/"+c.Key)
			} else {
				f.state[string(c.Kind)+"/"+c.Key] = string(c.Payload)
			}
		}
	}
}

func TestFollowersAgreeHoweverFarBehindTheyAre(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.KeepChanges = 50 })
	w.join("m1")
	close, far := &follower{state: map[string]string{}}, &follower{state: map[string]string{}}
	for i := range 200 {
		instance := fmt.Sprintf("w-%d", i%20)
		r := fleet.Report{Present: []fleet.Observed{w.observed(instance, "orders", fact("unix.uid", int64(i), identity.FromKernel))}}
		if i%7 == 0 {
			r = fleet.Report{Gone: []string{instance}}
		}
		w.report("m1", r)
		if i%10 == 0 {
			close.follow(t, w)
		}
		if i%50 == 0 {
			if err := w.fleet.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if i == 120 {
			w.open() // a restart in between: the tail in memory is gone
		}
	}
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	close.follow(t, w)
	far.follow(t, w)
	if close.snaps != 0 || far.snaps != 1 {
		t.Errorf("snapshots: %d of the close one, %d of the far one", close.snaps, far.snaps)
	}
	live := w.live()
	if fmt.Sprint(close.state) != fmt.Sprint(live) || fmt.Sprint(far.state) != fmt.Sprint(live) {
		t.Errorf("they disagree:\n%v\n%v\n%v", close.state, far.state, live)
	}
	if w.meter.get("fleet_pruned kind change") == 0 {
		t.Error("nothing was compacted")
	}
	// One that is ahead has seen another history.
	if _, err := w.fleet.Changes(t.Context(), w.fleet.Revision()+1, 1); !errors.Is(err, fleet.ErrCompacted) {
		t.Errorf("a revision that was not reached: %v", err)
	}
}

func TestTheTailInMemoryIsBounded(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	for i := range 50 { // 50 × 100 changes, more than the tail holds
		var r fleet.Report
		for j := range 100 {
			r.Present = append(r.Present, w.observed(fmt.Sprintf("w-%d", j), "orders", fact("unix.uid", int64(i), identity.FromKernel)))
		}
		w.report("m1", r)
	}
	f := &follower{state: map[string]string{}}
	f.follow(t, w) // begins in the store, ends in the tail
	if f.at != 5000 || len(f.state) != 100 || f.snaps != 0 {
		t.Errorf("at %d with %d, %d snapshots", f.at, len(f.state), f.snaps)
	}
}

func numbered(from, to uint64) (out []fleet.Numbered) {
	for i := from; i <= to; i++ {
		e := event.New(event.Control, "test")
		e.Message = fmt.Sprint(i)
		out = append(out, fleet.Numbered{Seq: i, Event: e})
	}
	return out
}

func TestEventsAreStoredOnce(t *testing.T) {
	w := newWorld(t, func(c *fleet.Config) { c.KeepEvents = 20 })
	ingest := func(machine, stream string, batch []fleet.Numbered, last uint64) {
		t.Helper()
		got, err := w.fleet.Ingest(t.Context(), machine, stream, batch)
		if err != nil || got != last {
			t.Errorf("Ingest = %d, %v, want %d", got, err, last)
		}
	}
	messages := func(machine string) string {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Machine: machine})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range list {
			if e.Event.Machine != machine {
				t.Errorf("event of %s says %q", machine, e.Event.Machine)
			}
			out = append(out, e.Event.Message)
		}
		return strings.Join(out, " ")
	}
	lying := numbered(1, 3)
	lying[0].Event.Machine = "m2"
	ingest("m1", "", lying, 3)
	ingest("m1", "", numbered(1, 3), 3) // the acknowledgement was lost
	ingest("m1", "", numbered(2, 5), 5)
	ingest("m2", "", numbered(1, 2), 2) // another machine's numbers are its own
	if got := messages("m1"); got != "1 2 3 4 5" {
		t.Errorf("stored %q", got)
	}
	ingest("m1", "", nil, 5)
	ingest("m1", "new queue", numbered(1, 1), 1)
	if got := messages("m1"); got != "1 2 3 4 5 1" {
		t.Errorf("stored %q", got)
	}
	ingest("m1", "new queue", numbered(5, 5), 5)
	if w.meter.get("fleet_events_doubled") != 5 || w.meter.get("fleet_event_gaps") != 1 {
		t.Errorf("counted %v", w.meter.n)
	}
	for _, bad := range [][]fleet.Numbered{numbered(0, 1), {numbered(7, 7)[0], numbered(7, 7)[0]}, numbered(1, fleet.MaxEventBatch+1)} {
		_, err := w.fleet.Ingest(t.Context(), "m1", "new queue", bad)
		want(t, err, fleet.ErrEvents)
	}
	_, err := w.fleet.Ingest(t.Context(), "m1", strings.Repeat("s", 65), nil)
	want(t, err, fleet.ErrEvents)
	ingest("m1", "new queue", numbered(6, 100), 100)
	if list, err := w.fleet.Events(t.Context(), fleet.EventQuery{}); err != nil || len(list) != 20 || list[19].Event.Message != "100" {
		t.Errorf("%d events are kept, %v", len(list), err)
	}
	if w.meter.get("fleet_events_trimmed") == 0 {
		t.Error("what was dropped was not counted")
	}
}

func TestAnEventThatIsTooLargeIsCutDown(t *testing.T) {
	w := newWorld(t, nil)
	large := json.RawMessage(`"` + strings.Repeat("x", event.MaxBytes) + `"`)
	batch := numbered(1, 3)
	batch[0].Event.Detail = large
	batch[1].Event.Attrs = map[string]any{"a": large}
	batch[1].Event.Kind = strings.Repeat("k", event.MaxBytes)
	batch[2].Event.Detail = json.RawMessage(`{"broken`)
	if _, err := w.fleet.Ingest(t.Context(), "m1", "", batch); err != nil {
		t.Fatal(err)
	}
	list, err := w.fleet.Events(t.Context(), fleet.EventQuery{})
	if err != nil || len(list) != 3 {
		t.Fatalf("%d, %v", len(list), err)
	}
	for _, e := range list {
		raw, err := json.Marshal(e.Event)
		if err != nil || len(raw) > event.MaxBytes || e.Event.Detail != nil {
			t.Errorf("%d bytes, %v", len(raw), err)
		}
	}
	if list[0].Event.Attrs["oversize.bytes"] == nil || list[1].Event.Attrs["oversize.bytes"] == nil || w.meter.get("fleet_events_oversize") != 2 {
		t.Error("the cut is not said")
	}
}

func TestDecisionsAreFoundByID(t *testing.T) {
	w := newWorld(t, nil)
	d := &policy.Decision{
		ID: policy.NewID(), Time: time.Now().UTC(), Verdict: policy.Deny, Mode: policy.Enforce, Machine: "m1",
		Request:     policy.Request{Action: policy.Action(policy.Net, "connect"), Point: "mesh"},
		Explanation: policy.Explanation{Reason: policy.ReasonDefault, Summary: "nothing permits it"},
	}
	if _, err := w.fleet.Ingest(t.Context(), "m1", "", []fleet.Numbered{{Seq: 1, Event: event.OfDecision(d)}}); err != nil {
		t.Fatal(err)
	}
	cut := event.OfDecision(d)
	cut.Detail = nil
	if err := w.fleet.Record(t.Context(), cut); err != nil {
		t.Fatal(err)
	}
	told, err := w.fleet.Decision(t.Context(), d.ID)
	if err != nil || len(told) != 2 || told[0].Event.Machine != "m1" || told[0].Decision.Explanation.Reason != policy.ReasonDefault || told[0].Decision.Request.Point != "mesh" {
		t.Fatalf("told %+v, %v", told, err)
	}
	if told[1].Event.Machine != fleet.ServerMachine || told[1].Decision.Explanation.Summary != "nothing permits it" {
		t.Errorf("without its detail: %+v", told[1])
	}
	for _, id := range []policy.ID{"", "d-none"} {
		_, err := w.fleet.Decision(t.Context(), id)
		want(t, err, fleet.ErrDecision)
	}
}

func TestMachinesAreLostAndComeBack(t *testing.T) {
	w := newWorld(t, nil)
	k, _ := w.join("m1")
	sweep := func() fleet.Machine {
		t.Helper()
		if err := w.fleet.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		m, err := w.fleet.Machine(t.Context(), "m1")
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if sweep().Lost {
		t.Error("lost at once")
	}
	w.clock.add(fleet.DefaultLostAfter + time.Second)
	if !sweep().Lost {
		t.Error("not lost")
	}
	if err := w.fleet.Authenticate(t.Context(), "m1", k.spki); err != nil {
		t.Fatal(err)
	}
	if m := sweep(); m.Lost || !m.LastSeen.Equal(w.clock.now().UTC()) {
		t.Errorf("not back: %+v", m)
	}
	w.open() // it was stored
	if m, err := w.fleet.Machine(t.Context(), "m1"); err != nil || !m.LastSeen.Equal(w.clock.now().UTC()) {
		t.Errorf("%+v, %v", m, err)
	}
	if w.meter.get("fleet_machines_noticed kind machine.lost") != 1 || w.meter.get("fleet_machines_noticed kind machine.back") != 1 {
		t.Error("not counted")
	}
}

func TestAPolicySetTooLargeIsNotPushedAndSaidSo(t *testing.T) {
	w := newWorld(t, nil)
	w.cfg.Rules = &sized{rules: w.rules, content: strings.Repeat("x", fleet.MaxPayloadBytes)}
	w.open()
	w.run()
	eventually(t, "it is told", func() bool {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Kind: "policy_set.not_pushed"})
		return err == nil && len(list) == 1
	})
	if w.live()["policy_set/current"] != "" || w.meter.get("fleet_publish_refused kind policy_set") != 1 {
		t.Error("pushed, or not counted")
	}
	if p := w.fleet.PublishProblem(); !strings.Contains(p, "policy_set") {
		t.Errorf("problem %q", p)
	}
	w.cfg.Rules.(*sized).set("x", "")
	eventually(t, "it is pushed", func() bool { return w.live()["policy_set/current"] != "" })
	if p := w.fleet.PublishProblem(); p != "" {
		t.Errorf("problem %q", p)
	}
}

const maxSetBytes = 8 << 20 // policy/set.MaxBytes

func TestTheLargestPolicySetIsPushedWhateverItIsWrittenIn(t *testing.T) {
	for _, character := range []string{"<", "&", `"`, "\n"} {
		w := newWorld(t, nil)
		w.cfg.Rules = &sized{rules: w.rules, content: strings.Repeat(character, maxSetBytes)}
		w.open()
		w.run()
		eventually(t, "it is pushed", func() bool { return w.live()["policy_set/current"] != "" })
		var got fleet.PolicySet
		if err := json.Unmarshal([]byte(w.live()["policy_set/current"]), &got); err != nil || len(got.Files[0].Content) != maxSetBytes {
			t.Errorf("%q: %v", character, err)
		}
	}
}

// sized rules have one file of this content.
type sized struct {
	*rules
	content string // guarded by rules.mu
}

func (s *sized) PolicySet() fleet.PolicySet {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fleet.PolicySet{Files: []fleet.PolicyFile{{Name: "a", Content: s.content}}}
}

func (s *sized) set(content, path string) {
	s.mu.Lock()
	s.content = content
	s.mu.Unlock()
	s.rules.set(path)
}

func TestGoneWorkloadsAreForgotten(t *testing.T) {
	w := newWorld(t, nil)
	w.join("m1")
	w.report("m1", fleet.Report{Present: []fleet.Observed{w.observed("w-1", "orders")}})
	w.report("m1", fleet.Report{Full: true})
	w.clock.add(fleet.DefaultKeepGone + time.Second)
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := w.fleet.Workload(t.Context(), "w-1")
	want(t, err, fleet.ErrUnknown)
}
