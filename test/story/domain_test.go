package story_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
)

// domain is one trust domain: a server, and the agents that joined it.
type domain struct {
	dir    string // 0755, so that workloads reach the sockets in it; holds server/ and one directory an agent
	ip     string // of loopback, and this domain's own, so that a server that is started again has the same addresses
	config string // the server's configuration file
	server *role
	agents int
}

// found starts the server of a new domain. more are lines for below `server:`.
func found(t testing.TB, more ...string) *domain {
	t.Helper()
	d := prepare(t, more...)
	d.start(t)
	return d
}

// prepare makes the directory and the configuration of a domain without starting anything.
func prepare(t testing.TB, more ...string) *domain {
	t.Helper()
	needRoot(t)
	n := int(counted.Add(1))
	pid := os.Getpid()
	d := &domain{
		dir: filepath.Join(program.dir, "d"+strconv.Itoa(n)),
		ip:  fmt.Sprintf("127.%d.%d.%d", 64+pid>>16&63, pid>>8&255, 1+pid%254),
	}
	if err := os.Mkdir(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	port := 20000 + n%128*40
	text := fmt.Sprintf("server:\n  api: %s:%d\n  agents: %s:%d\n  metrics: %s:%d\n", d.ip, port, d.ip, port+1, d.ip, port+2)
	for _, line := range more {
		text += "  " + line + "\n"
	}
	d.config = writeFile(t, filepath.Join(d.dir, "server.yaml"), text)
	return d
}

func (d *domain) serverData() string { return filepath.Join(d.dir, "server") }

// start starts the server, again or for the first time.
func (d *domain) start(t testing.TB) {
	t.Helper()
	d.server = start(t, "server", "--config", d.config, "--data", d.serverData())
}

// cli puts the server's data directory before a verb.
func (d *domain) cli(args ...string) []string {
	return append([]string{"--data", d.serverData()}, args...)
}

// token makes a join token in a file.
func (d *domain) token(t testing.TB, name string, more ...string) string {
	t.Helper()
	file := filepath.Join(d.dir, fmt.Sprintf("token%d", counted.Add(1)))
	must(t, d.cli(append([]string{"token", "create", "--machine", name, "--write", file}, more...)...)...)
	return file
}

// node is one machine's agent.
type node struct {
	domain  *domain
	machine string
	data    string
	config  string
	socket  string
	cgroups string // its subtree, below the unified root
	role    *role
}

// machine makes the configuration of an agent that is not started. more are lines for below `agent:`.
func (d *domain) machine(t testing.TB, name string, more ...string) *node {
	t.Helper()
	d.agents++
	a := &node{
		domain: d, machine: name, data: filepath.Join(d.dir, fmt.Sprintf("%s-%d", name, d.agents)),
		socket: filepath.Join(d.dir, fmt.Sprintf("w%d.sock", d.agents)), cgroups: fmt.Sprintf("%s/%s-%d", program.cgroups, filepath.Base(d.dir), d.agents),
	}
	root := unified(t)
	if err := os.MkdirAll(filepath.Join(root, a.cgroups), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroups(filepath.Join(root, a.cgroups)) })
	text := fmt.Sprintf("agent:\n  server: %s\n  socket: %s\n  metrics: %s:0\n  probe_interval: 1h\n  machine: {cgroups: %s}\n",
		d.server.text("agents"), a.socket, d.ip, a.cgroups)
	for _, line := range more {
		text += "  " + line + "\n"
	}
	a.config = writeFile(t, a.data+".yaml", text)
	return a
}

// join starts an agent and joins it with a fresh token.
func (d *domain) join(t testing.TB, name string, more ...string) *node {
	t.Helper()
	a := d.machine(t, name, more...)
	a.start(t, "--machine", name, "--join-token-file", d.token(t, name))
	return a
}

// args is the command line that starts the agent.
func (a *node) args(more ...string) []string {
	return append([]string{"agent", "--config", a.config, "--data", a.data}, more...)
}

func (a *node) start(t testing.TB, more ...string) {
	t.Helper()
	a.role = start(t, a.args(more...)...)
}

// cli puts the agent's data directory before a verb.
func (a *node) cli(args ...string) []string { return append([]string{"--data", a.data}, args...) }

// doctor is what the agent says of itself.
type doctor struct {
	Machine     string              `json:"machine"`
	Status      machine.Status      `json:"status"`
	Protections []policy.Protection `json:"protections"`
	Connection  struct {
		Connected bool   `json:"connected"`
		Error     string `json:"error"`
	} `json:"connection"`
}

func (a *node) doctor(t testing.TB) doctor {
	t.Helper()
	return document[doctor](t, a.cli("doctor")...)
}

// connected waits until the agent is in touch with its server.
func (a *node) connected(t testing.TB) {
	t.Helper()
	eventually(t, 60*time.Second, "connection of "+a.machine, func() (bool, string) {
		c := a.doctor(t).Connection
		return c.Connected, c.Error
	})
}

// policySet waits until the agent has the policy set in force.
func (a *node) policySet(t testing.TB, version uint64) {
	t.Helper()
	eventually(t, 30*time.Second, "policy set of "+a.machine, func() (bool, string) {
		got := a.doctor(t).Status.PolicySet
		return got == version, fmt.Sprint(got)
	})
}

// workload is a shell that runs as a workload and does what it is told, one command at a time.
type workload struct {
	instance string
	pid      int
	cgroup   string // path in the unified hierarchy
	cmd      *exec.Cmd
	in       io.WriteCloser
	pipe     *os.File
	out      *bufio.Reader
	said     transcript
}

// shell starts a shell as a workload of a service.
func (a *node) shell(t testing.TB, service string, flags ...string) *workload {
	t.Helper()
	w := &workload{}
	args := a.cli(append([]string{"run", "--service", service}, flags...)...)
	w.cmd = exec.Command(program.redoubt, append(args, "--", "sh")...)
	w.cmd.Env, w.cmd.Stderr, w.cmd.Dir = environment(), &w.said, "/"
	w.open(t)
	w.instance, _ = w.sh(t, `echo $REDOUBT_WORKLOAD`)
	pid, _ := w.sh(t, `echo $$`)
	w.pid, _ = strconv.Atoi(pid)
	w.cgroup = cgroupOf(t, w.pid)
	return w
}

// open starts the shell, with pipes to it.
func (w *workload) open(t testing.TB) {
	t.Helper()
	var err error
	if w.in, err = w.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, child, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.cmd.Stdout, w.pipe, w.out = child, out, bufio.NewReader(out)
	err = startOn(w.cmd)
	_ = child.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.end(); _ = out.Close() })
}

// end closes the shell's input, which ends it.
func (w *workload) end() {
	_ = w.in.Close()
	_ = w.cmd.Wait()
}

// sh runs one command line in the workload and returns what it printed, on either stream, and its exit code.
func (w *workload) sh(t testing.TB, line string) (string, int) {
	t.Helper()
	w.begin(t, line)
	return w.finish(t)
}

// begin lets the workload run a command line; finish waits for its end.
func (w *workload) begin(t testing.TB, line string) {
	t.Helper()
	_ = w.pipe.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(w.in, "{ %s\n} 2>&1; printf '\\n@@%%s\\n' $?\n", line); err != nil {
		t.Fatalf("workload %s, %s: %v\n%s", w.instance, line, err, &w.said)
	}
}

func (w *workload) finish(t testing.TB) (string, int) {
	t.Helper()
	var text strings.Builder
	for {
		got, err := w.out.ReadString('\n')
		if code, ok := strings.CutPrefix(got, "@@"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(code))
			return strings.TrimSpace(text.String()), n
		}
		text.WriteString(got)
		if err != nil {
			t.Fatalf("workload %s: %v\n%s\n%s", w.instance, err, &text, &w.said)
		}
	}
}

// fetched is an SVID as `redoubt identity fetch --json` prints it.
type fetched struct {
	ID      string    `json:"spiffe_id"`
	Expires time.Time `json:"expires"`
	Serial  string    `json:"serial"`
}

// tryFetch lets the workload fetch its SVID; what is said instead is the text.
func (w *workload) tryFetch(t testing.TB) (fetched, string) {
	t.Helper()
	out, code := w.sh(t, program.redoubt+" identity fetch --json")
	var list []fetched
	if code != 0 || json.Unmarshal([]byte(out), &list) != nil || len(list) != 1 {
		return fetched{}, out
	}
	return list[0], ""
}

func (w *workload) fetch(t testing.TB) fetched {
	t.Helper()
	f, why := w.tryFetch(t)
	if why != "" {
		t.Fatalf("workload %s got no SVID: %s", w.instance, why)
	}
	return f
}

// cgroupOf is the cgroup of a process in the unified hierarchy.
func cgroupOf(t testing.TB, pid int) string {
	t.Helper()
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/cgroup", pid))) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return p
		}
	}
	t.Fatalf("process %d is in no cgroup of the unified hierarchy", pid)
	return ""
}

// counter reads a counter, summed over its series that have every label given, from a role's /metrics.
func counter(t testing.TB, r *role, name string, labels ...string) float64 {
	t.Helper()
	resp, err := http.Get(r.text("metrics"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	series := regexp.MustCompile(`(?m)^redoubt_` + name + `_total(\{[^}]*\})? (\S+)$`)
	for _, m := range series.FindAllStringSubmatch(string(raw), -1) {
		has := true
		for _, l := range labels {
			has = has && strings.Contains(m[1], l)
		}
		if n, err := strconv.ParseFloat(m[2], 64); err == nil && has {
			sum += n
		}
	}
	return sum
}

// auditLog is every byte of the audit log's entries: records are JSON in them.
func (d *domain) auditLog(t testing.TB) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(filepath.Join(d.serverData(), "audit"), func(p string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.Contains(p, "/entries/") {
			raw, err := os.ReadFile(p)
			if err != nil {
				return nil //nolint:nilerr // a partial bundle that was replaced meanwhile
			}
			all.Write(raw)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// shop is the policy set of most stories: orders may reach payments, nobody else may reach anything, quarantine forbids.
var shop = map[string]string{
	"shop.cedar": `@id("orders-to-payments")
permit (principal in Service::"orders", action == Net::Action::"connect", resource == Service::"payments");
@id("no-quarantined")
forbid (principal is Workload, action == Net::Action::"connect", resource)
when { principal has quarantined && principal.quarantined };
`,
	"shop.yaml": "kind: Mode\nname: enforced\nspec:\n  for: {all: true}\n  namespaces: [Net]\n  mode: enforce\n",
}

// policies writes files into a new directory.
func policies(t testing.TB, sets ...map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for _, files := range sets {
		for name, text := range files {
			writeFile(t, filepath.Join(dir, name), text)
		}
	}
	return dir
}

// apply puts policies in force and returns the version.
func (d *domain) apply(t testing.TB, sets ...map[string]string) uint64 {
	t.Helper()
	type edition struct {
		Edition struct {
			Version uint64 `json:"version"`
		} `json:"edition"`
	}
	return document[edition](t, d.cli("apply", "-f", policies(t, sets...))...).Edition.Version
}

// askLocal asks an agent whether a service may connect to another.
func (a *node) askLocal(t testing.TB, from, to string) policy.Decision {
	t.Helper()
	r := redoubt(t, a.cli("ask", "Workload:"+from, "Net::connect", "Service:"+to, "--local", "--json")...)
	var d policy.Decision
	if json.Unmarshal([]byte(r.out), &d) != nil || d.ID == "" {
		t.Fatalf("ask --local: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	if d.Allowed() != (r.code == 0) {
		t.Errorf("ask --local: exit code %d for a decision that is %s in %s", r.code, d.Verdict, d.Mode)
	}
	return d
}
