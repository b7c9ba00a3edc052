package story_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/api/agent/agentpb"
)

// inCgroup runs `redoubt identity fetch` in a cgroup that we choose, as root of the machine could, and as a user.
func inCgroup(t testing.TB, a *node, cgroup string, uid uint32) (fetched, string) {
	t.Helper()
	root := unified(t)
	dir, err := os.Open(filepath.Join(root, cgroup))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	cmd := exec.Command(program.redoubt, "identity", "fetch", "--json")
	cmd.Dir, cmd.Env = "/", environment("SPIFFE_ENDPOINT_SOCKET=unix://"+a.socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Credential: &syscall.Credential{Uid: uid, Gid: uid},
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	var list []fetched
	if json.Unmarshal(out.Bytes(), &list) != nil || len(list) != 1 {
		return fetched{}, out.String() + errs.String()
	}
	return list[0], ""
}

// A local process gets nobody's identity but that of the workload that the kernel says it belongs to: not by asking for
// another's name, not by another's user id, parent, or the likeness of a cgroup's name.
func TestImpostorGetsNobodysIdentity(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	orders, web := m1.shell(t, "orders"), m1.shell(t, "web")
	orders.fetch(t)
	own := web.fetch(t)
	root := unified(t)

	t.Run("by name", func(t *testing.T) {
		before := counter(t, m1.role, "workloadapi_impostor")
		out, code := web.sh(t, program.spiffe+" jwt -audience bank -subject spiffe://redoubt.local/service/orders")
		contains(t, "go-spiffe", out, "PermissionDenied", "spiffe://redoubt.local/service/orders", "this workload is spiffe://redoubt.local/service/web")
		if code == 0 || strings.Contains(out, `"token"`) {
			t.Error("another's JWT-SVID was given")
		}
		out, code = web.sh(t, program.redoubt+" identity token --audience bank --spiffe-id spiffe://redoubt.local/service/orders")
		if code != 1 || strings.Contains(out, "eyJ") {
			t.Errorf("exit code %d: %s", code, out)
		}
		if n := counter(t, m1.role, "workloadapi_impostor") - before; n != 2 {
			t.Errorf("%v attempts were counted", n)
		}
		// Its own it may name.
		if out, code := web.sh(t, program.spiffe+" jwt -audience bank -subject "+own.ID); code != 0 || !strings.Contains(out, `"verified":true`) {
			t.Errorf("its own identity was refused: %s", out)
		}
	})
	t.Run("by cgroup", func(t *testing.T) {
		like := orders.cgroup + "x"
		nested := filepath.Join(orders.cgroup, "inner")
		for _, c := range []string{like, nested} {
			if err := os.Mkdir(filepath.Join(root, c), 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(filepath.Join(root, c)) })
		}
		uid := uidOf(t, orders.pid)
		before := counter(t, m1.role, "workloadapi_no_identity")
		for what, cgroup := range map[string]string{
			"a process of none, with the user of orders": "/", "a cgroup whose name begins with that of orders": like,
			"the parent of the cgroup of orders": filepath.Dir(orders.cgroup),
		} {
			got, why := inCgroup(t, m1, cgroup, uid)
			if why == "" {
				t.Errorf("%s got %+v", what, got)
			}
			contains(t, what, why, "it belongs to no workload", "redoubt run", "redoubt enroll")
		}
		if n := counter(t, m1.role, "workloadapi_no_identity") - before; n < 3 {
			t.Errorf("%v attempts were counted", n)
		}
		// What counts is the cgroup alone: a part of orders is orders, whoever started it.
		if got, why := inCgroup(t, m1, nested, 65534); got.ID != "spiffe://redoubt.local/service/orders" {
			t.Errorf("a process in a cgroup below that of orders got %+v %s", got, why)
		}
	})
	t.Run("by moving", func(t *testing.T) {
		procs := filepath.Join(root, orders.cgroup, "cgroup.procs")
		if out, code := web.sh(t, "echo 0 > "+procs); code == 0 {
			t.Errorf("a workload moved itself into the cgroup of another: %s", out)
		}
		// The same with a hierarchy mounted by itself, and through a namespace in which it is root.
		_, _ = web.sh(t, "unshare -Urm sh -c 'mount -t cgroup2 none /mnt && echo 0 > /mnt"+orders.cgroup+"/cgroup.procs'")
		if now := cgroupOf(t, web.pid); now != web.cgroup {
			t.Errorf("it is in %s now", now)
		}
		if got := web.fetch(t); got.ID != own.ID {
			t.Errorf("it is %s now", got.ID)
		}
	})
	t.Run("by the agent's own socket", func(t *testing.T) {
		out, code := web.sh(t, program.redoubt+" --data "+m1.data+" run --service orders -- true")
		if code == 0 {
			t.Errorf("a workload used the agent's socket: %s", out)
		}
	})
}

func uidOf(t testing.TB, pid int) uint32 {
	t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid
}

// Whoever steals an agent's credential gets no identity of another machine's workloads; the attempt is refused, counted, told
// and recorded.
func TestStolenAgentGetsNothingOfAnotherMachine(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1, m2 := d.join(t, "m1"), d.join(t, "m2")
	here, there := m1.shell(t, "orders"), m2.shell(t, "payments")
	here.fetch(t)
	there.fetch(t)

	creds, err := agent.FileCredentials(m1.data).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{PrivateKey: creds.Key}
	for _, c := range creds.Chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	conn, err := grpc.NewClient("passthrough:///"+d.server.text("agents"), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert},
	})))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	thief := agentpb.NewAgentClient(conn)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	// The credential is good: for m1's own workload it is answered.
	if _, err := thief.SignX509(t.Context(), &agentpb.SignX509Request{Instance: here.instance, Csr: csr}); err != nil {
		t.Fatalf("m1's own workload: %v", err)
	}
	_, x509Err := thief.SignX509(t.Context(), &agentpb.SignX509Request{Instance: there.instance, Csr: csr})
	_, jwtErr := thief.SignJWT(t.Context(), &agentpb.SignJWTRequest{Instance: there.instance, Audience: []string{"bank"}})
	for what, err := range map[string]error{"X.509-SVID": x509Err, "JWT-SVID": jwtErr} {
		s, _ := status.FromError(err)
		if s.Code() != codes.PermissionDenied {
			t.Errorf("%s of another machine's workload: %v", what, err)
		}
		contains(t, what, s.Message(), there.instance, "belongs to another machine", "recorded")
	}
	if n := counter(t, d.server, "fleet_foreign_workload"); n != 2 {
		t.Errorf("%v attempts were counted", n)
	}
	eventually(t, 20*time.Second, "the audit record", func() (bool, string) {
		log := d.auditLog(t)
		return strings.Contains(log, `"workload.foreign"`) && strings.Contains(log, there.instance), last(log, 500)
	})
	contains(t, "events", must(t, d.cli("events", "--kind", "workload.foreign", "--json")...), there.instance, "m1", "m2")
}
