//go:build linux

package workload_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity/workload"
)

// spiffeClient builds test/spiffeclient, the official client, once.
var spiffeClient = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		return "", err
	}
	builtClient = dir
	path := filepath.Join(dir, "spiffeclient")
	out, err := exec.Command("go", "build", "-o", path, "github.com/redoubtsec/redoubt/test/spiffeclient").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

// builtClient is the directory that TestMain removes.
var builtClient string

// spiffeLine is what it prints.
type spiffeLine struct {
	Kind  string
	SVIDs []struct {
		ID, Hint, Serial string
		Chain            int
	}
	X509Bundles map[string]int `json:"x509_bundles"`
	JWTBundles  map[string]int `json:"jwt_bundles"`
	ID, Token   string
	Audience    []string
	Verified    bool
	Code        string
	Message     string
}

func spiffeCommand(t *testing.T, socket string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := spiffeClient()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+socket)
	return cmd
}

func spiffe(t *testing.T, socket, stdin string, args ...string) spiffeLine {
	t.Helper()
	cmd := spiffeCommand(t, socket, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	var l spiffeLine
	if jerr := json.Unmarshal(out, &l); jerr != nil {
		t.Fatalf("spiffeclient %v: %v, %q", args, err, out)
	}
	return l
}

func TestTheOfficialClientWorksUnmodified(t *testing.T) {
	b := newBoard(t)
	e := serve(t, workload.Config{Source: b})
	if got := spiffe(t, e.socket, "", "x509"); got.Code != "PermissionDenied" || !strings.HasSuffix(got.Message, "no issuance rule matches it; see redoubt identity explain") {
		t.Errorf("without an identity: %+v", got)
	}
	b.grant(ownCgroup(t), serviceID(t, "orders"))

	x := spiffe(t, e.socket, "", "x509")
	if len(x.SVIDs) != 1 || x.SVIDs[0].ID != "spiffe://example.test/service/orders" || !x.Verified || x.X509Bundles["spiffe://example.test"] != 1 {
		t.Errorf("x509: %+v", x)
	}
	if got := spiffe(t, e.socket, "", "bundles"); got.X509Bundles["spiffe://example.test"] != 1 || got.JWTBundles["spiffe://example.test"] != 1 {
		t.Errorf("bundles: %+v", got)
	}
	jwt := spiffe(t, e.socket, "", "jwt", "-audience", "db", "-subject", "spiffe://example.test/service/orders")
	if jwt.ID != "spiffe://example.test/service/orders" || !jwt.Verified || jwt.Message != "" {
		t.Errorf("jwt: %s verified %v: %s", jwt.ID, jwt.Verified, jwt.Message)
	}
	if got := spiffe(t, e.socket, jwt.Token, "validate", "-audience", "db"); got.Kind != "validated" || got.ID != jwt.ID {
		t.Errorf("validate: %+v", got)
	}
	if got := spiffe(t, e.socket, jwt.Token, "validate", "-audience", "web"); got.Code != "InvalidArgument" {
		t.Errorf("validate for another audience: %+v", got)
	}
	if got := spiffe(t, e.socket, "", "jwt", "-audience", "db", "-subject", "spiffe://example.test/service/payments"); got.Code != "PermissionDenied" {
		t.Errorf("jwt of another: %+v", got)
	}
}

func TestTheOfficialClientFollowsRotation(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	cmd := spiffeCommand(t, e.socket, "watch")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	lines := json.NewDecoder(out)
	serials := map[string]bool{}
	for range 4 {
		var l spiffeLine
		if err := lines.Decode(&l); err != nil {
			t.Fatal(err)
		}
		if len(l.SVIDs) != 1 || !l.Verified || serials[l.SVIDs[0].Serial] {
			t.Fatalf("got %+v, want a new SVID", l)
		}
		serials[l.SVIDs[0].Serial] = true
		b.rotate()
	}
}

// written has the official client write an SVID as files.
func written(t *testing.T, socket string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if got := spiffe(t, socket, "", "x509", "-write", dir); got.Kind != "x509" {
		t.Fatalf("%+v", got)
	}
	return dir
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

func TestOpenSSLVerifiesTheChain(t *testing.T) {
	needs(t, "openssl")
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	dir := written(t, e.socket)
	verify := func(bundle string) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", "sslclient",
			"-CAfile", bundle, "-untrusted", "svid.pem", "svid.pem")
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	if out, err := verify("bundle.pem"); err != nil || !bytes.Contains(out, []byte("svid.pem: OK")) {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	other := newBoard(t)
	other.grant(ownCgroup(t), serviceID(t, "orders"))
	stranger := written(t, serve(t, workload.Config{Source: other}).socket)
	if out, err := verify(filepath.Join(stranger, "bundle.pem")); err == nil {
		t.Errorf("openssl verify accepts the chain with another authority's bundle\n%s", out)
	}
}

// Two holders of SVIDs authenticate each other with nothing but OpenSSL and curl.
func TestMutualTLSBetweenSVIDHolders(t *testing.T) {
	needs(t, "openssl", "curl")
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	dir := written(t, serve(t, workload.Config{Source: b}).socket)
	other := newBoard(t)
	other.grant(ownCgroup(t), serviceID(t, "orders"))
	stranger := written(t, serve(t, workload.Config{Source: other}).socket)

	port := freePort(t)
	server := exec.CommandContext(t.Context(), "openssl", "s_server", "-accept", "127.0.0.1:"+port, "-www", "-quiet", "-tls1_3",
		"-cert", "svid.pem", "-cert_chain", "svid.pem", "-key", "key.pem", "-CAfile", "bundle.pem", "-Verify", "3", "-verify_return_error")
	server.Dir = dir
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Process.Kill(); _ = server.Wait() }()
	for range 200 {
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			_ = c.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}

	s := exec.CommandContext(t.Context(), "openssl", "s_client", "-connect", "127.0.0.1:"+port, "-CAfile", "bundle.pem", "-verify_return_error",
		"-cert", "svid.pem", "-cert_chain", "svid.pem", "-key", "key.pem")
	s.Dir = dir
	s.Stdin = strings.NewReader("GET / HTTP/1.0\r\n\r\n")
	if out, err := s.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("Verify return code: 0 (ok)")) {
		t.Errorf("openssl s_client: %v\n%s", err, out)
	}
	// curl checks host names, which an X509-SVID has none of: it verifies the server by its key instead.
	pin := exec.CommandContext(t.Context(), "sh", "-c", "openssl x509 -in svid.pem -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | openssl base64")
	pin.Dir = dir
	hash, err := pin.Output()
	if err != nil {
		t.Fatal(err)
	}
	curl := func(holder string) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), "curl", "-sS", "--max-time", "5", "--insecure", "--pinnedpubkey", "sha256//"+strings.TrimSpace(string(hash)),
			"--cert", "svid.pem", "--key", "key.pem", "https://127.0.0.1:"+port+"/")
		cmd.Dir = holder
		return cmd.CombinedOutput()
	}
	if out, err := curl(dir); err != nil || !bytes.Contains(out, []byte("s_server")) {
		t.Errorf("curl with an SVID: %v\n%s", err, out)
	}
	if out, err := curl(stranger); err == nil {
		t.Errorf("curl with an SVID of another authority was let in\n%s", out)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// The generated code is what its source makes: whoever changes one commits the other.
func TestGeneratedCodeMatchesItsSource(t *testing.T) {
	needs(t, "protoc")
	version, err := exec.Command("protoc", "--version").Output()
	if err != nil || !strings.Contains(string(version), " 3.21.") {
		t.Skipf("the committed code was made by protoc 3.21, here is %s", version)
	}
	before := readAll(t, "gen")
	dir := t.TempDir()
	for _, name := range []string{"workload.proto", "include/google/protobuf/struct.proto", "doc.go", "gen/x"} {
		text := readFile(name)
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_ = os.Remove(filepath.Join(dir, "gen/x"))
	_, command, _ := strings.Cut(string(readFile("doc.go")), "//go:generate sh -c ")
	command = strings.Trim(strings.TrimSpace(command), `"`)
	command = strings.ReplaceAll(command, "$(go tool", "$(go -C "+mustGetwd(t)+" tool")
	cmd := exec.CommandContext(t.Context(), "sh", "-c", command)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if after := readAll(t, filepath.Join(dir, "gen")); before != after {
		t.Error("gen differs from what go generate makes of workload.proto: run go generate ./identity/workload and commit")
	}
}

func readFile(path string) []byte {
	text, _ := os.ReadFile(path)
	return text
}

func mustGetwd(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func readAll(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no generated code in %s", dir)
	}
	var all strings.Builder
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(&all, "== %s\n", filepath.Base(name))
		_, _ = io.Copy(&all, f)
		_ = f.Close()
	}
	return all.String()
}
