package story_test

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity/ca"
)

// svid is what a workload holds: its chain, and the roots to verify others with.
type svid struct {
	chain, roots []*x509.Certificate
}

// hold lets a workload write its SVID to files and reads them.
func (w *workload) hold(t testing.TB) svid {
	t.Helper()
	out, code := w.sh(t, "d=$(mktemp -d) && cd $d && "+program.redoubt+" identity fetch --write . >/dev/null && cat svid.pem && echo BUNDLE && cat bundle.pem; cd /; rm -rf $d")
	if code != 0 {
		t.Fatalf("no SVID was written: %s", out)
	}
	chain, roots, _ := strings.Cut(out, "BUNDLE")
	return svid{certificates(t, chain), certificates(t, roots)}
}

func certificates(t testing.TB, text string) (out []*x509.Certificate) {
	t.Helper()
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, cert)
	}
}

// verifies checks one's chain with another's roots, at a time in its life.
func verifies(t testing.TB, what string, of, with svid) {
	t.Helper()
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range with.roots {
		roots.AddCert(c)
	}
	for _, c := range of.chain[1:] {
		intermediates.AddCert(c)
	}
	at := of.chain[0].NotAfter.Add(-time.Second)
	if _, err := of.chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// The authority's keys are rotated by hand under running workloads: what they hold verifies before, during and after, and
// they hold what the new keys signed without being restarted.
func TestRotationUnderRunningWorkloads(t *testing.T) {
	t.Parallel()
	d := found(t, "authority: {svid_ttl: 8s, jwt_ttl: 5s, refresh_hint: 1s}")
	m1, m2 := d.join(t, "m1"), d.join(t, "m2")
	orders, payments := m1.shell(t, "orders"), m2.shell(t, "payments")
	_, stream, _ := streamOf(t, append([]string{program.redoubt}, m1.cli("run", "--service", "watcher", "--", program.spiffe, "watch")...)...)
	// Everything that go-spiffe was pushed meanwhile, it verified.
	pushed := make(chan string, 1000)
	go func() {
		defer close(pushed)
		for {
			line, err := stream.ReadString('\n')
			if err != nil {
				return
			}
			select {
			case pushed <- line:
			default:
			}
		}
	}()
	before := orders.hold(t)
	verifies(t, "before, by another machine", before, payments.hold(t))
	token := func() string {
		t.Helper()
		out, code := orders.sh(t, program.redoubt+" identity token --audience bank")
		if code != 0 {
			t.Fatalf("no JWT-SVID: %s", out)
		}
		return out
	}
	validate := func(token string) (string, int) {
		t.Helper()
		return payments.sh(t, "echo "+token+" | "+program.spiffe+" validate -audience bank")
	}
	if out, code := validate(token()); code != 0 {
		t.Fatalf("before: %s", out)
	}

	refused(t, 1, []string{"no keys are published", "prepare"}, d.cli("authority", "activate")...)
	must(t, d.cli("authority", "prepare")...)
	verifies(t, "prepared", orders.hold(t), payments.hold(t))
	must(t, d.cli("authority", "publish")...)
	verifies(t, "published", orders.hold(t), payments.hold(t))
	eventually(t, 20*time.Second, "activate, once it is time", func() (bool, string) {
		r := redoubt(t, d.cli("authority", "activate")...)
		if r.code != 0 && !strings.Contains(r.err, "too early") {
			t.Fatalf("activate: %s", r.err)
		}
		return r.code == 0, r.err
	})
	old := before.chain[1]
	var after svid
	eventually(t, 60*time.Second, "orders holds what the new key signed", func() (bool, string) {
		after = orders.hold(t)
		verifies(t, "while it changes", after, payments.hold(t))
		return !after.chain[1].Equal(old), after.chain[1].SerialNumber.String()
	})
	verifies(t, "old SVID, new bundle", before, payments.hold(t))
	verifies(t, "new SVID, old bundle", after, before)
	if out, code := validate(token()); code != 0 {
		t.Errorf("a token of the new key: %s", out)
	}

	refused(t, 1, []string{"too early until", "the old JWT key signed is valid until then"}, d.cli("authority", "retire")...)
	// What it must wait for passes at once for a server whose clock is 50 s on.
	d.server.kill()
	d.server = tryStartWith(t, withClock(t, 50*time.Second), "server", "--config", d.config, "--data", d.serverData())
	if d.server.ready == nil {
		t.Fatalf("the server did not start: %s", &d.server.log)
	}
	eventually(t, 30*time.Second, "the old keys are retired", func() (bool, string) {
		states := map[ca.State]int{}
		for _, k := range document[ca.Status](t, d.cli("authority", "status")...).Keys {
			states[k.State]++
		}
		return states[ca.Active] > 0 && states[ca.Retired] > 0 && states[ca.Superseded]+states[ca.Published]+states[ca.Prepared] == 0, fmt.Sprint(states)
	})
	m1.connected(t)
	m2.connected(t)
	eventually(t, 60*time.Second, "retired: new SVIDs", func() (bool, string) {
		got, why := orders.tryFetch(t)
		return why == "" && got.Serial != after.chain[0].SerialNumber.Text(16), why
	})
	verifies(t, "retired", orders.hold(t), payments.hold(t))
	verifies(t, "old SVID, last bundle", before, payments.hold(t))

	serials := map[string]bool{}
	for {
		select {
		case line := <-pushed:
			var l struct {
				Kind     string
				Verified bool
				Message  string
				SVIDs    []struct{ Serial string }
			}
			if json.Unmarshal([]byte(line), &l) != nil || l.Kind != "x509" || !l.Verified || len(l.SVIDs) != 1 {
				t.Errorf("go-spiffe was pushed: %s", line)
				continue
			}
			serials[l.SVIDs[0].Serial] = true
			continue
		default:
		}
		break
	}
	if len(serials) < 2 {
		t.Errorf("go-spiffe saw %d SVIDs, want some", len(serials))
	}
	contains(t, "the audit log", d.auditLog(t), "authority.activate", fmt.Sprintf("%q", "active"))
}
