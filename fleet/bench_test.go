package fleet_test

import (
	"fmt"
	"testing"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
)

func benchFleet(b *testing.B) *fleet.Fleet {
	b.Helper()
	authority, err := ca.Open(b.Context(), ca.Config{TrustDomain: td, Store: &catest.Store{}, KEK: make([]byte, 32)})
	if err != nil {
		b.Fatal(err)
	}
	f, err := fleet.Open(b.Context(), fleet.Config{TrustDomain: td, Store: &fleettest.Memory{}, Authority: authority, Rules: &rules{}})
	if err != nil {
		b.Fatal(err)
	}
	_, secret, err := f.CreateToken(b.Context(), fleet.TokenRequest{Machine: "m1"}, rec())
	if err != nil {
		b.Fatal(err)
	}
	if _, err := f.Join(b.Context(), fleet.JoinRequest{Secret: secret.Reveal(), Machine: "m1", CSR: newKey(b).csr}); err != nil {
		b.Fatal(err)
	}
	return f
}

func someFacts(b *testing.B, uid int64) identity.FactSet {
	b.Helper()
	return facts(b, fact(identity.FactService, "orders", identity.FromOperator), fact("unix.uid", uid, identity.FromKernel))
}

// BenchmarkSignX509 is a CSR to a chain: the checks, and the signature.
func BenchmarkSignX509(b *testing.B) {
	f := benchFleet(b)
	if _, err := f.Report(b.Context(), "m1", fleet.Report{Present: []fleet.Observed{{Instance: "w-1", Facts: someFacts(b, 1)}}}); err != nil {
		b.Fatal(err)
	}
	csr := newKey(b).csr
	for b.Loop() {
		if _, err := f.SignX509(b.Context(), "m1", "w-1", csr); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReport is a full report of 1,000 workloads of which nothing is new.
func BenchmarkReport(b *testing.B) {
	f := benchFleet(b)
	r := fleet.Report{Full: true}
	for i := range 1000 {
		r.Present = append(r.Present, fleet.Observed{Instance: fmt.Sprintf("w-%d", i), Facts: someFacts(b, int64(i))})
	}
	for b.Loop() {
		if _, err := f.Report(b.Context(), "m1", r); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFollow is what one agent costs at each change: asking whether it may, and reading the change.
func BenchmarkFollow(b *testing.B) {
	f := benchFleet(b)
	if _, err := f.Report(b.Context(), "m1", fleet.Report{Present: []fleet.Observed{{Instance: "w-1", Facts: someFacts(b, 1)}}}); err != nil {
		b.Fatal(err)
	}
	at := f.Revision() - 1
	for b.Loop() {
		_ = f.Trusted("m1", "x")
		if list, err := f.Changes(b.Context(), at, 256); err != nil || len(list) != 1 {
			b.Fatal(err)
		}
	}
}
