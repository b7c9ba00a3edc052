package ca

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of the audiences of one JWT-SVID.
const (
	maxAudiences     = 16
	maxAudienceBytes = 512
)

// payload is the claims that the authority signs, and no others. Source: JWT-SVID, section 3.
type payload struct {
	Subject  identity.ID `json:"sub"`
	Audience []string    `json:"aud"`
	Expires  int64       `json:"exp"`
	Issued   int64       `json:"iat"`
}

// SignJWT signs a JWT-SVID for id and the given audiences. A ttl of 0 means Config.JWTTTL, which is also the most that
// may be asked. It ends no later than its key; if that leaves less than half of ttl, it is refused.
//
// Errors: matches [ErrForeignID], [ErrAudience], [ErrTTL], [ErrTooShort], [ErrNotYetValid] or [ErrExpired].
// Trust: the caller has decided that the bearer is id; audience is attacker-controlled.
// Source: JWT-SVID, sections 2 and 3.
func (a *Authority) SignJWT(ctx context.Context, id identity.ID, audience []string, ttl time.Duration) (*identity.JWTSVID, error) {
	svid, err := a.signJWT(ctx, id, audience, ttl)
	if err != nil {
		return nil, a.refused(err)
	}
	a.meter.Count("ca_svids_signed", 1, "kind", "jwt")
	return svid, nil
}

func (a *Authority) signJWT(ctx context.Context, id identity.ID, audience []string, ttl time.Duration) (*identity.JWTSVID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := a.checkID(id); err != nil {
		return nil, err
	}
	if err := checkAudience(id, audience); err != nil {
		return nil, err
	}
	ttl, err := checkTTL(id, ttl, a.cfg.JWTTTL, a.cfg.JWTTTL)
	if err != nil {
		return nil, err
	}
	r, now := a.current.Load(), a.now().UTC().Truncate(time.Second)
	k := r.active(JWT)
	life, err := within(k.span(), now, ttl, leastSVID(ttl), subject(id), "the JWT key")
	if err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.private, KeyID: k.ID}},
		(&jose.SignerOptions{}).WithType("JWT"), // the header has alg, kid and typ, and nothing else (section 2)
	)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", subject(id), err)
	}
	body, err := json.Marshal(payload{Subject: id, Audience: audience, Expires: life.notAfter.Unix(), Issued: now.Unix()})
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", subject(id), err)
	}
	signed, err := signer.Sign(body)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", subject(id), err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", subject(id), err)
	}
	// Nothing is handed out that a relying party would refuse.
	claims, err := VerifyJWT(r.bundle, token, audience[0], now)
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", subject(id), err)
	}
	if claims.ID != id || !claims.Expires.Equal(life.notAfter) || !slices.Equal(claims.Audience, audience) {
		return nil, fmt.Errorf("verify %s: its claims are others", subject(id))
	}
	return &identity.JWTSVID{ID: id, Token: token, Audience: slices.Clone(audience), Expires: life.notAfter}, nil
}

func checkAudience(id identity.ID, audience []string) error {
	no := func(why string) error {
		return refuse(ErrAudience, refusal.Invalid, subject(id), why, "name the service that the token is sent to")
	}
	if len(audience) == 0 || len(audience) > maxAudiences {
		return no(fmt.Sprintf("it has %d audiences, and must have 1 to %d", len(audience), maxAudiences))
	}
	for i, aud := range audience {
		if aud == "" || len(aud) > maxAudienceBytes {
			return no(fmt.Sprintf("its audience number %d has %d bytes, and must have 1 to %d", i+1, len(aud), maxAudienceBytes))
		}
	}
	return nil
}
