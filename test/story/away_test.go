package story_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/api/local"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
)

// events is how often each decision was told to the server, by id.
func (d *domain) told(t testing.TB) map[policy.ID]int {
	t.Helper()
	n := map[policy.ID]int{}
	for line := range strings.Lines(must(t, d.cli("events", "--json", "--limit", "0")...)) {
		var e struct {
			Event struct {
				Kind     string    `json:"kind"`
				Decision policy.ID `json:"decision"`
			} `json:"event"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("an event is no JSON: %s", line)
		}
		if e.Event.Decision != "" {
			n[e.Event.Decision]++
		}
	}
	return n
}

// A server that is killed takes nothing away that it gave: its agents serve SVIDs and decide. When it is back they renew, and
// what happened meanwhile arrives once.
func TestAgentOutlivesItsServer(t *testing.T) {
	t.Parallel()
	d := found(t, "authority: {svid_ttl: 8s}")
	version := d.apply(t, shop)
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	orders.fetch(t)
	m1.policySet(t, version)

	var before fetched
	eventually(t, 30*time.Second, "an SVID with enough of its life left to look at it", func() (bool, string) {
		before = orders.fetch(t)
		left := time.Until(before.Expires)
		return left > 4*time.Second, left.String()
	})
	d.server.kill()

	if got := orders.fetch(t); got.ID != "spiffe://redoubt.local/service/orders" || got.Serial != before.Serial {
		t.Errorf("with the server away the workload holds %+v, want %+v", got, before)
	}
	var made []policy.ID
	for range 10 {
		yes, no := m1.askLocal(t, "orders", "payments"), m1.askLocal(t, "orders", "ledger")
		if yes.Verdict != policy.Permit || no.Verdict != policy.Deny || no.Mode != policy.Enforce || yes.Edition != version {
			t.Fatalf("with the server away: %s %s in %s by set %d, want permit and deny in enforce by %d", yes.Verdict, no.Verdict, no.Mode, yes.Edition, version)
		}
		made = append(made, yes.ID, no.ID)
	}
	// A decision that the server has never heard of is explained here.
	contains(t, "why", must(t, m1.cli("why", string(made[0]))...), string(made[0]), "orders-to-payments", "workload.service = orders")
	// The management API is not reachable, which is exit code 3, and says so.
	refused(t, 3, []string{"connection refused", "check that it runs"}, d.cli("get", "machines")...)
	// What needs the server says so, once.
	out, code := orders.sh(t, program.redoubt+" identity token --audience bank")
	if code == 0 || strings.Count(out, "it is tried again") != 1 {
		t.Errorf("a JWT-SVID with the server away: exit code %d: %s", code, out)
	}
	late := m1.shell(t, "late") // a new workload runs, without an identity as yet

	d.start(t)
	m1.connected(t)
	eventually(t, 60*time.Second, "the SVID is renewed", func() (bool, string) {
		got, why := orders.tryFetch(t)
		return why == "" && got.Serial != before.Serial, why
	})
	eventually(t, 60*time.Second, "the late workload gets its identity", func() (bool, string) {
		got, why := late.tryFetch(t)
		return got.ID == "spiffe://redoubt.local/service/late", why
	})
	eventually(t, 60*time.Second, "every decision made meanwhile arrives", func() (bool, string) {
		told := d.told(t)
		missing := 0
		for _, id := range made {
			if told[id] == 0 {
				missing++
			}
		}
		return missing == 0, fmt.Sprintf("%d of %d are missing", missing, len(made))
	})
	for id, n := range d.told(t) {
		if n != 1 {
			t.Errorf("decision %s was told %d times", id, n)
		}
	}
	contains(t, "why, by the server", must(t, d.cli("why", string(made[1]))...), string(made[1]), "at m1, point agent")
}

// An agent that is killed knows its workloads again when it is back. Their keys are fresh, since none was ever on disk.
func TestKilledAgentKnowsItsWorkloadsAgain(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders", "--label", "tier=gold")
	short := m1.shell(t, "short")
	before, key := orders.fetch(t), orders.key(t)
	short.fetch(t)
	findKey(t, d, key)

	m1.role.kill()
	if out, code := orders.sh(t, "echo alive"); out != "alive" || code != 0 {
		t.Fatalf("the workload did not outlive its agent: %s", out)
	}
	short.end() // ends while nobody looks
	m1.start(t)

	after := orders.fetch(t)
	if after.ID != before.ID || after.Serial == before.Serial {
		t.Errorf("after the restart the SVID is %+v, want one of the same name and another serial than %+v", after, before)
	}
	if again := orders.key(t); again == key {
		t.Error("the key is the one from before the restart: it was kept somewhere")
	}
	e := document[struct{ Workload machine.Workload }](t, m1.cli("identity", "explain", "orders")...).Workload
	if e.Instance != orders.instance || e.PID != orders.pid || e.Labels["tier"] != "gold" || e.Cgroup != orders.cgroup {
		t.Errorf("after the restart the workload is %+v, want instance %s, process %d, cgroup %s", e, orders.instance, orders.pid, orders.cgroup)
	}
	refused(t, 1, []string{"short"}, m1.cli("identity", "explain", "short")...)
	m1.connected(t)
	eventually(t, 30*time.Second, "the server hears of the end", func() (bool, string) {
		out := must(t, d.cli("get", "workloads")...)
		return !strings.Contains(out, short.instance) || strings.Contains(lineWith(out, short.instance), "gone"), out
	})
	findKey(t, d, key)
	findKey(t, d, orders.key(t))

	// What an agent that is gone for good leaves behind is removed by one command, which an agent that runs refuses.
	r := tryStart(t, m1.args("--cleanup")...)
	if r.ready != nil || r.code() != 1 {
		t.Error("it was cleaned up under a running agent")
	}
	contains(t, "cleanup under a running agent", r.log.String(), "another Redoubt process")
	m1.role.kill()
	orders.end()
	contains(t, "cleanup", must(t, m1.args("--cleanup")...), orders.instance)
	if _, err := os.Stat(filepath.Join(unified(t), orders.cgroup)); err == nil {
		t.Error("the workload's cgroup is still there")
	}
}

func lineWith(text, part string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}

// key lets a workload write its SVID to files, and returns the body of the private key's PEM.
func (w *workload) key(t testing.TB) string {
	t.Helper()
	out, code := w.sh(t, "d=$(mktemp -d) && cd $d && "+program.redoubt+" identity fetch --write . >/dev/null && grep -v -e ---- svid.key | tr -d '\\n'; cd /; rm -rf $d")
	if code != 0 || len(out) < 100 {
		t.Fatalf("no key was written: %s", out)
	}
	return out
}

// findKey fails the test if a workload's key is below the directory of a domain, or any private key beside the agents' own.
func findKey(t testing.TB, d *domain, key string) {
	t.Helper()
	looked := 0
	err := filepath.WalkDir(d.dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil //nolint:nilerr // replaced meanwhile
		}
		raw, err := os.ReadFile(p)
		if err != nil {
			return nil //nolint:nilerr // replaced meanwhile
		}
		looked++
		// The middle of the PKCS #8 document is in the PEM as it is in the DER: the secret number is in it.
		if strings.Contains(string(raw), key[40:90]) || strings.Contains(string(raw), der(t, key)) {
			t.Errorf("%s holds the workload's key", p)
		}
		if strings.Contains(string(raw), "PRIVATE KEY-----") && filepath.Base(p) != "agent.pem" {
			t.Errorf("%s holds a private key", p)
		}
		return nil
	})
	if err != nil || looked < 5 {
		t.Fatalf("looked into %d files only: %v", looked, err)
	}
}

// der is the secret number of a P-256 key in PKCS #8: 32 bytes.
func der(t testing.TB, key string) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := parsed.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return string(secret)
}

// With the server away an SVID is served until it expires, and not longer; a new workload gets none. Both are told why.
func TestNothingIsServedBeyondItsLife(t *testing.T) {
	t.Parallel()
	d := found(t, "authority: {svid_ttl: 5s}")
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	orders.fetch(t)
	d.server.kill()
	late := m1.shell(t, "late")
	time.Sleep(5500 * time.Millisecond)
	for _, w := range []*workload{late, orders} {
		w.begin(t, program.redoubt+" identity fetch") // it waits a while for the server
	}
	for _, w := range []*workload{late, orders} {
		if out, code := w.finish(t); code == 0 || !strings.Contains(out, "the server has not signed it yet, or cannot be reached") {
			t.Errorf("a workload that has no SVID of the present got: %s", out)
		}
	}
}

// A server that keeps dying in the middle gets every event, once.
func TestEventsArriveOnceThoughTheServerKeepsDying(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.connected(t)
	door := local.NewClient(filepath.Join(m1.data, "agent.sock"))
	defer door.Close()
	var made []policy.ID
	decide := func(n int) {
		t.Helper()
		for range n {
			got, err := door.Decide(t.Context(), policy.Request{
				Principal: policy.Entity{UID: policy.UID{Type: "Workload", ID: "w"}}, Action: policy.Action("Net", "connect"),
				Resource: policy.Entity{UID: policy.UID{Type: "Service", ID: "payments"}},
			})
			if err != nil {
				t.Fatal(err)
			}
			made = append(made, got.Decision.ID)
		}
	}
	for range 3 {
		decide(300) // the last of them are on their way when it dies
		d.server.kill()
		decide(20)
		d.start(t)
		m1.connected(t)
	}
	// An acknowledgement that did not arrive: the agent comes back with a queue from before, and sends what it sent.
	d.server.kill()
	decide(20)
	if code := m1.role.term(t); code != 0 {
		t.Errorf("the agent ended with %d", code)
	}
	queue, kept := filepath.Join(m1.data, "spool"), t.TempDir()
	if err := os.CopyFS(filepath.Join(kept, "spool"), os.DirFS(queue)); err != nil {
		t.Fatal(err)
	}
	d.start(t)
	m1.start(t)
	arrived := func() (bool, string) {
		told := d.told(t)
		missing := 0
		for _, id := range made {
			if told[id] == 0 {
				missing++
			}
		}
		return missing == 0, fmt.Sprintf("%d of %d are missing", missing, len(made))
	}
	eventually(t, 60*time.Second, "every event arrives", arrived)
	m1.role.kill()
	if err := os.RemoveAll(queue); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(queue, os.DirFS(filepath.Join(kept, "spool"))); err != nil {
		t.Fatal(err)
	}
	m1.start(t)
	eventually(t, 60*time.Second, "it sends them again", func() (bool, string) {
		n := counter(t, d.server, "fleet_events_doubled")
		return n >= 20, fmt.Sprint(n)
	})
	door.Close()
	decide(20)
	eventually(t, 60*time.Second, "what is new arrives too", arrived)
	for id, n := range d.told(t) {
		if n != 1 {
			t.Errorf("decision %s was told %d times", id, n)
		}
	}
}
