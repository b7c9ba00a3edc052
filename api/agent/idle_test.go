package agent_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/fleet"
)

// TestWhoeverShowsNobodyIsPutOut: without a certificate, with one of nobody's, and with calls that anyone may make; the
// agents stay, and those who join.
func TestWhoeverShowsNobodyIsPutOut(t *testing.T) {
	w := newWorld(t, func(s *agent.ServerConfig, _ *fleet.Config) { s.ProvenWithin = 300 * time.Millisecond })
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Spool: newSpool(t)})
	w.connected(s)
	if n := w.meter.get("agentapi_connections_unproven"); n != 0 {
		t.Errorf("%d put out before anyone idled", n)
	}
	other := newAuthority(t, nil)
	id, err := fleet.MachineID(td, "m1")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := certificates(t, other, id)(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, config := range map[string]*tls.Config{
		"no certificate":      {InsecureSkipVerify: true, NextProtos: []string{"h2"}},
		"another authority's": {InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{*foreign}},
	} {
		c, err := tls.Dial("tcp", w.address, config)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				t.Errorf("%s: the connection stays", name)
			}
		}
		_ = c.Close()
	}
	conn, err := grpc.NewClient("passthrough:///"+w.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	for w.meter.get("agentapi_connections_unproven") < 4 { // gRPC comes back each time
		if _, err := agentpb.NewAgentClient(conn).Time(ctx, &agentpb.TimeRequest{}); ctx.Err() != nil {
			t.Fatalf("a connection that only asks the time stays: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if !s.Status().Connected {
		t.Error("the agent was put out too")
	}
	w.joined("m2")
}

// TestOneAddressCannotHoldEveryPlace: an agent that was there stays, and comes back when the others are gone.
func TestOneAddressCannotHoldEveryPlace(t *testing.T) {
	w := newWorld(t, nil)
	s, _ := w.session(w.joined("m1"), agent.SessionConfig{Spool: newSpool(t)})
	w.connected(s)
	for range 70 {
		c, err := net.Dial("tcp", w.address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
	}
	eventually(t, "connections too many of one address are refused", func() bool { return w.meter.get("agentapi_connections_refused reason source") >= 5 })
	if !s.Status().Connected {
		t.Error("the agent was put out")
	}
}
