package story_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/machine"
)

// peerCertificate is what a TLS server shows.
func peerCertificate(t testing.TB, addr string) *x509.Certificate {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	state := conn.ConnectionState()
	if state.CurveID != tls.X25519MLKEM768 {
		t.Errorf("%s agreed on %s, want X25519MLKEM768", addr, state.CurveID)
	}
	return state.PeerCertificates[0]
}

// streamOf starts a command whose output is a stream of lines.
func streamOf(t testing.TB, argv ...string) (*exec.Cmd, *bufio.Reader, *transcript) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	said := &transcript{}
	cmd.Env, cmd.Stderr, cmd.Dir = environment(), said, "/"
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := startOn(cmd); err != nil {
		t.Fatal(err)
	}
	cmd.WaitDelay = 3 * time.Second
	t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() })
	return cmd, bufio.NewReader(out), said
}

// SIGTERM drains: streams are told, and the role ends with 0.
func TestSigtermDrains(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	_, stream, said := streamOf(t, append([]string{program.redoubt}, m1.cli("run", "--service", "watcher", "--", program.spiffe, "watch")...)...)
	first, err := stream.ReadString('\n')
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	contains(t, "first update", first, "spiffe://redoubt.local/service/watcher", `"verified":true`)
	following, _, _ := streamOf(t, append([]string{program.redoubt}, d.cli("events", "--follow", "--json")...)...)

	began := time.Now()
	if code := m1.role.term(t); code != 0 {
		t.Errorf("the agent ended with %d", code)
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the agent drained for %s", took)
	}
	// The stream was ended by the server's word, not by a broken connection.
	second, err := stream.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "end of the stream", second, `"kind":"error"`, "Unavailable", "the agent is stopping")

	began = time.Now()
	if code := d.server.term(t); code != 0 {
		t.Errorf("the server ended with %d", code)
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the server drained for %s, with one open stream", took)
	}
	_ = following.Process.Signal(syscall.SIGTERM)

	// Both come back as they were.
	d.start(t)
	m1.start(t)
	m1.connected(t)
	third := ""
	eventually(t, 60*time.Second, "the same client gets its SVID again", func() (bool, string) {
		if third, err = stream.ReadString('\n'); err != nil {
			return false, fmt.Sprint(err)
		}
		return strings.Contains(third, `"kind":"x509"`), third
	})
}

// One command starts everything, says so in one line, and ends cleanly.
func TestDevIsOneCommand(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := t.TempDir()
	r := start(t, "dev", "--data", dir)
	t.Cleanup(func() { _ = os.Remove(filepath.Dir(strings.TrimPrefix(r.text("workload_api"), "unix://"))) })
	for _, key := range []string{"api", "workload_api", "metrics", "data"} {
		if r.text(key) == "" {
			t.Errorf("the ready line has no %s: %v", key, r.ready)
		}
	}
	if r.ready["ready"] != true {
		t.Errorf("the ready line is %v", r.ready)
	}
	got := redoubt(t, "run", "--data", dir, "--service", "web", "--", program.redoubt, "identity", "fetch")
	if got.code != 0 || !strings.Contains(got.out, "spiffe://redoubt.local/service/web") {
		t.Errorf("identity fetch: exit code %d: %s%s", got.code, got.out, got.err)
	}
	// It is the whole machine: what shares the root cgroup with everything else is adopted, and moved out of it.
	socket := strings.TrimPrefix(r.text("workload_api"), "unix://")
	legacy := running(t, &node{socket: socket}, in(t, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "/"))
	if legacy.cgroup != "/" {
		t.Errorf("it begins in %s", legacy.cgroup)
	}
	enrolled := document[machine.Workload](t, "enroll", fmt.Sprint(legacy.pid), "--service", "legacy", "--data", dir)
	if now := cgroupOf(t, legacy.pid); enrolled.Moved != 1 || now != enrolled.Cgroup || now == "/" {
		t.Errorf("enrolled as %+v, and is in %s", enrolled, now)
	}
	if got := legacy.fetch(t); got.ID != "spiffe://redoubt.local/service/legacy" {
		t.Errorf("it is %+v", got)
	}
	legacy.end()
	if code := r.term(t); code != 0 {
		t.Errorf("dev ended with %d", code)
	}
	_ = os.Remove(filepath.Join(unified(t), enrolled.Cgroup)) // it ended while nobody looked, perhaps
	// The same directory serves again, without another token.
	r = start(t, "dev", "--data", dir)
	must(t, "status", "--data", dir)
	if code := r.term(t); code != 0 {
		t.Errorf("dev ended with %d the second time", code)
	}
}
