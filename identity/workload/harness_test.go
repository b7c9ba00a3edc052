//go:build linux

package workload_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// tally is a Meter that remembers.
type tally struct {
	mu sync.Mutex
	n  map[string]int64
}

func (t *tally) Count(name string, n int64, labels ...string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n == nil {
		t.n = map[string]int64{}
	}
	t.n[strings.Join(append([]string{name}, labels...), " ")] += n
}

func (t *tally) get(key string) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n[key]
}

// await waits until a counter has reached a value.
func (t *tally) await(tb testing.TB, key string, want int64) {
	tb.Helper()
	for range 500 {
		if t.get(key) >= want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Errorf("%s is %d, want %d", key, t.get(key), want)
}

// board is a Source that signs with a real authority: an identity for each cgroup that is written on it.
type board struct {
	authority *ca.Authority
	key       *ecdsa.PrivateKey

	mu      sync.Mutex
	ids     map[string][]identity.ID
	svids   map[identity.ID]*identity.X509SVID
	foreign []*identity.Bundle
	hint    string
	fail    error
	fetches int
	signing func(*workload.Caller) // called while a JWT-SVID is made; nil
	changed chan struct{}
}

const domain = identity.TrustDomain("example.test")

func newBoard(t testing.TB) *board {
	t.Helper()
	authority, err := ca.Open(t.Context(), ca.Config{TrustDomain: domain, Store: &catest.Store{}, KEK: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &board{
		authority: authority, key: key, ids: map[string][]identity.ID{}, svids: map[identity.ID]*identity.X509SVID{},
		changed: make(chan struct{}),
	}
}

func serviceID(t testing.TB, name string) identity.ID {
	t.Helper()
	id, err := identity.MakeID(domain, "/service/"+name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// grant gives identities to a cgroup.
func (b *board) grant(cgroup string, ids ...identity.ID) {
	b.change(func() { b.ids[cgroup] = ids })
}

// rotate has every SVID signed anew.
func (b *board) rotate() {
	b.change(func() { b.svids = map[identity.ID]*identity.X509SVID{} })
}

func (b *board) change(do func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	do()
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *board) fetched() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fetches
}

func (b *board) refuse(c *workload.Caller) error {
	return &refusal.Error{
		Kind: refusal.Denied, Code: workload.ErrNoIdentity.Code, What: "identity of the caller in " + c.Cgroup,
		Why: "no issuance rule matches it", Do: "see redoubt identity explain",
	}
}

func (b *board) X509(ctx context.Context, c *workload.Caller) (workload.Update, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fetches++
	if b.fail != nil {
		return workload.Update{}, b.fail
	}
	u := workload.Update{Changed: b.changed, Bundles: append([]*identity.Bundle{b.authority.Bundle()}, b.foreign...)}
	for _, id := range b.ids[c.Cgroup] {
		if b.svids[id] == nil {
			chain, err := b.authority.SignX509(ctx, id, b.key.Public(), 0, ca.SignOptions{})
			if err != nil {
				return workload.Update{}, err
			}
			b.svids[id] = &identity.X509SVID{ID: id, Chain: chain, Key: b.key, Hint: b.hint}
		}
		u.SVIDs = append(u.SVIDs, b.svids[id])
	}
	if len(u.SVIDs) == 0 {
		return workload.Update{}, b.refuse(c)
	}
	return u, nil
}

func (b *board) Bundles(_ context.Context, c *workload.Caller) (workload.Update, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.ids[c.Cgroup]) == 0 {
		return workload.Update{}, b.refuse(c)
	}
	return workload.Update{Changed: b.changed, Bundles: append([]*identity.Bundle{b.authority.Bundle()}, b.foreign...)}, nil
}

func (b *board) JWT(ctx context.Context, c *workload.Caller, audience []string, only identity.ID) ([]*identity.JWTSVID, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.signing != nil {
		b.signing(c)
	}
	var out []*identity.JWTSVID
	for _, id := range b.ids[c.Cgroup] {
		if !only.IsZero() && id != only {
			continue
		}
		svid, err := b.authority.SignJWT(ctx, id, audience, 0)
		if err != nil {
			return nil, err
		}
		svid.Hint = b.hint
		out = append(out, svid)
	}
	if len(out) == 0 {
		return nil, b.refuse(c)
	}
	return out, nil
}

// endpoint is a server and where it listens.
type endpoint struct {
	socket string
	meter  *tally
	stop   func() error
}

// serve starts a server for the length of the test.
func serve(t testing.TB, c workload.Config) *endpoint {
	t.Helper()
	dir, err := os.MkdirTemp("", "r") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	e := &endpoint{socket: filepath.Join(dir, "s"), meter: &tally{}}
	c.Meter = e.meter
	ln, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, e.socket} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- workload.New(c).Serve(ctx, ln) }()
	e.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(5 * time.Second):
			return errors.New("Serve has not returned")
		}
	})
	t.Cleanup(func() {
		if err := e.stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return e
}

// dial returns a client of our own generated code, over a connection of its own, with the security header.
func dial(t testing.TB, socket string) (gen.SpiffeWorkloadAPIClient, context.Context) {
	t.Helper()
	client, _ := dialConn(t, socket)
	ctx, cancel := context.WithTimeout(withHeader(context.Background()), 8*time.Second)
	t.Cleanup(cancel)
	return client, ctx
}

func dialConn(t testing.TB, socket string) (gen.SpiffeWorkloadAPIClient, *grpc.ClientConn) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return gen.NewSpiffeWorkloadAPIClient(conn), conn
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// ownCgroup is the cgroup of this process, in the unified hierarchy.
func ownCgroup(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	t.Skip("this machine has no unified cgroup hierarchy")
	return ""
}

func cgroupRoot(t testing.TB) string {
	t.Helper()
	for _, path := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return path
		}
	}
	t.Skip("this machine has no unified cgroup hierarchy")
	return ""
}

// newCgroup makes a cgroup and returns its path in the hierarchy.
func newCgroup(t testing.TB, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making cgroups needs root")
	}
	root := cgroupRoot(t)
	path := fmt.Sprintf("/redoubt-test-%d-%s", os.Getpid(), name)
	dir := filepath.Join(root, path)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("cannot make a cgroup here: %v", err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0o600)
		for range 200 {
			if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("cannot remove %s", dir)
	})
	return path
}

// wantStatus checks the code of an error, and that its text has these parts.
func wantStatus(t *testing.T, err error, code codes.Code, parts ...string) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != code {
		t.Errorf("got %s %q, want %s", st.Code(), st.Message(), code)
	}
	for _, part := range parts {
		if !strings.Contains(st.Message(), part) {
			t.Errorf("%q does not say %q", st.Message(), part)
		}
	}
}
