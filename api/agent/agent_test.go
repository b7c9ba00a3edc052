package agent_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestJoinReportAndSign(t *testing.T) {
	w := newWorld(t, nil)
	dir := t.TempDir()
	c := w.client(dir, nil)
	if _, _, err := c.Identity(); err == nil {
		t.Error("joined before it joined")
	}
	facts := observed("", "x").Facts
	if err := c.Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1", Facts: facts}); err != nil {
		t.Fatal(err)
	}
	if m, err := w.fleet.Machine(t.Context(), "m1"); err != nil || m.Version != "v0" || m.Facts.Len() != 1 {
		t.Errorf("machine %+v, %v", m, err)
	}
	info, err := os.Stat(filepath.Join(dir, "agent.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("credentials: %v, %v", info, err)
	}
	c = w.client(dir, nil) // a restart of the agent
	if machine, id, err := c.Identity(); err != nil || machine != "m1" || id.String() != "spiffe://example.org/machine/m1" {
		t.Errorf("%s, %s, %v", machine, id, err)
	}
	// Joined already: the token is not spent.
	if err := c.Join(t.Context(), agent.Joining{Token: "whatever", Machine: "m1"}); err != nil {
		t.Error(err)
	}
	want(t, c.Join(t.Context(), agent.Joining{Token: "whatever", Machine: "m2"}), agent.ErrAlreadyJoined)

	r := &receiver{}
	s, _ := w.session(c, agent.SessionConfig{Receiver: r})
	w.connected(s)
	o := observed("w-1", "orders")
	o.Listen = []fleet.Listen{{Port: 8080, Protocol: "http", Address: "10.0.0.1", Netns: "1"}}
	nobody := fleet.Observed{Instance: "w-2"}
	assigned, err := s.Report(t.Context(), fleet.Report{Full: true, Present: []fleet.Observed{o, nobody}})
	if err != nil || len(assigned) != 2 {
		t.Fatalf("%+v, %v", assigned, err)
	}
	if a := assigned[0]; a.ID.String() != "spiffe://example.org/service/orders" || a.Epoch != 1 || a.Facts.Text(identity.FactMachine) != "m1" || string(a.Issuance) != `{"winner":"services"}` {
		t.Errorf("assigned %+v", a)
	}
	if got, want := assigned[1].Refusal, (fleet.Refusal{Kind: refusal.Unknown, Code: "no-issuance-rule", What: "identity", Why: "no rule matches", Do: "add one", Decision: "d-1"}); got == nil || *got != want {
		t.Errorf("refusal %+v", got)
	}
	chain, err := s.SignX509(t.Context(), "w-1", request(t))
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.IDFromCertificate(chain[0]); err != nil || id != assigned[0].ID {
		t.Errorf("%v, %v", id, err)
	}
	svid, err := s.SignJWT(t.Context(), "w-1", []string{"db"})
	if err != nil || svid.ID != assigned[0].ID || svid.Token == "" || svid.Audience[0] != "db" || time.Until(svid.Expires) <= 0 {
		t.Errorf("%v, %v", svid, err)
	}
	eventually(t, "the identity comes down", func() bool {
		return r.get("identity/w-1") != "" && r.get("endpoint/w-1/8080") != "" && r.get("policy_set/current") != ""
	})
	r.check(t)
	want(t, func() error { _, err := s.SignX509(t.Context(), "w-9", request(t)); return err }(), fleet.ErrWorkloadUnknown)
}

func TestJoinRefusalsReachTheAgentWhole(t *testing.T) {
	w := newWorld(t, nil)
	token := w.token("m1")
	w.joined("m2")
	join := func(token, machine string) error {
		return w.client(t.TempDir(), nil).Join(t.Context(), agent.Joining{Token: token, Machine: machine})
	}
	want(t, join(token, "m3"), fleet.ErrTokenMachine)
	if err := join(token, "m1"); err != nil {
		t.Fatal(err)
	}
	again := join(token, "m1")
	want(t, again, fleet.ErrTokenUsed)
	// The wording is the server's own.
	_, direct := w.fleet.Join(t.Context(), fleet.JoinRequest{Secret: token, Machine: "m1", CSR: request(t)})
	if again.Error() != direct.Error() || refusal.As(again).Kind != refusal.As(direct).Kind {
		t.Errorf("over the wire: %v\ndirectly:      %v", again, direct)
	}
	_, secret, err := w.fleet.CreateToken(t.Context(), fleet.TokenRequest{Machine: "m4", TTL: time.Minute}, rec())
	if err != nil {
		t.Fatal(err)
	}
	w.skewBy(2 * time.Minute)
	expired := join(secret.Reveal(), "m4")
	want(t, expired, fleet.ErrTokenExpired)
	if !strings.Contains(expired.Error(), "behind the server's") {
		t.Errorf("a refusal for its time must say that the clocks differ: %v", expired)
	}
	w.skewBy(0)
	// A second agent as a machine that has joined: a token was made before it did.
	a, b := w.token("m5"), w.token("m5")
	if err := join(a, "m5"); err != nil {
		t.Fatal(err)
	}
	want(t, join(b, "m5"), fleet.ErrMachineExists)
	want(t, join("rj1.x", "m5"), fleet.ErrTokenMalformed)
}

func TestAnImpostorDoesNotGetTheToken(t *testing.T) {
	w := newWorld(t, nil)
	// The impostor's authority is of the same trust domain, and signs the server's ID: only the root differs.
	impostor := newWorld(t, nil)
	c, err := agent.Dial(t.Context(), agent.Config{Server: impostor.address, Credentials: agent.FileCredentials(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	token := w.token("m1")
	want(t, c.Join(t.Context(), agent.Joining{Token: token, Machine: "m1"}), agent.ErrServer)
	if n := impostor.meter.get("agentapi_calls"); n != 0 {
		t.Errorf("the impostor was called %d times", n)
	}
	// One that shows the real root without having its signature.
	liar := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) {
		s.Bundle = w.ca.Bundle
	})
	c, err = agent.Dial(t.Context(), agent.Config{Server: liar.address, Credentials: agent.FileCredentials(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	want(t, c.Join(t.Context(), agent.Joining{Token: token, Machine: "m1"}), agent.ErrServer)
	// One that has a genuine certificate, but of a workload.
	workload, err := identity.MakeID(td, "/service/evil")
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.cfg.GetCertificate = certificates(t, w.ca, workload)
	w.start()
	want(t, w.client(t.TempDir(), nil).Join(t.Context(), agent.Joining{Token: token, Machine: "m1"}), agent.ErrServer)
	if liar.meter.get("agentapi_calls") != 0 || w.meter.get("agentapi_calls") != 0 {
		t.Error("an impostor was called")
	}
	w.stop()
	w.cfg.GetCertificate = certificates(t, w.ca, fleet.ServerID(td))
	w.start()
	if err := w.client(t.TempDir(), nil).Join(t.Context(), agent.Joining{Token: token, Machine: "m1"}); err != nil {
		t.Errorf("the token must still be good: %v", err)
	}
}

func TestAfterJoiningTheServerIsKnownByTheBundle(t *testing.T) {
	w := newWorld(t, nil)
	c := w.joined("m1")
	address := w.address
	w.stop()
	other := newAuthority(t, time.Now)
	w.cfg.GetCertificate, w.cfg.Bundle = certificates(t, other, fleet.ServerID(td)), other.Bundle
	w.address = address
	w.start()
	s, _ := w.session(c, agent.SessionConfig{})
	eventually(t, "the impostor is refused", func() bool { return strings.Contains(s.Status().Error, "does not verify") })
	if s.Status().Connected {
		t.Error("connected to an impostor")
	}
}

func TestAMaliciousAgentGetsNobodyElsesIdentity(t *testing.T) {
	w := newWorld(t, nil)
	good, _ := w.session(w.joined("m1"), agent.SessionConfig{})
	evil, _ := w.session(w.joined("m2"), agent.SessionConfig{})
	w.connected(good)
	w.connected(evil)
	if _, err := good.Report(t.Context(), fleet.Report{Present: []fleet.Observed{observed("w-1", "orders")}}); err != nil {
		t.Fatal(err)
	}
	_, err := evil.SignX509(t.Context(), "w-1", request(t))
	want(t, err, fleet.ErrWorkloadForeign)
	_, err = evil.SignJWT(t.Context(), "w-1", []string{"db"})
	want(t, err, fleet.ErrWorkloadForeign)
	if w.meter.get("fleet_foreign_workload") != 2 {
		t.Error("not counted")
	}
}

func TestCallsNeedTheCertificateOfAMachine(t *testing.T) {
	w := newWorld(t, nil)
	w.joined("m1")
	foreign := newAuthority(t, time.Now)
	call := func(cert *tls.Certificate) *refusal.Error {
		t.Helper()
		return rawCall(t, w.address, cert)
	}
	cert := func(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Certificate {
		t.Helper()
		c, err := get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	machine, err := fleet.MachineID(td, "m1")
	if err != nil {
		t.Fatal(err)
	}
	service, err := identity.MakeID(td, "/service/orders")
	if err != nil {
		t.Fatal(err)
	}
	unjoined, err := fleet.MachineID(td, "m9")
	if err != nil {
		t.Fatal(err)
	}
	want(t, call(nil), agent.ErrNoCertificate)
	want(t, call(cert(certificates(t, foreign, machine))), agent.ErrCertificate)
	want(t, call(cert(certificates(t, w.ca, service))), fleet.ErrMachineID)
	want(t, call(cert(certificates(t, w.ca, machine))), fleet.ErrMachineKey) // genuine, and not the key that joined
	want(t, call(cert(certificates(t, w.ca, unjoined))), fleet.ErrMachineUnknown)
	old := cert(certificates(t, w.ca, machine))
	w.skewBy(2 * time.Hour)
	want(t, call(old), agent.ErrCertExpired)
	w.skewBy(-2 * time.Hour)
	want(t, call(old), agent.ErrCertificate)
}

func TestOnlyTLS13WithTheHybridFirst(t *testing.T) {
	w := newWorld(t, nil)
	_, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err == nil {
		t.Error("TLS 1.2 was accepted")
	}
	c, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if id := c.ConnectionState().CurveID; id != tls.X25519MLKEM768 {
		t.Errorf("key exchange %v", id)
	}
}

func TestARevokedMachineIsPutOutWithinASecond(t *testing.T) {
	w := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) { s.Heartbeat = time.Minute })
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Receiver: &receiver{}, Spool: newSpool(t)})
	w.connected(s)
	if _, err := w.fleet.RevokeMachine(t.Context(), "m1", "stolen", rec()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	eventually(t, "the stream is ended", func() bool { return !s.Status().Connected })
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %s", took)
	}
	eventually(t, "the reason is known", func() bool { return strings.Contains(s.Status().Error, "it was revoked") })
	if _, err := s.SignX509(t.Context(), "w-1", request(t)); err == nil {
		t.Error("a revoked machine was answered")
	}
	if w.meter.get("agentapi_calls method Sync code machine-revoked") == 0 {
		t.Error("not counted")
	}
}

func TestAKilledServerLosesNothingAndDoublesNothing(t *testing.T) {
	w := newWorld(t, nil)
	sp, r := newSpool(t), &receiver{}
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Receiver: r, Spool: sp})
	w.connected(s)
	const total = 900
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range total {
			e := event.New(event.Control, "test")
			e.Message = fmt.Sprint(i)
			sp.Emit(e)
			time.Sleep(time.Millisecond)
		}
	})
	for range 2 {
		time.Sleep(100 * time.Millisecond)
		w.stop()
		want(t, func() error { _, err := s.Report(t.Context(), fleet.Report{}); return err }(), agent.ErrUnreachable)
		eventually(t, "it is noticed", func() bool { return !s.Status().Connected })
		w.start()
		w.connected(s)
	}
	wg.Wait()
	stored := func() (out []string) {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Machine: "m1", Kind: "test"})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			out = append(out, e.Event.Message)
		}
		return out
	}
	eventually(t, "everything has arrived", func() bool { return len(stored()) >= total })
	for i, m := range stored() {
		if m != fmt.Sprint(i) {
			t.Fatalf("event %d is %s", i, m)
		}
	}
	w.connected(s)
	eventually(t, "the queue is empty", func() bool { return sp.Status().Acked == sp.Status().Last })
	if n := w.meter.get("agentclient_reconnects"); n < 2 {
		t.Errorf("%d reconnects", n)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.snapshots != 0 {
		t.Errorf("%d snapshots where it could have resumed", r.snapshots)
	}
}

func TestALostAcknowledgementDoublesNothing(t *testing.T) {
	w := newWorld(t, nil)
	sp := newSpool(t)
	c := w.joined("m1")
	lossy := &lossySpool{Spool: sp}
	s, stop := w.session(c, agent.SessionConfig{Spool: lossy})
	w.connected(s)
	for range 10 {
		sp.Emit(event.New(event.Control, "test"))
	}
	count := func() int {
		list, err := w.fleet.Events(t.Context(), fleet.EventQuery{Machine: "m1"})
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	eventually(t, "stored", func() bool { return count() == 10 })
	stop() // the acknowledgements never got to the queue
	s, _ = w.session(c, agent.SessionConfig{Spool: sp})
	w.connected(s)
	eventually(t, "acknowledged", func() bool { return sp.Status().Acked == sp.Status().Last })
	if n := count(); n != 10 || w.meter.get("fleet_events_doubled") != 10 {
		t.Errorf("%d stored, %d doubles seen", n, w.meter.get("fleet_events_doubled"))
	}
}

// lossySpool loses acknowledgements.
type lossySpool struct{ agent.Spool }

func (l *lossySpool) Ack(uint64) error { return nil }

func TestAThousandChangesComeInOrder(t *testing.T) {
	w := newWorld(t, nil)
	r := &receiver{}
	c := w.joined("m1")
	s, stop := w.session(c, agent.SessionConfig{Receiver: r})
	w.connected(s)
	report := func(i int) {
		t.Helper()
		o := observed(fmt.Sprintf("w-%d", i%50), fmt.Sprintf("s%d", i))
		if _, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Present: []fleet.Observed{o}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 500 {
		report(i)
	}
	eventually(t, "half has come", func() bool { return r.Revision() >= 500 })
	stop() // and resumes
	for i := 500; i < 1000; i++ {
		report(i)
	}
	s, _ = w.session(c, agent.SessionConfig{Receiver: r})
	w.connected(s)
	eventually(t, "all has come", func() bool { return r.Revision() == w.fleet.Revision() })
	r.check(t)
	for i := range 50 {
		if got := r.get(fmt.Sprintf("identity/w-%d", i)); !strings.Contains(got, fmt.Sprintf("/service/s%d\"", 950+i)) {
			t.Errorf("w-%d is %s", i, got)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.snapshots != 0 || len(r.deltas) < 1000 {
		t.Errorf("%d snapshots, %d deltas", r.snapshots, len(r.deltas))
	}
}

func TestAnAgentTooFarBehindGetsASnapshot(t *testing.T) {
	w := newWorld(t, func(_ *agent.ServerConfig, f *fleet.Config) { f.KeepChanges = 10 })
	c := w.joined("m1")
	for i := range 700 { // more than one message of parts
		o := observed(fmt.Sprintf("w-%d", i), "orders")
		if _, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Present: []fleet.Observed{o}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.fleet.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.open() // what is in memory would do, else
	w.start()
	r := &receiver{state: map[string]string{"identity/stale": "x"}}
	s, _ := w.session(c, agent.SessionConfig{Receiver: r})
	eventually(t, "all has come", func() bool { return s.Status().Revision == w.fleet.Revision() })
	if _, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Gone: []string{"w-0"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "changes follow it", func() bool { return s.Status().Revision == w.fleet.Revision() })
	r.check(t)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.snapshots != 1 || r.state["identity/stale"] != "" || r.state["identity/w-0"] != "" || r.state["identity/w-699"] == "" {
		t.Errorf("%d snapshots, %d things", r.snapshots, len(r.state))
	}
}

func TestASlowAgentIsLetGoAndResumes(t *testing.T) {
	w := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) { s.Window, s.SlowAfter = 2, 300*time.Millisecond })
	hold := make(chan struct{})
	r := &receiver{hold: hold}
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Receiver: r})
	for i := range 2000 {
		o := observed(fmt.Sprintf("w-%d", i), "orders")
		if _, err := w.fleet.Report(t.Context(), "m1", fleet.Report{Present: []fleet.Observed{o}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "it is let go", func() bool { return w.meter.get("agentapi_sync_slow") > 0 })
	if sent := w.meter.get("agentapi_changes_sent"); sent > 600 {
		t.Errorf("%d changes were sent to an agent that took none", sent)
	}
	close(hold)
	eventually(t, "it resumes", func() bool { return s.Status().Revision == w.fleet.Revision() })
	r.check(t)
	if w.meter.get("agentapi_calls method Sync code sync-slow") == 0 {
		t.Error("the reason was not given")
	}
}

func TestASecondStreamOfAMachineTakesThePlaceOfTheFirst(t *testing.T) {
	w := newWorld(t, nil)
	c := w.joined("m1")
	a, _ := w.session(c, agent.SessionConfig{})
	w.connected(a)
	b, _ := w.session(c, agent.SessionConfig{})
	w.connected(b)
	eventually(t, "the first is ended, with the reason", func() bool { return w.meter.get("agentapi_sync_superseded") > 0 })
}

func TestRenewalAtHalfLifeRotatesTheKey(t *testing.T) {
	w := newWorld(t, func(_ *agent.ServerConfig, f *fleet.Config) { f.AgentTTL = 8 * time.Second })
	c := w.joined("m1")
	before, err := w.fleet.Machine(t.Context(), "m1")
	if err != nil {
		t.Fatal(err)
	}
	s, _ := w.session(c, agent.SessionConfig{Receiver: &receiver{}})
	w.connected(s)
	eventually(t, "renewed, and connected with the new key", func() bool {
		m, err := w.fleet.Machine(t.Context(), "m1")
		return err == nil && m.SPKI != before.SPKI && m.Previous == "" && s.Status().Connected
	})
	if n := w.meter.get("agentclient_renewals"); n != 1 {
		t.Errorf("%d renewals", n)
	}
}

func TestAMachineThatSleptRenews(t *testing.T) {
	w := newWorld(t, nil)
	dir := t.TempDir()
	c := w.client(dir, nil)
	if err := c.Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1"}); err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.skewBy(20 * 24 * time.Hour) // everywhere it is 20 days later
	w.cfg.GetCertificate = certificates(t, w.ca, fleet.ServerID(td))
	w.start()
	s, stop := w.session(w.client(dir, w.now), agent.SessionConfig{})
	w.connected(s)
	if w.meter.get("fleet_renewals") != 1 {
		t.Error("not renewed")
	}
	stop()
	w.stop()
	w.skewBy(52 * 24 * time.Hour)
	w.cfg.GetCertificate = certificates(t, w.ca, fleet.ServerID(td))
	w.start()
	s, _ = w.session(w.client(dir, w.now), agent.SessionConfig{})
	eventually(t, "too late is said", func() bool { return strings.Contains(s.Status().Error, "longer ago than") })
}

func TestAClockThatIsTwoHoursOffIsNamed(t *testing.T) {
	w := newWorld(t, nil)
	dir := t.TempDir()
	if err := w.client(dir, nil).Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1"}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off  time.Duration
		want string
	}{{2 * time.Hour, "2h0m0s ahead of the server's"}, {-2 * time.Hour, "2h0m0s behind the server's"}} {
		now := func() time.Time { return time.Now().Add(c.off) }
		token := w.token("m2")
		err := w.client(t.TempDir(), now).Join(t.Context(), agent.Joining{Token: token, Machine: "m2"})
		want(t, err, agent.ErrClock)
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v does not say %q", err, c.want)
		}
		tokens, err := w.fleet.Tokens(t.Context(), "", 0)
		if err != nil || !tokens[len(tokens)-1].Used.IsZero() {
			t.Error("the token was spent")
		}
		s, stop := w.session(w.client(dir, now), agent.SessionConfig{})
		eventually(t, "the session says so", func() bool { return strings.Contains(s.Status().Error, c.want) })
		stop()
	}
	// Less off, so that the server's certificate holds: a machine does not join with it,
	token := w.token("m3")
	off := func() time.Time { return time.Now().Add(20 * time.Minute) }
	err := w.client(t.TempDir(), off).Join(t.Context(), agent.Joining{Token: token, Machine: "m3"})
	want(t, err, agent.ErrClock)
	if err := w.client(t.TempDir(), nil).Join(t.Context(), agent.Joining{Token: token, Machine: "m3"}); err != nil {
		t.Errorf("the token was spent: %v", err)
	}
	// and one that has joined goes on, and says so.
	now := func() time.Time { return time.Now().Add(10 * time.Minute) }
	s, _ := w.session(w.client(dir, now), agent.SessionConfig{})
	w.connected(s)
	if skew := s.Status().ClockSkew; skew > -9*time.Minute || skew < -11*time.Minute || w.meter.get("agentclient_clock_differs") == 0 {
		t.Errorf("skew %s", skew)
	}
}

func TestTheBundleIsKeptUpToDate(t *testing.T) {
	w := newWorld(t, nil)
	dir := t.TempDir()
	c := w.client(dir, nil)
	if err := c.Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1"}); err != nil {
		t.Fatal(err)
	}
	before := c.Bundle().Sequence
	s, _ := w.session(c, agent.SessionConfig{Receiver: &receiver{}})
	w.connected(s)
	if _, err := w.ca.Prepare(t.Context(), rec()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ca.Publish(t.Context(), rec()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new bundle is stored", func() bool { return w.client(dir, nil).Bundle().Sequence > before })
}

func TestBoundsOfTheServer(t *testing.T) {
	w := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) { s.MaxConnections, s.MaxCalls = 3, 2 })
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Spool: newSpool(t)}) // two streams, which is all
	w.connected(s)
	eventually(t, "one call too many is refused", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		// Over a connection of its own: gRPC's own bound is per connection.
		_, err := s.SignX509(ctx, "w-1", request(t))
		return refusal.As(err) != nil
	})
	var open []net.Conn
	for range 5 {
		c, err := net.Dial("tcp", w.address)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	eventually(t, "one connection too many is closed, and counted", func() bool { return w.meter.get("agentapi_connections_refused") >= 2 })
	closed := 0
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := io.ReadAll(c); err == nil || strings.Contains(err.Error(), "reset") {
			closed++
		}
		_ = c.Close()
	}
	if closed < 2 {
		t.Errorf("%d closed", closed)
	}
}

func TestCredentialsFile(t *testing.T) {
	w := newWorld(t, nil)
	dir := t.TempDir()
	if err := w.client(dir, nil).Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1"}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "agent.pem")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	load := func() error {
		_, err := agent.Dial(t.Context(), agent.Config{Server: w.address, Credentials: agent.FileCredentials(dir)})
		return err
	}
	for name, content := range map[string][]byte{
		"empty": nil, "torn": raw[:len(raw)/2], "no key": raw[strings.Index(string(raw), "-----BEGIN CERT"):], "no bundle": raw[:strings.Index(string(raw), "-----BEGIN SPIFFE")],
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := load(); err == nil {
			t.Errorf("%s: loaded", name)
		} else {
			want(t, err, agent.ErrCredentials)
			if strings.Contains(err.Error(), "BEGIN") {
				t.Errorf("%s: quoted: %v", name, err)
			}
		}
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	want(t, load(), agent.ErrCredentials)
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	creds, err := agent.FileCredentials(dir).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%v %+v %#v", creds, creds, creds); strings.Contains(text, "PrivateKey") || !strings.Contains(text, "machine/m1") {
		t.Errorf("rendered: %s", text)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".agent-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestALargeReportCrossesInParts(t *testing.T) {
	w := newWorld(t, nil)
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{})
	w.connected(s)
	var r fleet.Report
	for i := range 2000 {
		o := observed(fmt.Sprintf("w-%d", i), "orders")
		var err error
		if o.Facts, err = o.Facts.With(identity.Fact{Name: "label.long", Value: strings.Repeat("x", 3000), Source: identity.FromOperator}); err != nil {
			t.Fatal(err)
		}
		r.Present = append(r.Present, o)
	}
	r.Full = true
	assigned, err := s.Report(t.Context(), r)
	if err != nil || len(assigned) != 2000 || assigned[1999].ID.IsZero() || assigned[1999].Instance != "w-1999" {
		t.Fatalf("%d, %v", len(assigned), err)
	}
}

func TestAReportTooLargeIsRefused(t *testing.T) {
	w := newWorld(t, nil)
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{})
	w.connected(s)
	o := observed("w-1", "orders")
	for i := range 15 {
		var err error
		if o.Facts, err = o.Facts.With(identity.Fact{Name: fmt.Sprintf("label.l%d", i), Value: strings.Repeat("x", 4000), Source: identity.FromOperator}); err != nil {
			t.Fatal(err)
		}
	}
	r := fleet.Report{}
	for range 600 {
		r.Present = append(r.Present, o)
	}
	_, err := s.Report(t.Context(), r)
	want(t, err, agent.ErrMessage)
}

func TestStatusRendersAsJSON(t *testing.T) {
	w := newWorld(t, nil)
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{})
	w.connected(s)
	raw, err := json.Marshal(s.Status())
	if err != nil || !strings.Contains(string(raw), `"connected":true`) {
		t.Errorf("%s, %v", raw, err)
	}
}
