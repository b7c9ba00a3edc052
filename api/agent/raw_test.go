package agent_test

import (
	"crypto/tls"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
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
