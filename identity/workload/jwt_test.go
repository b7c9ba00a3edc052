//go:build linux

package workload_test

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/workload"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
)

func TestJWTSVIDsOfTheCaller(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"), serviceID(t, "legacy"))
	b.grant("/elsewhere", serviceID(t, "payments"))
	b.hint = "h"
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)

	all, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"db", "cache"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(all.Svids) != 2 || all.Svids[0].Hint != "h" || all.Svids[1].Hint != "" {
		t.Errorf("got %d SVIDs; want both, with unique hints", len(all.Svids))
	}
	one, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: "spiffe://example.test/service/legacy"})
	if err != nil {
		t.Fatal(err)
	}
	if len(one.Svids) != 1 || one.Svids[0].SpiffeId != "spiffe://example.test/service/legacy" {
		t.Errorf("got %v, want the one asked for", one.Svids)
	}
	_, err = client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"db"}, SpiffeId: "spiffe://example.test/service/payments"})
	wantStatus(t, err, codes.PermissionDenied, "no issuance rule matches it")
}

func TestBadRequestsForJWTSVIDs(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	for name, req := range map[string]*gen.JWTSVIDRequest{
		"no audience":        {},
		"an empty audience":  {Audience: []string{"a", ""}},
		"many audiences":     {Audience: slices.Repeat([]string{"a"}, 17)},
		"a long audience":    {Audience: []string{strings.Repeat("a", 1025)}},
		"no SPIFFE ID":       {Audience: []string{"a"}, SpiffeId: "orders"},
		"a foreign scheme":   {Audience: []string{"a"}, SpiffeId: "https://example.test/service/orders"},
		"a relative segment": {Audience: []string{"a"}, SpiffeId: "spiffe://example.test/service/../orders"},
	} {
		_, err := client.FetchJWTSVID(ctx, req)
		t.Run(name, func(t *testing.T) { wantStatus(t, err, codes.InvalidArgument, "; ") })
	}
}

func TestValidateJWTSVID(t *testing.T) {
	b := newBoard(t)
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	e := serve(t, workload.Config{Source: b})
	client, ctx := dial(t, e.socket)
	got, err := client.FetchJWTSVID(ctx, &gen.JWTSVIDRequest{Audience: []string{"db", "cache"}})
	if err != nil {
		t.Fatal(err)
	}
	token := got.Svids[0].Svid
	ok, err := client.ValidateJWTSVID(ctx, &gen.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
	if err != nil {
		t.Fatal(err)
	}
	claims := ok.Claims.AsMap()
	if ok.SpiffeId != "spiffe://example.test/service/orders" || claims["sub"] != ok.SpiffeId || claims["exp"] == nil {
		t.Errorf("got %s, claims %v", ok.SpiffeId, claims)
	}
	if aud, _ := claims["aud"].([]any); !slices.Equal(aud, []any{"db", "cache"}) {
		t.Errorf("audience %v", claims["aud"])
	}

	parts := strings.Split(token, ".")
	partner := newBoard(t)
	partner.grant("x", serviceID(t, "orders"))
	strange, err := partner.authority.SignJWT(ctx, serviceID(t, "orders"), []string{"db"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"spiffe://other.test/x","aud":"db","exp":99999999999}`))
	for name, req := range map[string]*gen.ValidateJWTSVIDRequest{
		"another audience":      {Audience: "web", Svid: token},
		"no audience":           {Svid: token},
		"no token":              {Audience: "db"},
		"no JWS":                {Audience: "db", Svid: "hello"},
		"not base64":            {Audience: "db", Svid: "a.!.c"},
		"a changed payload":     {Audience: "db", Svid: parts[0] + "." + parts[1][:len(parts[1])-2] + "AA." + parts[2]},
		"a foreign signature":   {Audience: "db", Svid: strange.Token},
		"another trust domain":  {Audience: "db", Svid: parts[0] + "." + elsewhere + "." + parts[2]},
		"no signature":          {Audience: "db", Svid: base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + "."},
		"more than may be sent": {Audience: "db", Svid: "a." + strings.Repeat("A", 20<<10) + ".c"},
	} {
		_, err := client.ValidateJWTSVID(ctx, req)
		t.Run(name, func(t *testing.T) {
			wantStatus(t, err, codes.InvalidArgument, "; ")
			if err != nil && (strings.Contains(err.Error(), parts[1]) || strings.Contains(err.Error(), parts[2])) {
				t.Error("the refusal quotes the token")
			}
		})
	}
	b.grant(ownCgroup(t))
	_, err = client.ValidateJWTSVID(ctx, &gen.ValidateJWTSVIDRequest{Audience: "db", Svid: token})
	wantStatus(t, err, codes.PermissionDenied, "no issuance rule matches it")
}

// A token is verified with the bundle of its subject's trust domain, and no other. Source: SPIFFE Workload API, 6.3.
func TestAPartnersTokenIsVerifiedWithThePartnersBundle(t *testing.T) {
	b, partner := newBoard(t), newBoard(t) // both authorities are of example.test
	b.grant(ownCgroup(t), serviceID(t, "orders"))
	own := b.authority.Bundle()
	// The partner's keys under the name of another domain do not verify tokens of ours.
	b.foreign = []*identity.Bundle{{TrustDomain: "partner.test", JWTAuthorities: partner.authority.Bundle().JWTAuthorities, X509Authorities: own.X509Authorities}}
	client, ctx := dial(t, serve(t, workload.Config{Source: b}).socket)
	forged, err := partner.authority.SignJWT(ctx, serviceID(t, "orders"), []string{"db"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.ValidateJWTSVID(ctx, &gen.ValidateJWTSVIDRequest{Audience: "db", Svid: forged.Token})
	wantStatus(t, err, codes.InvalidArgument, "its key is not in the bundle of example.test")
}
