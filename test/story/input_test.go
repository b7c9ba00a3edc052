package story_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/policy/set"
)

// What cannot be read as it was meant refuses to start, and says where.
func TestBadConfigurationRefusesToStart(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := t.TempDir()
	for _, c := range []struct {
		name, role, text string
		says             []string
	}{
		{"unknown key", "server", "server:\n  api: 127.0.0.1:0\n  apii: hunter2\n", []string{"line 3", "apii", "docs/configuration.md"}},
		{"unknown key of the agent", "agent", "agent:\n  servr: hunter2\n", []string{"line 2", "servr"}},
		{"wrong type", "server", "server:\n  authority: {svid_ttl: hunter2}\n", []string{"line 2", "Duration"}},
		{"wrong value", "agent", "agent: {machine: {cgroups: ../hunter2}}\n", []string{"agent.machine.cgroups", "slash"}},
		{"two documents", "server", "log: {level: info}\n---\nlog: {level: hunter2}\n", []string{"more than one document"}},
		{"lifetimes that do not fit", "server", "server: {authority: {svid_ttl: 400h}}\n", []string{"IssuingTTL", "longer"}},
		{"too short", "server", "server: {authority: {svid_ttl: 4s}}\n", []string{"SVIDTTL", "4s is not between 5s"}},
	} {
		file := writeFile(t, filepath.Join(dir, "config.yaml"), c.text)
		r := tryStart(t, c.role, "--config", file, "--data", filepath.Join(dir, c.role))
		if r.ready != nil || r.code() != 1 {
			t.Errorf("%s: it started, or ended with another code than 1", c.name)
			continue
		}
		said := r.log.String()
		contains(t, c.name, said, c.says...)
		if strings.Contains(said, "hunter2") {
			t.Errorf("%s: the value, which may be a secret, is in the message: %s", c.name, said)
		}
	}
	r := tryStart(t, "server", "--config", filepath.Join(dir, "none.yaml"), "--data", dir)
	if r.code() != 1 {
		t.Errorf("a missing file: exit code %d", r.code())
	}
	contains(t, "a missing file", r.log.String(), "none.yaml", "no such file")
	if got := redoubt(t, "server", "--bogus"); got.code != 2 {
		t.Errorf("an unknown flag: exit code %d", got.code)
	}
}

// One bad policy refuses the whole set, names everything that is wrong with it, and leaves what was in force.
func TestWrongPolicySetChangesNothing(t *testing.T) {
	t.Parallel()
	d := found(t)
	version := d.apply(t, shop)
	m1 := d.join(t, "m1")
	w := m1.shell(t, "orders")
	w.fetch(t)
	m1.policySet(t, version)

	bad := policies(t, shop, map[string]string{
		"typo.cedar":    "@id(\"typo\")\npermit (principal in Service::\"web\", action == Net::Action::\"conect\", resource);\n",
		"attr.cedar":    "permit (principal is Workload, action == Net::Action::\"connect\", resource) when { principal.colour == \"red\" };\n",
		"syntax.cedar":  "permit (principal, action resource);\n",
		"unknown.yaml":  "kind: Mode\nname: more\nspec:\n  for: {all: true}\n  namespaces: [Net]\n  mode: enforce\n  colour: red\n",
		"nokind.yaml":   "kind: Wish\nname: x\nspec: {}\n",
		"badrule.yaml":  "kind: IssuanceRule\nname: broken\nspec:\n  when: context has\n  id: /service/x\n",
		"ignored.notes": "not read",
	})
	says := []string{"typo.cedar", "typo", "conect", "attr.cedar", "attr.cedar#1", "colour", "syntax.cedar", "unknown.yaml", "nokind.yaml", "Wish", "badrule.yaml", "broken"}
	refused(t, 1, says, d.cli("apply", "-f", bad)...)
	refused(t, 1, says, "policy", "check", "-f", bad)

	if got := document[[]set.Edition](t, d.cli("get", "editions")...); len(got) != int(version) || got[0].Version != version {
		t.Errorf("there are editions %+v, want the %d from before", got, version)
	}
	if got := m1.askLocal(t, "orders", "payments"); !got.Allowed() || got.Edition != version {
		t.Errorf("after the refused set: %s by set %d", got.Verdict, got.Edition)
	}
	if got := m1.askLocal(t, "orders", "ledger"); got.Allowed() {
		t.Errorf("after the refused set: %s by set %d", got.Verdict, got.Edition)
	}
}

// SIGHUP with a file that cannot be read changes nothing, and is said; a good one takes effect.
func TestInvalidReloadKeepsTheOld(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	for _, r := range []struct {
		role   *role
		config string
	}{{d.server, d.config}, {m1.role, m1.config}} {
		good := readFile(t, r.config)
		writeFile(t, r.config, good+"colour: hunter2\n")
		r.role.signal(t, syscall.SIGHUP)
		line := r.role.says(t, `"log.level":"error"`, "the former one stays in force", "colour")
		if strings.Contains(line, "hunter2") {
			t.Errorf("the log has the value: %s", line)
		}
		writeFile(t, r.config, good+"log: {level: debug}\ntrust_domain: other.example\n")
		r.role.signal(t, syscall.SIGHUP)
		r.role.says(t, `"log.level":"warn"`, "next start", "trust_domain")
		writeFile(t, r.config, good)
		r.role.signal(t, syscall.SIGHUP)
		r.role.says(t, `"the configuration was read again"`)
		if !r.role.running() {
			t.Fatalf("%s ended", r.role.name)
		}
	}
	// What it is called can change while it runs.
	writeFile(t, d.config, strings.Replace(readFile(t, d.config), "server:\n", "server:\n  names: [redoubt.example]\n", 1))
	d.server.signal(t, syscall.SIGHUP)
	eventually(t, 20*time.Second, "a certificate for the new name", func() (bool, string) {
		names := strings.Join(peerCertificate(t, d.server.text("agents")).DNSNames, " ")
		return strings.Contains(names, "redoubt.example"), names
	})
	must(t, d.cli("status")...)
	m1.connected(t)
}

// A database that is not what it was refuses to start, clearly, and is left as it is.
func TestCorruptDatabaseRefusesToStart(t *testing.T) {
	t.Parallel()
	d := found(t)
	d.apply(t, shop)
	if code := d.server.term(t); code != 0 {
		t.Fatalf("the server ended with %d", code)
	}
	db := filepath.Join(d.serverData(), "redoubt.db")
	whole := readFile(t, db)
	damages := map[string]func() string{
		"not a database":   func() string { return strings.Repeat("garbage ", len(whole)/8) },
		"cut off":          func() string { return whole[:len(whole)/2] },
		"pages are zeroes": func() string { return whole[:8192] + strings.Repeat("\x00", len(whole)-8192) },
		"one page rotten":  func() string { return whole[:4096*2] + strings.Repeat("\xa5", 4096) + whole[4096*3:] },
	}
	for name, damage := range damages {
		for _, side := range []string{"-wal", "-shm"} {
			_ = os.Remove(db + side)
		}
		writeFile(t, db, damage())
		r := tryStart(t, "server", "--config", d.config, "--data", d.serverData())
		if r.ready != nil || r.code() != 1 {
			t.Errorf("%s: the server started, or ended with another code than 1", name)
			r.kill()
			continue
		}
		contains(t, name, plainError(t, r.log.String()), "redoubt.db", "back-up", "left as it is")
		if readFile(t, db) != damage() {
			t.Errorf("%s: the file was changed", name)
		}
	}
	for _, side := range []string{"-wal", "-shm"} {
		_ = os.Remove(db + side)
	}
	writeFile(t, db, whole)
	d.start(t)
	must(t, d.cli("status")...)
}
