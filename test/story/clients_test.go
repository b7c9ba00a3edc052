package story_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What Redoubt issues is used by programs that know nothing of it: the official go-spiffe client, OpenSSL, and curl.
func TestIndependentClients(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	orders, payments := m1.shell(t, "orders"), m1.shell(t, "payments")

	t.Run("go-spiffe", func(t *testing.T) {
		for _, c := range []struct {
			args string
			says []string
		}{
			{"x509", []string{`"verified":true`, `"id":"spiffe://redoubt.local/service/orders"`, `"chain":2`}},
			{"bundles", []string{`"x509_bundles":{"spiffe://redoubt.local":1}`, `"jwt_bundles":{"spiffe://redoubt.local":1}`}},
			{"jwt -audience bank", []string{`"verified":true`, `"audience":["bank"]`}},
		} {
			out, code := orders.sh(t, program.spiffe+" "+c.args)
			if code != 0 {
				t.Errorf("%s: exit code %d: %s", c.args, code, out)
			}
			contains(t, c.args, out, c.says...)
		}
		token, _ := orders.sh(t, program.redoubt+" identity token --audience bank")
		if out, code := payments.sh(t, "echo "+token+" | "+program.spiffe+" validate -audience bank"); code != 0 || !strings.Contains(out, "service/orders") {
			t.Errorf("validate: %s", out)
		}
		if out, code := payments.sh(t, "echo "+token+" | "+program.spiffe+" validate -audience other"); code == 0 {
			t.Errorf("a token for another audience was accepted: %s", out)
		}
	})

	openssl := tool(t, "openssl")
	// Each workload writes its SVID into a directory of its own.
	dirs := map[*workload]string{}
	for _, w := range []*workload{orders, payments} {
		dir := filepath.Join(d.dir, w.instance)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, int(uidOf(t, w.pid)), -1); err != nil {
			t.Fatal(err)
		}
		if out, code := w.sh(t, program.redoubt+" identity fetch --write "+dir); code != 0 {
			t.Fatal(out)
		}
		if info, err := os.Stat(filepath.Join(dir, "svid.key")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the key's file: %v %v", info.Mode(), err)
		}
		dirs[w] = dir
	}
	t.Run("openssl verify", func(t *testing.T) {
		in := func(name string) string { return filepath.Join(dirs[orders], name) }
		r := command(t, nil, "", openssl, "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", in("bundle.pem"), "-untrusted", in("svid.pem"), in("svid.pem"))
		if r.code != 0 || !strings.Contains(r.out, "OK") {
			t.Errorf("OpenSSL: %s%s", r.out, r.err)
		}
		stranger := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"), strangeCA(t))
		if r := command(t, nil, "", openssl, "verify", "-CAfile", stranger, "-untrusted", in("svid.pem"), in("svid.pem")); r.code == 0 {
			t.Error("OpenSSL verifies with any root")
		}
		text := command(t, nil, "", openssl, "x509", "-in", in("svid.pem"), "-noout", "-ext", "subjectAltName,basicConstraints,keyUsage").out
		contains(t, "the certificate", text, "URI:spiffe://redoubt.local/service/orders", "CA:FALSE", "Digital Signature")
	})
	t.Run("curl to openssl s_server", func(t *testing.T) {
		tool(t, "curl")
		port := fmt.Sprintf("%s:%d", d.ip, 19443)
		in := func(w *workload, name string) string { return filepath.Join(dirs[w], name) }
		cmd, out, said := streamOf(t, openssl, "s_server", "-accept", port, "-tls1_3", "-www", "-Verify", "3", "-verify_return_error",
			"-cert", in(payments, "svid.pem"), "-cert_chain", in(payments, "svid.pem"), "-key", in(payments, "svid.key"), "-CAfile", in(payments, "bundle.pem"))
		_ = cmd
		for {
			line, err := out.ReadString('\n')
			if err != nil {
				t.Fatalf("s_server: %v %s", err, said)
			}
			if strings.Contains(line, "ACCEPT") {
				break
			}
		}
		go func() {
			for {
				if _, err := out.ReadString('\n'); err != nil {
					return
				}
			}
		}()
		// SPIFFE IDs are no DNS names: the name is not what curl may check, the chain is.
		curl := func(w *workload, roots string) result {
			t.Helper()
			return command(t, nil, "", openssl, "s_client", "-connect", port, "-brief", "-verify_return_error",
				"-cert", in(w, "svid.pem"), "-cert_chain", in(w, "svid.pem"), "-key", in(w, "svid.key"), "-CAfile", roots)
		}
		if r := curl(orders, in(orders, "bundle.pem")); r.code != 0 || !strings.Contains(r.err+r.out, "Verification: OK") {
			t.Errorf("s_client: exit code %d %s%s", r.code, r.out, r.err)
		}
		r := command(t, nil, "", "curl", "-sS", "--insecure", "--tlsv1.3", "--cert", in(orders, "svid.pem"), "--key", in(orders, "svid.key"), "https://"+port+"/")
		if r.code != 0 {
			t.Errorf("curl: exit code %d %s", r.code, r.err)
		}
		contains(t, "curl's page", r.out, "spiffe://redoubt.local/service/orders")
		if r := command(t, nil, "", "curl", "-sS", "--insecure", "https://"+port+"/"); r.code == 0 {
			t.Error("curl without an SVID was served")
		}
	})
}

// strangeCA is a root of somebody else's.
func strangeCA(t testing.TB) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stranger"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
