package story_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/fleet"
)

// A join token works once, for one machine, until it expires, and only with the server that it pins. Each refusal says what
// and why, and leaves the machine outside.
func TestJoinTokenIsForOneMachineOnceAndOneServer(t *testing.T) {
	t.Parallel()
	d := found(t)
	used := d.token(t, "m1")
	m1 := d.machine(t, "m1")
	m1.start(t, "--machine", "m1", "--join-token-file", used)
	m1.connected(t)

	fresh := d.token(t, "m3")
	expired := d.token(t, "m4")
	must(t, d.cli("token", "delete", tokenID(t, expired))...)
	secret := readFile(t, fresh)
	root := strings.TrimSpace(secret[strings.LastIndexByte(secret, '.')+1:])
	cases := []struct {
		name, as, token string
		says            []string
		counted         string // code by which the server counts it; "" where it never comes to that
	}{
		{"used", "m1", used, []string{"join of machine m1", "used", "token create"}, "join-token-used"},
		{"expired", "m4", expired, []string{"join of machine m4", "expired", "token create"}, "join-token-expired"},
		{"of another machine", "m5", fresh, []string{"join of machine m5", "another machine"}, "join-token-wrong-machine"},
		{
			"of another server", "m3", writeFile(t, fresh+".pin", strings.Replace(secret, root, strings.Repeat("0", 64), 1)),
			[]string{"connection to the server", "the root key is another", "token"},
			"",
		},
		{
			"made up", "m3", writeFile(t, fresh+".guess", "rj1."+tokenID(t, fresh)+"."+strings.Repeat("A", 43)+"."+root),
			[]string{"join of machine m3", "token create"},
			"join-token-unknown",
		},
		{"cut short", "m3", writeFile(t, fresh+".cut", secret[:20]), []string{"join token", "rj1.<id>.<secret>.<root>", "whole token"}, ""},
		{"none", "m3", "", []string{"has not joined", "token create"}, ""},
	}
	for _, c := range cases {
		before := counter(t, d.server, "fleet_joins_refused", `code="`+c.counted+`"`)
		a := d.machine(t, c.as)
		args := a.args("--machine", c.as)
		if c.token != "" {
			args = append(args, "--join-token-file", c.token)
		}
		r := tryStart(t, args...)
		if r.ready != nil {
			t.Errorf("%s: the agent started", c.name)
			continue
		}
		if r.code() != 1 {
			t.Errorf("%s: exit code %d", c.name, r.code())
		}
		why := plainError(t, r.log.String())
		contains(t, c.name, why, c.says...)
		if c.token != "" {
			for part := range strings.SplitSeq(strings.TrimSpace(readFile(t, c.token)), ".") {
				if len(part) == 43 && strings.Contains(r.log.String(), part) {
					t.Errorf("%s: the log holds the token's secret", c.name)
				}
			}
		}
		if c.counted != "" && counter(t, d.server, "fleet_joins_refused", `code="`+c.counted+`"`) != before+1 {
			t.Errorf("%s: it was not counted as %s", c.name, c.counted)
		}
	}
	// Nobody came in, and what was refused did not use up the token.
	machines := document[[]fleet.Machine](t, d.cli("get", "machines")...)
	if len(machines) != 1 || machines[0].ID != "m1" {
		t.Errorf("machines are %+v, want m1 alone", machines)
	}
	m3 := d.machine(t, "m3")
	m3.start(t, "--machine", "m3", "--join-token-file", fresh)
	m3.connected(t)
	// m1 did not notice any of it.
	m1.connected(t)
}

// plainError is the error that a role ended with: the last line of its standard error.
func plainError(t testing.TB, log string) string {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(log), "\n")
	var doc struct {
		Error string `json:"error"`
		Code  string `json:"code"`
	}
	for _, line := range slices.Backward(lines) {
		if json.Unmarshal([]byte(line), &doc) == nil && doc.Error != "" {
			if doc.Code == "" {
				t.Errorf("the error has no code: %s", line)
			}
			return doc.Error
		}
	}
	t.Errorf("no error was said:\n%s", log)
	return ""
}

func tokenID(t testing.TB, file string) string {
	t.Helper()
	parts := strings.Split(readFile(t, file), ".")
	if len(parts) != 4 {
		t.Fatalf("%s is no token", file)
	}
	return parts[1]
}

// Two agents are never the same machine at once: not with one data directory, not with a copy of it, not by joining again.
func TestSecondAgentOfTheSameMachine(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	m1.connected(t)

	// The same data directory.
	r := tryStart(t, m1.args()...)
	if r.ready != nil || r.code() != 1 {
		t.Error("a second agent started with the same data directory")
	} else {
		contains(t, "same data directory", plainError(t, r.log.String()), m1.data, "another Redoubt process")
	}

	// The same id again, without saying that it replaces.
	refused(t, 1, []string{"m1", "--replace"}, d.cli("token", "create", "--machine", "m1")...)

	// A copy of the credential: whichever came later is in touch, and the server says that there are two.
	copied := d.machine(t, "m1")
	if err := os.Mkdir(copied.data, 0o700); err != nil {
		t.Fatal(err)
	}
	copyFile(t, filepath.Join(m1.data, "agent.pem"), filepath.Join(copied.data, "agent.pem"))
	copied.start(t)
	eventually(t, 30*time.Second, "the server counts the second agent", func() (bool, string) {
		n := counter(t, d.server, "agentapi_sync_superseded")
		return n > 0, fmt.Sprint(n)
	})
	m1.role.says(t, "not connected", "the same machine opened another one", "find the copy")
	if code := copied.role.term(t); code != 0 {
		t.Errorf("the copy ended with %d", code)
	}
	m1.connected(t)

	// A machine made anew takes the id, by a token that says so; the former agent is told, and cut off.
	anew := d.machine(t, "m1")
	anew.start(t, "--machine", "m1", "--join-token-file", d.token(t, "m1", "--replace"))
	anew.connected(t)
	m1.role.says(t, "not connected", "machine m1")
	eventually(t, 30*time.Second, "the former agent is cut off", func() (bool, string) {
		c := m1.doctor(t).Connection
		return !c.Connected && c.Error != "", fmt.Sprintf("%+v", c)
	})
	anew.connected(t)
}
