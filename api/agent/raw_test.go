package agent_test

import (
	"crypto/tls"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

// rawCall makes a call that needs a certificate, with another client than ours, and returns the refusal.
func rawCall(t *testing.T, address string, cert *tls.Certificate) *refusal.Error {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = agentpb.NewAgentClient(conn).SignX509(t.Context(), &agentpb.SignX509Request{Instance: "w-1"})
	s, _ := status.FromError(err)
	for _, d := range s.Details() {
		if r, ok := d.(*agentpb.Refusal); ok {
			if s.Code() != codes.Unauthenticated && s.Code() != codes.PermissionDenied {
				t.Errorf("gRPC code %s of %s", s.Code(), r.GetCode())
			}
			if at := time.UnixMilli(r.GetServerTime()); time.Since(at).Abs() > 3*time.Hour {
				t.Errorf("server time %s", at)
			}
			return &refusal.Error{Kind: refusal.Kind(r.GetKind()), Code: r.GetCode(), What: r.GetWhat(), Why: r.GetWhy(), Do: r.GetDo()}
		}
	}
	t.Fatalf("not refused: %v", err)
	return nil
}

// TestARevokedMachineThatSaysNothingIsPutOutToo: an agent that only listens gives the server no occasion to look again but
// the change itself.
func TestARevokedMachineThatSaysNothingIsPutOutToo(t *testing.T) {
	w := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) { s.Heartbeat = time.Minute })
	dir := t.TempDir()
	if err := w.client(dir, nil).Join(t.Context(), agent.Joining{Token: w.token("m1"), Machine: "m1"}); err != nil {
		t.Fatal(err)
	}
	creds, err := agent.FileCredentials(dir).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{PrivateKey: creds.Key}
	for _, c := range creds.Chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	conn, err := grpc.NewClient("passthrough:///"+w.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}})))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	stub := agentpb.NewAgentClient(conn)
	sync, err := stub.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := sync.Send(&agentpb.SyncRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := sync.Recv(); err != nil { // it is established
		t.Fatal(err)
	}
	push, err := stub.PushEvents(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := push.Send(&agentpb.EventBatch{}); err != nil {
		t.Fatal(err)
	}
	if _, err := push.Recv(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() {
		for {
			if _, err := sync.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() { _, err := push.Recv(); ended <- err }()
	if _, err := w.fleet.RevokeMachine(t.Context(), "m1", "stolen", rec()); err != nil {
		t.Fatal(err)
	}
	limit := time.After(time.Second)
	for range 2 {
		select {
		case err := <-ended:
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("ended with %v", err)
			}
		case <-limit:
			t.Fatal("a stream of a revoked machine lasts longer than a second")
		}
	}
}
