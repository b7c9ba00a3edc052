//go:build linux

package workload_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestX509SVIDIsPushedInFullWheneverItChanges(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"), serviceID(t, "legacy"))
	b.foreign = []*identity.Bundle{foreignBundle(t, "partner.test")}
	b.hint = "internal"
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Svids) != 2 || first.Svids[0].SpiffeId != "spiffe://example.test/service/orders" {
		t.Fatalf("got %d SVIDs, first %s; want two in the order of the source", len(first.Svids), first.Svids[0].GetSpiffeId())
	}
	if got := []string{first.Svids[0].Hint, first.Svids[1].Hint}; !cmp.Equal(got, []string{"internal", ""}) {
		t.Errorf("hints %q are not unique", got)
	}
	chain, err := x509.ParseCertificates(first.Svids[0].X509Svid)
	if err != nil || len(chain) < 2 {
		t.Fatalf("chain of %d, %v", len(chain), err)
	}
	if id, err := identity.IDFromCertificate(chain[0]); err != nil || id != serviceID(t, "orders") {
		t.Errorf("leaf is of %v, %v", id, err)
	}
	if _, err := x509.ParsePKCS8PrivateKey(first.Svids[0].X509SvidKey); err != nil {
		t.Error(err)
	}
	if roots, err := x509.ParseCertificates(first.Svids[0].Bundle); err != nil || !roots[0].Equal(b.authority.Bundle().X509Authorities[0]) {
		t.Errorf("bundle: %v", err)
	}
	if _, ok := first.FederatedBundles["spiffe://partner.test"]; !ok || len(first.FederatedBundles) != 1 {
		t.Errorf("federated bundles %v, want the partner's alone", first.FederatedBundles)
	}

	b.rotate()
	second, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(second.Svids) != 2 || bytes.Equal(second.Svids[1].X509Svid, first.Svids[1].X509Svid) || len(second.FederatedBundles) != 1 {
		t.Error("the second push is not the full, new state")
	}

	b.grant(ownCgroup(t)) // nothing any more
	_, err = stream.Recv()
	wantStatus(t, err, codes.PermissionDenied, "no issuance rule matches it")
}

func TestNothingIsPushedWhenNothingChanged(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	client, ctx := dial(t, e.socket)
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // changes elsewhere
		before := b.fetched()
		b.grant("/somewhere/else", serviceID(t, strings.Repeat("x", i+1)))
		for range 200 {
			if b.fetched() > before {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	if b.fetched() < 4 {
		t.Fatalf("the source was asked %d times, want after every change", b.fetched())
	}
	if got := e.meter.get("workloadapi_messages method FetchX509SVID"); got != 1 {
		t.Errorf("%d messages were pushed, want 1", got)
	}
}

func TestABurstOfChangesIsPushedSeldom(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	const changes = 50
	for range changes {
		b.rotate()
		time.Sleep(2 * time.Millisecond)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if n := b.fetched(); n > changes/4 {
		t.Errorf("the source was asked %d times for a burst of %d changes", n, changes)
	}
}

func TestBundlesAreStreamed(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	xs, err := client.FetchX509Bundles(ctx, &gen.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	js, err := client.FetchJWTBundles(ctx, &gen.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{{"spiffe://example.test"}, {"spiffe://example.test", "spiffe://partner.test"}} {
		x, err := xs.Recv()
		if err != nil {
			t.Fatal(err)
		}
		j, err := js.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(x.Bundles) != len(want) || len(j.Bundles) != len(want) {
			t.Errorf("got %d X.509 and %d JWT bundles, want %d", len(x.Bundles), len(j.Bundles), len(want))
		}
		var set struct {
			Keys []map[string]any `json:"keys"`
		}
		if err := json.Unmarshal(j.Bundles["spiffe://example.test"], &set); err != nil || len(set.Keys) != 1 {
			t.Fatalf("JWK set: %v, %d keys", err, len(set.Keys))
		}
		if _, private := set.Keys[0]["d"]; private || set.Keys[0]["kid"] == "" {
			t.Errorf("JWK %v", set.Keys[0])
		}
		b.change(func() { b.foreign = []*identity.Bundle{foreignBundle(t, "partner.test")} })
	}
}

func foreignBundle(t testing.TB, td identity.TrustDomain) *identity.Bundle {
	t.Helper()
	other := newBoard(t).authority.Bundle()
	return &identity.Bundle{TrustDomain: td, X509Authorities: other.X509Authorities, JWTAuthorities: other.JWTAuthorities}
}

func TestTheFullRefusalArrives(t *testing.T) {
	b := newBoard(t)
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	want := "identity of the caller in " + ownCgroup(t) + ": no issuance rule matches it; see redoubt identity explain"

	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != want {
		t.Errorf("X.509: %s %q, want PermissionDenied %q", st.Code(), st.Message(), want)
	}
	_, err = client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}})
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != want {
		t.Errorf("JWT: %s %q, want PermissionDenied %q", st.Code(), st.Message(), want)
	}
}

func TestEveryKindOfRefusalHasACode(t *testing.T) {
	b := newBoard(t)
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	for kind, code := range map[refusal.Kind]codes.Code{
		refusal.Invalid: codes.InvalidArgument, refusal.Unknown: codes.NotFound, refusal.Conflict: codes.Aborted,
		refusal.Unproven: codes.PermissionDenied, refusal.Denied: codes.PermissionDenied,
		refusal.Exhausted: codes.ResourceExhausted, refusal.Unavailable: codes.Unavailable,
		refusal.Unsupported: codes.FailedPrecondition, refusal.Precondition: codes.FailedPrecondition,
	} {
		b.change(func() { b.fail = &refusal.Error{Kind: kind, Code: "x", What: "a", Why: "b", Do: "c"} })
		stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		wantStatus(t, err, code, "a: b; c")
	}
	b.change(func() { b.fail = &refusal.Error{Kind: refusal.Unknown, Code: "no-identity", What: "a", Why: "b"} })
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantStatus(t, err, codes.PermissionDenied, "a: b")
}

func TestInternalErrorsStayInternal(t *testing.T) {
	var logged bytes.Buffer
	b := newBoard(t)
	b.fail = errors.New("dial tcp 10.0.0.1: secret detail")
	client, ctx := dial(t, serve(t, workload.Config{Source: b, Logger: slog.New(slog.NewJSONHandler(&logged, nil))}).socket)
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantStatus(t, err, codes.Internal, "look for that id in the agent's log")
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the client is told %q", err)
	}
	id := status.Convert(err).Message()
	id = id[strings.Index(id, "x-"):]
	id = id[:strings.IndexByte(id, ';')]
	if !strings.Contains(logged.String(), id) || !strings.Contains(logged.String(), "secret detail") {
		t.Errorf("the log %q has not %s and the cause", logged.String(), id)
	}
}

func TestTheSecurityHeaderIsRequired(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	client, plain := dialConn(t, e.socket)
	for name, md := range map[string]metadata.MD{
		"none":       nil,
		"other case": metadata.Pairs("workload.spiffe.io", "True"),
		"empty":      metadata.Pairs("workload.spiffe.io", ""),
		"twice":      metadata.Pairs("workload.spiffe.io", "true", "workload.spiffe.io", "false"),
		"other name": metadata.Pairs("workload-spiffe-io", "true"),
	} {
		t.Run(name, func(t *testing.T) {
			ctx := metadata.NewOutgoingContext(t.Context(), md)
			_, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}})
			wantStatus(t, err, codes.InvalidArgument, "it lacks the metadata workload.spiffe.io: true; use a SPIFFE client library")
			for _, method := range []string{"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"} {
				stream, err := plain.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/SpiffeWorkloadAPI/"+method)
				if err != nil {
					t.Fatal(err)
				}
				_ = stream.SendMsg(&gen.X509SVIDRequest{})
				_ = stream.CloseSend()
				wantStatus(t, stream.RecvMsg(&gen.X509SVIDResponse{}), codes.InvalidArgument, "it lacks the metadata")
			}
		})
	}
	if e.meter.get("workloadapi_refused reason no-security-header") != 20 {
		t.Errorf("counted %d", e.meter.get("workloadapi_refused reason no-security-header"))
	}
}

// The WIT-SVID profile is optional; an unsupported profile is UNIMPLEMENTED. Source: SPIFFE Workload API, section 7.
func TestOtherProfilesAreUnimplemented(t *testing.T) {
	_, conn := dialConn(t, serve(t, workload.Config{Source: newBoard(t)}).socket)
	err := conn.Invoke(withHeader(t.Context()), "/SpiffeWorkloadAPI/FetchWITSVID", &gen.X509SVIDRequest{}, &gen.X509SVIDResponse{})
	wantStatus(t, err, codes.Unimplemented)
}

func TestStreamsEndWithAReasonWhenTheAgentStops(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	client, ctx := dial(t, e.socket)
	stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	silent, err := net.Dial("unix", e.socket) // does not even shake hands
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	ended := make(chan error, 1)
	go func() { ended <- e.stop() }()
	_, err = stream.Recv()
	wantStatus(t, err, codes.Unavailable, "the agent is stopping; connect again with a backoff")
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
	_ = silent.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.ReadAll(silent); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a silent connection outlives the server")
	}
}

func TestServeWantsAUnixSocket(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	err = workload.New(workload.Config{Source: newBoard(t)}).Serve(t.Context(), ln)
	if r := refusal.As(err); r == nil || r.Code != "not-a-unix-socket" {
		t.Errorf("Serve on TCP: %v", err)
	}
}
