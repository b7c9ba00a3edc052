//go:build linux

package workload_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestClient(t *testing.T) {
	b := newBoard(t)
	e := serve(t, workload.Config{Source: b})
	c, err := workload.NewClient("unix://" + e.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _, err = c.FetchX509(t.Context())
	if r := refusal.As(err); r == nil || r.Kind != refusal.Denied || !strings.Contains(r.Why, "no issuance rule matches it") {
		t.Errorf("without an identity: %v", err)
	}
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	svids, roots, err := c.FetchX509(t.Context())
	if err != nil || len(svids) != 1 || svids[0].ID != serviceID(t, "orders") || len(roots) != 1 {
		t.Errorf("X.509: %v, %d SVIDs, %d roots", err, len(svids), len(roots))
	}
	tokens, err := c.FetchJWT(t.Context(), []string{"db"}, identity.ID{})
	if err != nil || len(tokens) != 1 || tokens[0].ID != serviceID(t, "orders") {
		t.Errorf("JWT: %v, %v", err, tokens)
	}
	_, err = c.FetchJWT(t.Context(), nil, identity.ID{})
	if r := refusal.As(err); r == nil || r.Kind != refusal.Invalid {
		t.Errorf("without an audience: %v", err)
	}
	for _, addr := range []string{"", "/run/x", "unix:x", "tcp://127.0.0.1:1"} {
		if _, err := workload.NewClient(addr); refusal.As(err) == nil {
			t.Errorf("%q: %v, want a refusal", addr, err)
		}
	}
}

// A crowd that keeps the socket's queue full for a while makes the client wait, not fail.
func TestClientWaitsForAFullQueue(t *testing.T) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	crowd := 0
	for {
		c, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil || crowd > 100 {
			t.Fatalf("the queue does not fill: %d, %v", crowd, err)
		}
		defer func() { _ = c.Close() }()
		crowd++
	}
	client, err := workload.NewClient("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, _, err := client.FetchX509(ctx)
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("it gave up: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	for range crowd + 1 { // the last of them is the client's
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(c) }()
	}
	cancel()
	<-done
}
