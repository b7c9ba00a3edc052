//go:build linux

package workload_test

import (
	"strings"
	"testing"

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
