package workload

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/workload/gen"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of a request for a JWT-SVID.
const (
	maxAudiences     = 16
	maxAudienceBytes = 1024
	maxTokenBytes    = 16 << 10 // as identity/ca has it
)

// FetchJWTSVID answers with JWT-SVIDs of the caller. Source: SPIFFE Workload API, section 6.2.1.
func (s *service) FetchJWTSVID(ctx context.Context, req *gen.JWTSVIDRequest) (*gen.JWTSVIDResponse, error) {
	c, err := connOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkAudiences(req.GetAudience()); err != nil {
		return nil, err
	}
	var only identity.ID
	if req.GetSpiffeId() != "" {
		if only, err = identity.ParseID(req.GetSpiffeId()); err != nil {
			return nil, err
		}
	}
	svids, err := s.source.JWT(ctx, c.caller, req.GetAudience(), only)
	if err != nil {
		return nil, err
	}
	if len(svids) == 0 {
		return nil, &refusal.Error{
			Kind: refusal.Denied, Code: ErrNoIdentity.Code, What: "JWT-SVID", Why: "the caller has no such identity",
			Do: "ask for an identity that an issuance rule gives to the caller, or for none in particular",
		}
	}
	resp := &gen.JWTSVIDResponse{}
	hints := map[string]bool{}
	for _, svid := range svids {
		if !only.IsZero() && svid.ID != only {
			return nil, fmt.Errorf("source answered with %s instead of the identity asked for", svid)
		}
		resp.Svids = append(resp.Svids, &gen.JWTSVID{
			SpiffeId: svid.ID.String(), Svid: svid.Token, Hint: uniqueHint(hints, svid.Hint),
		})
	}
	return resp, nil
}

func checkAudiences(audience []string) error {
	why := ""
	switch {
	case len(audience) == 0:
		why = "it names no audience"
	case len(audience) > maxAudiences:
		why = fmt.Sprintf("it names %d audiences, more than %d", len(audience), maxAudiences)
	}
	for _, a := range audience {
		if a == "" || len(a) > maxAudienceBytes {
			why = fmt.Sprintf("an audience has 1 to %d bytes", maxAudienceBytes)
		}
	}
	if why == "" {
		return nil
	}
	return &refusal.Error{
		Kind: refusal.Invalid, Code: "bad-audience", What: "request for a JWT-SVID", Why: why,
		Do: "name whom the token is for, such as the SPIFFE ID of the service that will be called",
	}
}

// ValidateJWTSVID verifies a JWT-SVID against the bundles that the caller may trust. It answers with the claims that the
// standard defines and no others. Source: SPIFFE Workload API, section 6.2.3; JWT-SVID, sections 3 and 4.
func (s *service) ValidateJWTSVID(ctx context.Context, req *gen.ValidateJWTSVIDRequest) (*gen.ValidateJWTSVIDResponse, error) {
	c, err := connOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkAudiences([]string{req.GetAudience()}); err != nil {
		return nil, err
	}
	update, err := s.source.Bundles(ctx, c.caller)
	if err != nil {
		return nil, err
	}
	bundle, err := verifier(update.Bundles, req.GetSvid())
	if err != nil {
		return nil, err
	}
	claims, err := ca.VerifyJWT(bundle, req.GetSvid(), req.GetAudience(), time.Now())
	if err != nil {
		return nil, invalidToken(err)
	}
	audience := make([]any, len(claims.Audience))
	for i, a := range claims.Audience {
		audience[i] = a
	}
	fields := map[string]any{"sub": claims.ID.String(), "aud": audience, "exp": float64(claims.Expires.Unix())}
	if !claims.Issued.IsZero() {
		fields["iat"] = float64(claims.Issued.Unix())
	}
	out, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("render claims: %w", err)
	}
	return &gen.ValidateJWTSVIDResponse{SpiffeId: claims.ID.String(), Claims: out}, nil
}

// invalidToken makes a refused token the client's wrong argument, whichever kind of refusal it was to the engine: the
// caller is not refused as a person, and asking again does not help.
func invalidToken(err error) error {
	r := refusal.As(err)
	if r == nil {
		return err
	}
	out := *r
	out.Kind = refusal.Invalid
	return &out
}

// verifier returns the bundle of the trust domain that the token says it is of; nothing else of it is believed.
// Source: SPIFFE Workload API, section 6.3: the bundle must be that of the subject's trust domain.
func verifier(bundles []*identity.Bundle, token string) (*identity.Bundle, error) {
	id, err := claimedSubject(token)
	if err != nil {
		return nil, badToken(err.Error())
	}
	if b := bundleOf(bundles, id.TrustDomain()); b != nil {
		return b, nil
	}
	return nil, badToken("it is of a trust domain that the caller has no bundle of")
}

func badToken(why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: ca.ErrToken.Code, What: "JWT-SVID", Why: why, Do: "have its sender fetch a new one",
	}
}

// claimedSubject reads the subject of a token that is not verified yet. Errors never quote the token.
// Trust: token is attacker-controlled.
func claimedSubject(token string) (identity.ID, error) {
	if len(token) > maxTokenBytes {
		return identity.ID{}, fmt.Errorf("it is longer than %d bytes", maxTokenBytes)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return identity.ID{}, errors.New("it is not a JWS in compact form")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return identity.ID{}, errors.New("its payload is not base64url")
	}
	var claims struct {
		Subject string `json:"sub"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return identity.ID{}, errors.New("its payload is not a JSON object with a subject")
	}
	id, err := identity.ParseID(claims.Subject)
	if err != nil {
		return identity.ID{}, errors.New("its subject is not a SPIFFE ID")
	}
	return id, nil
}
