package story_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/fleet"
)

// A full disk refuses what would have to be written, in words, and loses nothing that was acknowledged. Agents that run go on.
func TestFullDiskRefusesAndLosesNothing(t *testing.T) {
	t.Parallel()
	d := prepare(t)
	if err := os.Mkdir(d.serverData(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("story", d.serverData(), "tmpfs", 0, "size=24m,mode=0700"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(d.serverData(), unix.MNT_DETACH) })
	t.Cleanup(func() { d.server.kill() })
	d.start(t)
	version := d.apply(t, shop)
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	before := orders.fetch(t)
	m1.policySet(t, version)

	filler := filepath.Join(d.serverData(), "filler")
	fill(t, filler)
	var acknowledged []string
	full := ""
	for i := range 400 {
		r := redoubt(t, d.cli("token", "create", "--machine", fmt.Sprintf("x%d", i), "--json")...)
		if r.code != 0 {
			full = r.err
			break
		}
		acknowledged = append(acknowledged, fmt.Sprintf("x%d", i))
		fill(t, filler) // whatever was freed or is left
	}
	contains(t, "a write on a full disk", full, "disk", "space")
	if strings.Contains(full, "no such table") || strings.Contains(full, "SQLITE") {
		t.Errorf("internals are shown: %s", full)
	}
	// What only reads goes on, and so do workloads and decisions.
	must(t, d.cli("get", "editions")...)
	if got := orders.fetch(t); got.ID != before.ID {
		t.Errorf("on a full disk the workload holds %+v", got)
	}
	if got := m1.askLocal(t, "orders", "payments"); !got.Allowed() || got.Edition != version {
		t.Errorf("on a full disk: %s by set %d", got.Verdict, got.Edition)
	}
	if !d.server.running() {
		t.Fatal("the server ended on a full disk")
	}

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "a write after space was freed", func() (bool, string) {
		r := redoubt(t, d.cli("token", "create", "--machine", "after")...)
		return r.code == 0, r.err
	})
	check := func(when string) {
		t.Helper()
		have := map[string]int{}
		for _, token := range document[[]fleet.JoinToken](t, d.cli("get", "tokens")...) {
			have[token.Machine]++
		}
		for _, name := range acknowledged {
			if have[name] != 1 {
				t.Errorf("%s: token for %s was acknowledged, and there are %d", when, name, have[name])
			}
		}
	}
	check("after the disk was full")
	m1.connected(t)
	d.server.kill() // what was acknowledged is on the disk
	d.start(t)
	check("after a restart")
	eventually(t, 30*time.Second, "the audit log verifies, with everything in it", func() (bool, string) {
		r := redoubt(t, d.cli("audit", "verify")...)
		return r.code == 0 && strings.Contains(r.out, "nothing found"), r.out + r.err
	})
	log := d.auditLog(t)
	for _, name := range acknowledged {
		if !strings.Contains(log, `"`+name+`"`) {
			t.Errorf("token for %s was acknowledged, and is not in the audit log", name)
		}
	}
}

// fill writes until nothing fits any more.
func fill(t testing.TB, name string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			return
		}
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for size := 1 << 20; size >= 1; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
