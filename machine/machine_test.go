package machine_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

const td = identity.TrustDomain("test.example")

// server stands for the control plane: it names every workload /service/<service> and signs with an authority of its own.
type server struct {
	mu    sync.Mutex
	away  bool
	wrong bool // sign for another identity than the assigned
	ttl   time.Duration
	gone  []string
	busy  int  // reports being answered
	mixed bool // two were at once
	signs int
	ca    *x509.Certificate
	key   *ecdsa.PrivateKey
}

func newServer(t *testing.T) *server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &server{ca: cert, key: key, ttl: time.Hour}
}

var errAway = &refusal.Error{Kind: refusal.Unavailable, Code: "server-away", What: "reach the server", Why: "it is away"}

func idOf(service string) identity.ID {
	id, err := identity.MakeID(td, "/service/"+service)
	if err != nil {
		panic(err)
	}
	return id
}

func (s *server) Report(_ context.Context, r fleet.Report) ([]fleet.Assigned, error) {
	s.mu.Lock()
	s.busy++
	s.mixed = s.mixed || s.busy > 1
	s.mu.Unlock()
	time.Sleep(time.Millisecond)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy--
	if s.away {
		return nil, errAway
	}
	s.gone = append(s.gone, r.Gone...)
	var out []fleet.Assigned
	for _, o := range r.Present {
		service := o.Facts.Text(identity.FactService)
		if service == "nobody" || service == "" {
			out = append(out, fleet.Assigned{Instance: o.Instance, Refusal: &fleet.Refusal{
				Kind: refusal.Denied, Code: "no-issuance-rule", What: "identity", Why: "no rule matches", Do: "add one",
			}})
			continue
		}
		out = append(out, fleet.Assigned{Instance: o.Instance, ID: idOf(service), Facts: o.Facts})
	}
	return out, nil
}

func (s *server) SignX509(_ context.Context, instance string, csr []byte) ([]*x509.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return nil, errAway
	}
	s.signs++
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	id := idOf("orders")
	if s.wrong {
		id = idOf("payments")
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(int64(s.signs) + 1), URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Second), NotAfter: time.Now().Add(s.ttl),
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, s.ca, req.PublicKey, s.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return []*x509.Certificate{cert}, err
}

func (s *server) SignJWT(_ context.Context, _ string, audience []string) (*identity.JWTSVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return nil, errAway
	}
	s.signs++
	return &identity.JWTSVID{ID: idOf("orders"), Token: "token", Audience: audience, Expires: time.Now().Add(time.Minute)}, nil
}

func (s *server) set(fn func(*server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn(s)
}

// realAttestor is the door itself, adapted as the roof does.
type realAttestor struct{ *attest.Attestor }

func (a realAttestor) Process(ctx context.Context, pid int) (machine.Subject, error) {
	s, err := a.Attestor.Process(ctx, pid)
	return machine.Subject{PID: s.PID, Start: s.Start, Cgroup: s.Cgroup, CgroupID: s.CgroupID, Facts: s.Facts}, err
}

type sink struct {
	mu     sync.Mutex
	events []event.Event
}

func (s *sink) Emit(e event.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
}

func (s *sink) has(kind string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if e.Kind == kind {
			return true
		}
	}
	return false
}

type world struct {
	*machine.Machine
	server *server
	sink   *sink
	config machine.Config
	root   string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: cgroups are made")
	}
	root, err := attest.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	a, err := attest.New(attest.Config{CgroupRoot: root})
	if err != nil {
		t.Fatal(err)
	}
	subtree := "/redoubt-test-" + identity.Unique("m")
	t.Cleanup(func() {
		for _, d := range []string{"redoubt", ""} {
			_ = os.Remove(filepath.Join(root, subtree, d))
		}
	})
	w := &world{server: newServer(t), sink: &sink{}, root: root}
	w.config = machine.Config{
		ID: "m1", TrustDomain: td, Upstream: w.server, Attestor: realAttestor{a}, CgroupRoot: root, Subtree: subtree,
		StateDir: t.TempDir(), Sink: w.sink,
	}
	w.restart(t)
	bundle, err := json.Marshal(&identity.Bundle{TrustDomain: td, X509Authorities: []*x509.Certificate{w.server.ca}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Apply(t.Context(), []fleet.Change{{Revision: 1, Kind: fleet.KindBundle, Key: string(td), Payload: bundle}}, true); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) restart(t *testing.T) {
	t.Helper()
	m, err := machine.New(w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.Machine = m
}

// start runs a sleeping process as a workload and returns it.
func (w *world) start(t *testing.T, service string) (machine.Workload, *exec.Cmd) {
	t.Helper()
	p, err := w.Prepare(t.Context(), machine.Registration{Service: service, UID: 65001, GID: 65001})
	if err != nil {
		t.Fatal(err)
	}
	cmd := w.spawn(t, p.Cgroup)
	started, err := w.Started(t.Context(), p.Instance, cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Forget(context.Background(), p.Instance) })
	return started, cmd
}

func (w *world) spawn(t *testing.T, cgroup string) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(filepath.Join(w.root, cgroup))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Credential: &syscall.Credential{Uid: 65001, Gid: 65001},
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _, _ = cmd.Process.Wait() })
	return cmd
}

func code(err error) string {
	if r := refusal.As(err); r != nil {
		return r.Code
	}
	if err == nil {
		return ""
	}
	return "no refusal: " + err.Error()
}

func TestWorkloadGetsItsIdentityByItsCgroup(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	if started.ID != idOf("orders") || started.PID != cmd.Process.Pid {
		t.Fatalf("got %+v", started)
	}
	docs, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	if docs.SVIDs[0].ID != idOf("orders") || len(docs.Bundles) != 1 {
		t.Errorf("got %v", docs)
	}
	if _, err := docs.SVIDs[0].Chain[0].Verify(x509.VerifyOptions{Roots: docs.Bundles[0].Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if _, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup+"/below"); err != nil {
		t.Errorf("a cgroup below the workload's is the workload's: %v", err)
	}
	if v, _ := started.Facts.Get(identity.FactUID); v.Value != int64(65001) || v.Source != identity.FromKernel {
		t.Errorf("uid fact: %+v", v)
	}
}

func TestNobodyElseGetsIt(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	if _, err := w.Documents(t.Context(), os.Getpid(), "/"); code(err) != "no-identity" {
		t.Errorf("a process outside any workload: %v", err)
	}
	if _, err := w.Documents(t.Context(), os.Getpid(), started.Cgroup+"-other"); code(err) != "no-identity" {
		t.Errorf("a cgroup whose path only begins like the workload's: %v", err)
	}
	if _, err := w.JWT(t.Context(), cmd.Process.Pid, started.Cgroup, []string{"a"}, idOf("payments")); code(err) != "not-your-identity" {
		t.Errorf("a token for another's identity: %v", err)
	}
	if _, err := w.JWT(t.Context(), cmd.Process.Pid, started.Cgroup, []string{"a"}, idOf("orders")); err != nil {
		t.Errorf("a token for its own: %v", err)
	}
}

func TestStartedRefusesAProcessOfAnotherCgroup(t *testing.T) {
	w := newWorld(t)
	p, err := w.Prepare(t.Context(), machine.Registration{Service: "orders", UID: 65001, GID: 65001})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Forget(context.Background(), p.Instance) }()
	if _, err := w.Started(t.Context(), p.Instance, os.Getpid()); code(err) != "not-of-this-workload" {
		t.Errorf("got %v", err)
	}
}

func TestRootRunsOnlyPrivileged(t *testing.T) {
	w := newWorld(t)
	if _, err := w.Prepare(t.Context(), machine.Registration{Service: "orders"}); code(err) != "invalid-workload" {
		t.Errorf("uid 0 without --privileged: %v", err)
	}
	p, err := w.Prepare(t.Context(), machine.Registration{Service: "orders", Privileged: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Forget(context.Background(), p.Instance) }()
	proofs := []policy.Protection{{Name: machine.Confinement, State: policy.Enforced, Proved: time.Now()}}
	for _, got := range w.Protections(proofs, nil) {
		if got.Name == machine.Confinement && (got.State != policy.NotEnforceable || got.Reason != "privileged workload") {
			t.Errorf("got %+v", got)
		}
	}
}

func TestEnforcedIsSaidOnlyWithAProof(t *testing.T) {
	w := newWorld(t)
	w.start(t, "orders")
	state := func(proofs ...policy.Protection) policy.State {
		for _, p := range w.Protections(proofs, nil) {
			if p.Name == machine.Confinement {
				return p.State
			}
		}
		return ""
	}
	held := policy.Protection{Name: "run.vsock", State: policy.Enforced, Proved: time.Now()}
	failed := policy.Protection{Name: "run.io-uring", State: policy.NotEnforceable, Reason: "it was let through"}
	if got := state(); got != policy.NotEnforceable {
		t.Errorf("without a proof: %s", got)
	}
	if got := state(held); got != policy.Enforced {
		t.Errorf("with a proof: %s", got)
	}
	if got := state(held, failed); got != policy.NotEnforceable {
		t.Errorf("with a probe that failed: %s", got)
	}
}

func TestNoRuleIsAClearRefusal(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "nobody")
	_, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup)
	if code(err) != "no-issuance-rule" || !strings.Contains(err.Error(), "no rule matches") {
		t.Errorf("got %v", err)
	}
}

func TestServerAwayKeepsServing(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	w.server.set(func(s *server) { s.away = true })
	if _, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup); err != nil {
		t.Errorf("an SVID that is valid must be served without the server: %v", err)
	}
	d := w.Decide(t.Context(), &policy.Request{
		Principal: policy.Entity{UID: policy.UID{Type: "Workload", ID: started.ID.String()}},
		Action:    policy.Action(policy.Net, "connect"), Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "payments"}},
	})
	if d.Edition != 0 || d.ID == "" || d.Machine != "m1" {
		t.Errorf("got %+v", d)
	}
	got, err := w.Decision(d.ID)
	if err != nil || got.ID != d.ID {
		t.Errorf("the machine must remember its decisions: %v", err)
	}
}

func TestRenewsAtHalfLifeAndTellsItsHolder(t *testing.T) {
	w := newWorld(t)
	w.server.set(func(s *server) { s.ttl = 3 * time.Second })
	started, cmd := w.start(t, "orders")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	docs, err := w.Documents(ctx, cmd.Process.Pid, started.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	first := docs.SVIDs[0]
	select {
	case <-docs.Changed:
	case <-time.After(8 * time.Second):
		t.Fatal("no renewal")
	}
	docs, err = w.Documents(ctx, cmd.Process.Pid, started.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	if docs.SVIDs[0].Chain[0].Equal(first.Chain[0]) || docs.SVIDs[0].SPKI() == first.SPKI() {
		t.Error("a renewal has a fresh certificate and a fresh key")
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAnSVIDForAnotherIsNotAccepted(t *testing.T) {
	w := newWorld(t)
	w.server.set(func(s *server) { s.wrong = true })
	started, cmd := w.start(t, "orders")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if docs, err := w.Documents(ctx, cmd.Process.Pid, started.Cgroup); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, %v", docs, err)
	}
}

func TestRevocationEndsTheIdentity(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	docs, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	spki := docs.SVIDs[0].SPKI()
	for _, r := range []fleet.Revocation{
		{ID: "v-1", Identity: idOf("orders"), Reason: "test"}, {ID: "v-2", SPKI: hex.EncodeToString(spki[:]), Reason: "test"},
	} {
		raw, _ := json.Marshal(r)
		change := fleet.Change{Revision: 5, Kind: fleet.KindRevocation, Key: r.ID, Payload: raw}
		if err := w.Apply(t.Context(), []fleet.Change{change}, false); err != nil {
			t.Fatal(err)
		}
		select {
		case <-docs.Changed:
		default:
			t.Error("holders must be told of a revocation")
		}
		if _, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup); code(err) != "identity-revoked" {
			t.Errorf("%s: got %v", r.ID, err)
		}
		change.Deleted, change.Payload = true, nil
		if err := w.Apply(t.Context(), []fleet.Change{change}, false); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup); err != nil {
			t.Errorf("after the revocation of %s was lifted: %v", r.ID, err)
		}
	}
}

func TestABadPolicySetLeavesTheGoodOne(t *testing.T) {
	w := newWorld(t)
	push := func(version uint64, text string) {
		raw, _ := json.Marshal(fleet.PolicySet{
			Version: version, Digest: text, Files: []fleet.PolicyFile{{Name: "a.cedar", Content: text}},
		})
		if err := w.Apply(t.Context(), []fleet.Change{{Revision: 10 + version, Kind: fleet.KindPolicySet, Key: "current", Payload: raw}}, false); err != nil {
			t.Fatal(err)
		}
	}
	push(1, `permit(principal, action == Net::Action::"connect", resource);`)
	if got := w.Status().PolicySet; got != 1 {
		t.Fatalf("policy set %d", got)
	}
	push(2, `permit(principal, action == Net::Action::"conect", resource);`)
	if got := w.Status(); got.PolicySet != 1 || got.Revision != 12 {
		t.Errorf("a policy set that does not parse must leave the former in force: %+v", got)
	}
	if !w.sink.has("change.refused") {
		t.Error("and it must be said")
	}
}

func TestStateOutlivesTheAgentAndHoldsNoKey(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	if _, err := w.Release(t.Context(), "test", "drill"); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(w.config.StateDir, "machine.json"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(raw), "PRIVATE") || strings.Contains(string(raw), "token") {
		t.Error("the state holds a secret")
	}
	if info, _ := os.Stat(filepath.Join(w.config.StateDir, "machine.json")); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	w.restart(t)
	if w.Released() == nil {
		t.Error("a release survives a restart")
	}
	got, err := w.Workload(started.Instance)
	if err != nil || got.Service != "orders" {
		t.Fatalf("the workload still runs and must be known: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if _, err := w.Documents(ctx, cmd.Process.Pid, started.Cgroup); err != nil {
		t.Errorf("it gets a fresh SVID: %v", err)
	}
	stop()
	<-done
}

func TestReleaseLetsEverythingThroughAndSaysSo(t *testing.T) {
	w := newWorld(t)
	raw, _ := json.Marshal(fleet.PolicySet{Version: 1, Digest: "x", Files: []fleet.PolicyFile{
		{Name: "mode.yaml", Content: "kind: Mode\nname: all\nspec: {for: {all: true}, namespaces: [Net], mode: enforce}\n"},
	}})
	if err := w.Apply(t.Context(), []fleet.Change{{Revision: 2, Kind: fleet.KindPolicySet, Key: "current", Payload: raw}}, false); err != nil {
		t.Fatal(err)
	}
	if w.Status().PolicySet != 1 {
		t.Fatalf("the set was refused: %+v", w.sink.events)
	}
	req := func() *policy.Request {
		return &policy.Request{
			Principal: policy.Entity{UID: policy.UID{Type: "Workload", ID: "spiffe://test.example/service/orders"}},
			Action:    policy.Action(policy.Net, "connect"), Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "payments"}},
		}
	}
	if d := w.Decide(t.Context(), req()); d.Allowed() || d.Explanation.Reason != policy.ReasonDefault {
		t.Fatalf("before: %+v", d.Explanation)
	}
	if _, err := w.Release(t.Context(), "test", ""); err != nil {
		t.Fatal(err)
	}
	if d := w.Decide(t.Context(), req()); !d.Allowed() || d.Explanation.Reason != policy.ReasonReleased {
		t.Errorf("released: %+v", d.Explanation)
	}
	if !w.sink.has("machine.released") {
		t.Error("a release is recorded")
	}
	if err := w.Resume(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	if d := w.Decide(t.Context(), req()); d.Allowed() {
		t.Error("resumed, yet let through")
	}
	if err := w.Resume(t.Context(), "test"); code(err) != "not-released" {
		t.Errorf("got %v", err)
	}
}

func TestEndOfTheLastProcessEndsTheWorkload(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	_ = cmd.Process.Kill()
	_, _ = cmd.Process.Wait()
	deadline := time.Now().Add(5 * time.Second)
	for {
		if _, err := w.Workload(started.Instance); code(err) == "unknown-workload" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the workload was not ended")
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	<-done
	if _, err := os.Stat(filepath.Join(w.root, started.Cgroup)); !os.IsNotExist(err) {
		t.Errorf("its cgroup stays: %v", err)
	}
	w.server.set(func(s *server) {
		if len(s.gone) != 1 || s.gone[0] != started.Instance {
			t.Errorf("the server was not told: %v", s.gone)
		}
	})
}

func TestACgroupMadeAnewIsAnotherWorkload(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	_ = cmd.Process.Kill()
	_, _ = cmd.Process.Wait()
	dir := filepath.Join(w.root, started.Cgroup)
	for range 100 {
		if err := os.Remove(dir); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	other := w.spawn(t, started.Cgroup)
	if _, err := w.Documents(t.Context(), other.Process.Pid, started.Cgroup); code(err) != "no-identity" {
		t.Errorf("a process in a cgroup of the same name got the identity: %v", err)
	}
	_ = other.Process.Kill()
	_, _ = other.Process.Wait()
}

// A full report drawn up before a workload was there must not arrive after the workload's own: it would end it.
func TestReportsDoNotOvertakeOneAnother(t *testing.T) {
	w := newWorld(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	type prepared struct {
		instance string
		pid      int
	}
	var all []prepared
	for range 8 {
		p, err := w.Prepare(ctx, machine.Registration{Service: "orders", UID: 65001, GID: 65001})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = w.Forget(context.Background(), p.Instance) })
		all = append(all, prepared{p.Instance, w.spawn(t, p.Cgroup).Process.Pid})
	}
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() {
			if got, err := w.Started(ctx, p.instance, p.pid); err != nil || got.ID != idOf("orders") {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	wg.Wait()
	stop()
	<-done
	w.server.set(func(s *server) {
		if s.mixed {
			t.Error("two reports were on their way at once")
		}
	})
}

// What ends while the server is away is told when it is back.
func TestEndsAreToldOnceTheServerIsBack(t *testing.T) {
	w := newWorld(t)
	started, _ := w.start(t, "orders")
	w.server.set(func(s *server) { s.away = true })
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if err := w.Forget(ctx, started.Instance); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	w.server.set(func(s *server) { s.away = false })
	deadline := time.Now().Add(5 * time.Second)
	for told := false; !told; {
		w.server.set(func(s *server) { told = len(s.gone) == 1 && s.gone[0] == started.Instance })
		if time.Now().After(deadline) {
			t.Fatal("the server was never told")
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	<-done
}

// A release while no agent runs must leave the workloads of the state as they are: they still run.
func TestOfflineReleaseKeepsTheWorkloads(t *testing.T) {
	w := newWorld(t)
	started, _ := w.start(t, "orders")
	off, err := machine.New(machine.Config{StateDir: w.config.StateDir, Offline: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := off.Release(t.Context(), "test", ""); err != nil {
		t.Fatal(err)
	}
	w.restart(t)
	if _, err := w.Workload(started.Instance); err != nil {
		t.Errorf("the workload was forgotten: %v", err)
	}
	if w.Released() == nil || w.Status().Machine != "m1" {
		t.Errorf("the release was lost: %+v", w.Status())
	}
}

// What the server takes away is served no more.
func TestAnIdentityThatWasTakenAwayIsServedNoMore(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	raw, _ := json.Marshal(fleet.Identity{Instance: started.Instance, ID: started.ID, Service: "orders", Machine: "m1"})
	change := fleet.Change{Revision: 2, Kind: fleet.KindIdentity, Key: started.Instance, Payload: raw}
	if err := w.Apply(t.Context(), []fleet.Change{change}, false); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Documents(t.Context(), cmd.Process.Pid, started.Cgroup); err != nil {
		t.Fatal(err)
	}
	change.Revision, change.Deleted, change.Payload = 3, true, nil
	if err := w.Apply(t.Context(), []fleet.Change{change}, false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if docs, err := w.Documents(ctx, cmd.Process.Pid, started.Cgroup); err == nil {
		t.Errorf("still served: %v", docs.SVIDs)
	}
}

// A program whose first process ends, and leaves others running, is the same workload until they end.
func TestADaemonKeepsItsIdentity(t *testing.T) {
	w := newWorld(t)
	started, cmd := w.start(t, "orders")
	child := w.spawn(t, started.Cgroup)
	_ = cmd.Process.Kill()
	_, _ = cmd.Process.Wait()
	if err := w.Ended(t.Context(), started.Instance); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Documents(t.Context(), child.Process.Pid, started.Cgroup); err != nil {
		t.Errorf("the process that goes on lost its identity: %v", err)
	}
	if err := w.Forget(t.Context(), started.Instance); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Documents(t.Context(), child.Process.Pid, started.Cgroup); code(err) != "no-identity" {
		t.Errorf("forgotten, yet: %v", err)
	}
}

// A workload that started while nobody could say so is found by its cgroup, after a restart of the agent too.
func TestAStartThatNobodyToldOfIsFound(t *testing.T) {
	w := newWorld(t)
	p, err := w.Prepare(t.Context(), machine.Registration{Service: "orders", UID: 65001, GID: 65001})
	if err != nil {
		t.Fatal(err)
	}
	cmd := w.spawn(t, p.Cgroup)
	w.restart(t)
	t.Cleanup(func() { _ = w.Forget(context.Background(), p.Instance) })
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	if err := w.Apply(ctx, []fleet.Change{{Revision: 1, Kind: fleet.KindBundle, Key: string(td), Payload: bundleOf(t, w.server)}}, true); err != nil {
		t.Fatal(err)
	}
	docs, err := w.Documents(ctx, cmd.Process.Pid, p.Cgroup)
	if err != nil || docs.SVIDs[0].ID != idOf("orders") {
		t.Errorf("%v, %v", docs, err)
	}
	stop()
	<-done
}

func bundleOf(t *testing.T, s *server) []byte {
	t.Helper()
	raw, err := json.Marshal(&identity.Bundle{TrustDomain: td, X509Authorities: []*x509.Certificate{s.ca}})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What is moved includes what was started meanwhile, and an enrollment that fails puts everything back.
func TestEnrollMovesUntilNobodyIsLeftAndGivesBack(t *testing.T) {
	w := newWorld(t)
	old, err := w.Prepare(t.Context(), machine.Registration{Service: "old", UID: 65001, GID: 65001}) // a cgroup to be enrolled out of
	if err != nil {
		t.Fatal(err)
	}
	one, two := w.spawn(t, old.Cgroup), w.spawn(t, old.Cgroup)
	if err := w.Forget(t.Context(), old.Instance); err != nil {
		t.Fatal(err)
	}
	rounds := [][]int{{one.Process.Pid}, {two.Process.Pid}, {}}
	family := func() []int {
		next := rounds[0]
		rounds = rounds[1:]
		return next
	}
	e := machine.Enrollment{Registration: machine.Registration{Service: "legacy"}, Cgroup: old.Cgroup, PIDs: []int{one.Process.Pid}, Move: family}
	got, err := w.Enroll(t.Context(), e)
	if err != nil || got.Moved != 2 || got.ID != idOf("legacy") {
		t.Fatalf("%+v, %v", got, err)
	}
	t.Cleanup(func() { _ = w.Forget(context.Background(), got.Instance) })
	bad := e
	bad.Cgroup, rounds = got.Cgroup, nil
	bad.Move = func() []int { return []int{two.Process.Pid} } // never stable
	if _, err := w.Enroll(t.Context(), bad); code(err) != "restless-processes" {
		t.Errorf("got %v", err)
	}
	raw, _ := os.ReadFile("/proc/" + strconv.Itoa(two.Process.Pid) + "/cgroup")
	if !strings.Contains(string(raw), got.Instance) {
		t.Errorf("a failed enrollment did not put back: %s", raw)
	}
}
