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
		config              workload.Config
	}{
		{"of a process", "process-connections", "this process has 2 connections open, which is the limit of one process; share one connection", workload.Config{MaxConnsPerProcess: 2}},
		{"of a user", "user-connections", "has 2 connections open, which is the limit of one user; ", workload.Config{MaxConnsPerUser: 2}},
		{"in total", "connections", "2 connections are open, which is the limit of this machine; ", workload.Config{MaxConns: 2}},
	} {
		t.Run(bound.name, func(t *testing.T) {
			b := newBoard(t)
			b.grant(ownCgroup(t), serviceID(t, "orders"))
			bound.config.Source = b
			e := serve(t, bound.config)
			held := []net.Conn{hold(t, e.socket), hold(t, e.socket)}
			client, ctx := dial(t, e.socket)
			_, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"a"}})
			wantStatus(t, err, codes.ResourceExhausted, bound.says)
			if e.meter.get("workloadapi_refused reason "+bound.counter) == 0 {
				t.Error("not counted")
			}
			_ = held[0].Close()
			e.meter.await(t, "workloadapi_refused reason handshake", 1)
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
