package api

import (
	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/identity"
)

// bundle is an identity.Bundle with the schema of the document that it renders.
type bundle struct{ *identity.Bundle }

// Schema implements huma.SchemaProvider. Source: SPIFFE Trust Domain and Bundle, section 4.
func (bundle) Schema(huma.Registry) *huma.Schema {
	text := func(doc string) *huma.Schema { return &huma.Schema{Type: huma.TypeString, Description: doc} }
	return &huma.Schema{
		Type: huma.TypeObject, Description: "A SPIFFE bundle document.", Required: []string{"keys"},
		Properties: map[string]*huma.Schema{
			"keys": {Type: huma.TypeArray, Description: "JWKs (RFC 7517).", Items: &huma.Schema{
				Type: huma.TypeObject, AdditionalProperties: true, Required: []string{"kty", "use"},
				Properties: map[string]*huma.Schema{
					"kty": text("Key type."), "use": text("x509-svid or jwt-svid."), "kid": text("Key id, of a jwt-svid key."),
					"x5c": {Type: huma.TypeArray, Description: "The certificate, of an x509-svid key.", Items: text("DER, in base64.")},
				},
			}},
			"spiffe_sequence":     {Type: huma.TypeInteger, Description: "Rises with every change."},
			"spiffe_refresh_hint": {Type: huma.TypeInteger, Description: "How often to look again, in seconds."},
		},
	}
}
