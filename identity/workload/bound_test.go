//go:build linux

package workload_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
)

func TestConnectionsAreBounded(t *testing.T) {
	for _, bound := range []struct {
		name, counter, says string
		own, others         int // connections held by this process, and by others of its user
		config              workload.Config
	}{
		{"of a process", "process-connections", "this process has 2 connections open, which is the limit of one process; share one connection", 2, 0, workload.Config{MaxConnsPerProcess: 2}},
		{"of a user", "user-connections", "has 2 connections open, which is the limit of one user; ", 1, 1, workload.Config{MaxConnsPerUser: 2}},
		{"in total", "connections", "2 connections are open, which is the limit of this machine; ", 0, 0, workload.Config{MaxConns: 2}},
	} {
		t.Run(bound.name, func(t *testing.T) {
			b := newBoard(t)
			b.grant(ownCgroup(t), serviceID(t, "orders"))
			bound.config.Source = b
			e := serve(t, bound.config)
			give := func() {}
			for range bound.others {
				p := run(t, "watch", "", e.socket)
				p.next(t)
				give = p.end
			}
			for uid := range uint32(bound.config.MaxConns) { // each user has one place at most
				p := runAs(t, 61990+uid, "watch", e.socket)
				p.next(t)
				give = p.end
			}
			for range bound.own {
				c := hold(t, e.socket)
				give = func() { _ = c.Close() }
			}
			client, ctx := dial(t, e.socket)
			_, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}})
			wantStatus(t, err, codes.ResourceExhausted, bound.says)
			if e.meter.get("workloadapi_refused reason "+bound.counter) == 0 {
				t.Error("not counted")
			}
			give()
			if bound.own > 0 {
				e.meter.await(t, "workloadapi_refused reason handshake", 1)
			}
			for range 50 {
				if _, err = client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}}); err == nil {
					return
				}
				time.Sleep(50 * time.Millisecond) // the refused connection is closed after a second; then a new one is made
			}
			t.Errorf("a place was given back, yet: %v", err)
		})
	}
}

// Where the total is small, because the agent may open few files, no user gets more than a quarter of it.
func TestOneUserCannotTakeEveryPlace(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b, MaxConns: 8, HandshakeTimeout: time.Minute})
	if got := runAs(t, 61990, "flood", e.socket, "20").next(t); got.Open != 2 || got.Refused != 18 {
		t.Errorf("%d connections of one user are open and %d refused, want 2 and 18", got.Open, got.Refused)
	}
	if other := run(t, "watch", "", e.socket).next(t); other.ID != "spiffe://example.test/service/orders" {
		t.Errorf("another user gets %+v", other)
	}
}

// hold opens a connection and waits until the server has it.
func hold(t *testing.T, socket string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	time.Sleep(20 * time.Millisecond)
	return c
}

func TestARefusedConnectionIsClosed(t *testing.T) {
	e := serve(t, workload.Config{Source: newBoard(t), MaxConnsPerProcess: 1})
	hold(t, e.socket)
	c := hold(t, e.socket)
	_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a refused connection stays open")
	}
}

func TestASlowHandshakeIsCutOff(t *testing.T) {
	e := serve(t, workload.Config{Source: newBoard(t), HandshakeTimeout: 50 * time.Millisecond})
	for name, begin := range map[string]string{"silent": "", "half a preface": "PRI * HTTP/2.0\r\n", "no settings": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		c := hold(t, e.socket)
		_, _ = io.WriteString(c, begin)
		_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stays open", name)
		}
	}
	e.meter.await(t, "workloadapi_refused reason handshake", 3)
}

func TestCallsInProgressAreBounded(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b, MaxStreams: 3})
	client, ctx := dial(t, e.socket)
	for range 3 {
		stream, err := client.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}})
	wantStatus(t, err, codes.ResourceExhausted, "as many calls in progress as it may; share one stream")
	if e.meter.get("workloadapi_refused reason too-many-calls") != 1 {
		t.Error("not counted")
	}
	other, ctx := dial(t, e.socket)
	if _, err := other.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
		t.Errorf("another connection: %v", err)
	}
}

func TestMessagesAreBounded(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	client, ctx := dial(t, e.socket)
	_, err := client.ValidateJWTSVID(ctx, &gen.ValidateJWTSVIDRequest{Audience: "a", Svid: strings.Repeat("x", 70<<10)})
	wantStatus(t, err, codes.ResourceExhausted, "larger than max")
	e.meter.await(t, "workloadapi_calls method ValidateJWTSVID code ResourceExhausted", 1)
}

// A client that does not read holds up nobody but itself, and gets the latest when it reads again.
func TestASlowReaderBlocksItselfOnly(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	many := foreignBundle(t, "partner.test")
	for len(many.X509Authorities) < 200 { // messages of about 100 KiB, more than a stream's window
		many.X509Authorities = append(many.X509Authorities, many.X509Authorities[0])
	}
	b.foreign = []*identity.Bundle{many}
	e := serve(t, workload.Config{Source: b})
	slowClient, ctx := dial(t, e.socket)
	slow, err := slowClient.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	fastClient, ctx := dial(t, e.socket)
	fast, err := fastClient.FetchX509SVID(ctx, &gen.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var last *gen.X509SVIDResponse
	const rounds = 12
	for i := range rounds {
		if last, err = fast.Recv(); err != nil {
			t.Fatalf("the fast reader, round %d: %v", i, err)
		}
		if i < rounds-1 {
			b.rotate()
		}
	}
	read := 0
	for latest := false; !latest; read++ {
		got, err := slow.Recv()
		if err != nil {
			t.Fatal(err)
		}
		latest = string(got.Svids[0].X509Svid) == string(last.Svids[0].X509Svid)
	}
	if read >= rounds {
		t.Errorf("the slow reader was sent all %d messages; they were kept for it", read)
	}
}
