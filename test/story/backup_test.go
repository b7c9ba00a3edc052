package story_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/policy"
)

// A back-up made while the server runs starts elsewhere as the same authority: agents go on as if nothing had happened.
func TestRestoredServerIsTheSameAuthority(t *testing.T) {
	t.Parallel()
	d := found(t, "authority: {svid_ttl: 10s}")
	version := d.apply(t, shop)
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	before := orders.fetch(t)
	m1.policySet(t, version)
	passphrase := writeFile(t, filepath.Join(d.dir, "passphrase"), "correct horse battery staple\n")
	file := filepath.Join(d.dir, "backup")
	checkpoint := writeFile(t, filepath.Join(d.dir, "checkpoint"), must(t, d.cli("audit", "checkpoint")...))

	must(t, d.cli("backup", "--to", file, "--passphrase-file", passphrase)...)
	refused(t, 1, []string{"does not exist yet"}, d.cli("backup", "--to", file, "--passphrase-file", passphrase)...)
	raw := readFile(t, file)
	for _, plain := range []string{"SQLite format", "orders-to-payments", "m1", readFile(t, filepath.Join(d.serverData(), "kek"))} {
		if strings.Contains(raw, plain) && len(plain) > 4 {
			t.Errorf("the back-up is not encrypted: it holds %q", plain)
		}
	}
	d.server.kill()
	if err := os.Rename(d.serverData(), d.serverData()+".lost"); err != nil {
		t.Fatal(err)
	}

	wrong := writeFile(t, filepath.Join(d.dir, "wrong"), "wrong\n")
	refused(t, 1, []string{"passphrase"}, d.cli("restore", "--from", file, "--passphrase-file", wrong)...)
	damaged := writeFile(t, file+".damaged", raw[:len(raw)-100]+strings.Repeat("x", 100))
	if r := redoubt(t, d.cli("restore", "--from", damaged, "--passphrase-file", passphrase)...); r.code != 1 {
		t.Errorf("a damaged back-up was restored: exit code %d", r.code)
	}
	if _, err := os.Stat(filepath.Join(d.serverData(), "redoubt.db")); err == nil {
		t.Fatal("a refused restore left a database")
	}
	contains(t, "restore", must(t, d.cli("restore", "--from", file, "--passphrase-file", passphrase)...), "restored", "verifies")
	refused(t, 1, []string{"empty"}, d.cli("restore", "--from", file, "--passphrase-file", passphrase)...)
	d.start(t)

	m1.connected(t)
	eventually(t, 60*time.Second, "the agent renews with the restored authority", func() (bool, string) {
		got, why := orders.tryFetch(t)
		return why == "" && got.Serial != before.Serial && got.ID == before.ID, why
	})
	if got := m1.askLocal(t, "orders", "payments"); got.Verdict != policy.Permit || got.Edition != version {
		t.Errorf("after the restore: %s by set %d", got.Verdict, got.Edition)
	}
	m2 := d.join(t, "m2")
	m2.shell(t, "payments").fetch(t)
	// The restored log is the old one, grown.
	eventually(t, 30*time.Second, "the audit log verifies against a checkpoint from before", func() (bool, string) {
		r := redoubt(t, d.cli("audit", "verify", "--since", checkpoint)...)
		return r.code == 0 && strings.Contains(r.out, "nothing found"), r.out + r.err
	})
}
