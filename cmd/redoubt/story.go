package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/sandbox"
)

// story is one run of the demo. One goroutine owns it.
type story struct {
	cli    *cli
	data   string
	out    io.Writer
	report demoReport
	failed string // the first step that did not end as promised
	actors []*sandbox.Process
	names  []string // instances of the actors
}

func (s *story) say(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format+"\n", args...) }

func (s *story) heading(text string) { s.say("\n%s", s.cli.paint(bold, text)) }

// add keeps and prints a step.
func (s *story) add(step demoStep) {
	s.report.Steps = append(s.report.Steps, step)
	mark := s.cli.paint(green, "as promised")
	if step.Got != step.Expected {
		mark = s.cli.paint(red, "NOT as promised: expected "+step.Expected)
		if s.failed == "" {
			s.failed = step.Name
		}
	}
	s.say("  %-8s %-34s %-9s %s", s.cli.paint(layerColour(step.Layer), step.Layer), step.Name, step.Got, mark)
	s.say("           %s", s.cli.paint(dim, printable(shorten(step.Evidence, 150))))
}

// tell tells as much of the story as the rooms that are built can.
func (s *story) tell(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	s.report = demoReport{Incidents: []json.RawMessage{}, Shoppers: map[string]int{"requests": 0, "errors": 0}}
	defer s.curtain(ctx)
	for _, service := range []string{"orders", "web"} {
		if err := s.actor(ctx, service); err != nil {
			return err
		}
	}
	for _, chapter := range []func(context.Context) error{s.see, s.attack, s.understand, s.protect, s.truth} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

// see starts a workload and lets it say who it is.
func (s *story) see(ctx context.Context) error {
	s.heading("1. See: a program started by redoubt run has an identity, from the kernel's word for it")
	got, w, err := s.inWorkload(ctx, "orders", false, "identity", "")
	if err != nil {
		return err
	}
	s.add(demoStep{
		Name: "own identity, by cgroup and pidfd", Phase: "see", Layer: "access", Mode: policy.Enforce,
		Expected: "through", Got: got.Got, Evidence: got.Evidence, Explanation: "issued by rule to instance " + w.Instance,
	})
	return nil
}

// attack tries from within workloads what a workload must not do.
func (s *story) attack(ctx context.Context) error {
	s.heading("2. Attack: from within workload web, as an intruder who owns it")
	socket := filepath.Join(s.data, "agent", redoubt.AgentSocket)
	key := filepath.Join(s.data, "server", "kek")
	attempts := []struct{ name, attempt, arg, layer string }{
		{"leave its cgroup", "leave-cgroup", "", "runtime"},
		{"become root", "become-root", "", "runtime"},
		{"io_uring, past every filter", "io-uring", "", "runtime"},
		{"packet socket, past the network hooks", "packet-socket", "", "network"},
		{"vsock, past the network hooks", "vsock", "", "network"},
		{"read the authority's sealing key", "read-key", key, "access"},
		{"use the agent's own socket", "agent-socket", socket, "access"},
		{"take the identity of payments", "impostor", "spiffe://redoubt.local/service/payments", "access"},
	}
	for _, a := range attempts {
		got, w, err := s.inWorkload(ctx, "web", false, a.attempt, a.arg)
		if err != nil {
			return err
		}
		s.add(demoStep{
			Name: a.name, Phase: "attack", Layer: a.layer, Mode: policy.Enforce, Expected: "refused", Got: got.Got, Evidence: got.Evidence,
			Explanation: "tried as uid of instance " + w.Instance,
		})
	}
	s.say("\n  the same escape from a privileged workload, of which redoubt doctor promises nothing:")
	got, w, err := s.inWorkload(ctx, "legacy-root", true, "leave-cgroup", "")
	if err != nil {
		return err
	}
	s.add(demoStep{
		Name: "leave its cgroup, privileged", Phase: "attack", Layer: "runtime", Mode: policy.Observe, Expected: "through", Got: got.Got,
		Evidence: got.Evidence, Explanation: "instance " + w.Instance + " is shown as not enforceable: privileged workload",
	})
	return s.withoutCredential(ctx)
}

// withoutCredential calls the management API as a stranger.
func (s *story) withoutCredential(ctx context.Context) error {
	o, err := redoubt.LoadOperator(filepath.Join(s.data, "server"))
	if err != nil {
		return err
	}
	stranger := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, //nolint:gosec // a stranger, who is refused whomever he trusts
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.Server+"/v1/workloads", nil)
	if err != nil {
		return err
	}
	resp, err := stranger.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	got := "through"
	if resp.StatusCode == http.StatusUnauthorized {
		got = "refused"
	}
	s.add(demoStep{
		Name: "management API without a credential", Phase: "attack", Layer: "api", Mode: policy.Enforce, Expected: "refused", Got: got,
		Evidence: "curl -k " + o.Server + "/v1/workloads: " + resp.Status,
	})
	return nil
}

// understand asks for a decision before any policy is applied, and explains it.
func (s *story) understand(ctx context.Context) error {
	s.heading("3. Understand: every answer has an id and a reason")
	return s.asked(ctx, "understand", "orders to payments, no policy yet", []string{"Workload:orders", "Net::connect", "Service:payments"}, policy.Deny, policy.Observe)
}

// protect applies the shop's policies and asks again.
func (s *story) protect(ctx context.Context) error {
	s.heading("4. Protect: policies in Cedar, applied as a whole, kept only if confirmed")
	api, err := s.cli.api()
	if err != nil {
		return err
	}
	defer api.Close()
	_, etag, err := api.PolicySet(ctx)
	if err != nil {
		return err
	}
	applied, err := api.ApplyPolicySet(ctx, client.ApplyRequest{Files: demoPolicies, ConfirmWithin: client.Duration(5 * time.Minute)}, etag)
	if err != nil {
		return err
	}
	if _, err := api.ConfirmPolicySet(ctx, applied.Edition.Version); err != nil {
		return err
	}
	s.say("  policy set %d is in force and confirmed", applied.Edition.Version)
	for _, n := range applied.Notices {
		s.say("  %s", printable(n.String()))
	}
	if err := s.asked(ctx, "protect", "orders to payments, now permitted", []string{"Workload:orders", "Net::connect", "Service:payments"}, policy.Permit, policy.Enforce); err != nil {
		return err
	}
	return s.asked(ctx, "protect", "web to payments, refused by default", []string{"Workload:web", "Net::connect", "Service:payments"}, policy.Deny, policy.Enforce)
}

// asked has a request decided, by the server, and keeps the answer as a step: an answer, which no network point holds yet.
func (s *story) asked(ctx context.Context, phase, name string, request []string, verdict policy.Verdict, mode policy.Mode) error {
	d, err := s.cli.ask(ctx, request, `{"port": 8443}`, "", false)
	if err != nil {
		return err
	}
	by := ""
	if len(d.Explanation.Deciding) > 0 {
		by = d.Explanation.Deciding[0].ID
	}
	s.add(demoStep{
		Name: name, Phase: phase, Layer: "network", Mode: mode, Expected: string(verdict) + " in " + string(mode), Got: string(d.Verdict) + " in " + string(d.Mode),
		Evidence: "answered when asked; held by nothing until the network point is built", Decision: d.ID, Policy: by, Explanation: d.Explanation.Summary,
	})
	s.say("           %s", s.cli.paint(dim, "why: redoubt why "+string(d.ID)+": "+d.Explanation.Summary))
	return nil
}

// truth shows what is claimed, on what proof, and proves the audit log.
func (s *story) truth(ctx context.Context) error {
	s.heading("5. Truth: what is claimed, and on what proof")
	agent := s.cli.agent()
	defer agent.Close()
	var err error
	if s.report.Protections, err = agent.Protections(ctx); err != nil {
		return err
	}
	raw, err := agent.Doctor(ctx)
	if err != nil {
		return err
	}
	var doctor doctorReport
	if err := json.Unmarshal(raw, &doctor); err != nil {
		return err
	}
	s.report.Machine = doctor.Ledger
	printProtections(s.out, s.report.Protections)
	s.say("  %s", doctor.Summary)
	report, err := audit.Verify(ctx, filepath.Join(s.data, "server", redoubt.AuditDir), "", audit.Options{})
	if err != nil {
		return err
	}
	got := "through"
	if !report.OK() || report.Checked == 0 {
		got = "refused"
	}
	s.add(demoStep{
		Name: "audit log verifies from its files alone", Phase: "truth", Layer: "access", Mode: policy.Enforce, Expected: "through", Got: got,
		Evidence: fmt.Sprintf("%d leaves checked, %d findings", report.Checked, len(report.Findings)),
	})
	return nil
}

// launch starts one command of this program as a workload; stdout may be nil.
func (s *story) launch(ctx context.Context, service string, privileged bool, stdout *os.File, args ...string) (*sandbox.Process, machine.Workload, error) {
	agent := s.cli.agent()
	defer agent.Close()
	prepare := local.Prepare{Service: service, Labels: map[string]string{"demo": "yes"}, Privileged: privileged}
	if privileged {
		prepare.User = "root"
	}
	p, err := agent.Prepare(ctx, prepare)
	if err != nil {
		return nil, machine.Workload{}, err
	}
	root, err := attest.CgroupRoot()
	if err != nil {
		return nil, p.Workload, err
	}
	binary, err := s.binary()
	if err != nil {
		return nil, p.Workload, err
	}
	proc, err := sandbox.Start(ctx, sandbox.Spec{
		Argv: append([]string{binary, "demo", "attack"}, args...), Env: environment(p, nil), Cgroup: filepath.Join(root, p.Workload.Cgroup),
		UID: p.Workload.UID, GID: p.Workload.GID, Privileged: privileged, Stdout: stdout, Stderr: os.Stderr,
	})
	if err != nil {
		return nil, p.Workload, errors.Join(err, agent.Ended(context.WithoutCancel(ctx), p.Workload.Instance))
	}
	known, err := agent.Started(ctx, p.Workload.Instance, proc.PID())
	switch {
	case err == nil:
		return proc, known, nil
	case ended(err):
		return proc, p.Workload, nil
	}
	_ = proc.Signal(os.Kill)
	_, _ = proc.Wait()
	return nil, p.Workload, err
}

// actor starts a workload that stays for the length of the story.
func (s *story) actor(ctx context.Context, service string) error {
	proc, w, err := s.launch(ctx, service, false, nil, "wait")
	if err != nil {
		return err
	}
	s.actors, s.names = append(s.actors, proc), append(s.names, w.Instance)
	return nil
}

// curtain ends the actors and removes what the story left.
func (s *story) curtain(ctx context.Context) {
	agent := s.cli.agent()
	defer agent.Close()
	for i, proc := range s.actors {
		_ = proc.Signal(os.Kill)
		_, _ = proc.Wait()
		_ = agent.Forget(context.WithoutCancel(ctx), s.names[i])
	}
	_ = os.RemoveAll(s.binaryDir())
}

// inWorkload runs one attempt as a workload of a service, and returns what it saw.
func (s *story) inWorkload(ctx context.Context, service string, privileged bool, attempt, arg string) (attackResult, machine.Workload, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return attackResult{}, machine.Workload{}, err
	}
	defer func() { _ = r.Close() }()
	proc, known, err := s.launch(ctx, service, privileged, w, attempt, arg)
	_ = w.Close()
	if err != nil {
		return attackResult{}, known, err
	}
	saw, readErr := io.ReadAll(io.LimitReader(r, 64<<10))
	exit, err := proc.Wait()
	agent := s.cli.agent()
	defer agent.Close()
	_ = agent.Ended(context.WithoutCancel(ctx), known.Instance)
	if err := errors.Join(err, readErr); err != nil {
		return attackResult{}, known, err
	}
	var got attackResult
	if err := json.Unmarshal(bytes.TrimSpace(saw), &got); err != nil {
		return attackResult{Got: "unknown", Evidence: fmt.Sprintf("exit status %d, printed %q", exit.Status(), saw)}, known, nil
	}
	return got, known, nil
}

// binary returns a copy of this program that any user may run: the build tree may be closed to them.
func (s *story) binary() (string, error) {
	dir := s.binaryDir()
	name := filepath.Join(dir, "redoubt")
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	raw, err := os.ReadFile(self)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return name, os.WriteFile(name, raw, 0o755)
}

func (s *story) binaryDir() string { return filepath.Join(os.TempDir(), filepath.Base(s.data)+"-bin") }

// demoPolicies are those of examples/policies, in short.
var demoPolicies = []set.File{
	{Name: "demo.cedar", Content: `// Who may talk to whom in the demo.
@id("orders-to-payments")
permit (principal in Service::"orders", action == Net::Action::"connect", resource == Service::"payments")
when { context has port && context.port == 8443 };
`},
	{Name: "demo.yaml", Content: "kind: Mode\nname: net-is-enforced\nspec:\n  for: {all: true}\n  namespaces: [Net]\n  mode: enforce\n"},
}
