package api

import (
	"encoding/json"
	"fmt"
	"path"
	"reflect"

	"github.com/danielgtaylor/huma/v2"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/identity"
)

// newHuma makes the API object with our own formats, names and answers, and none of huma's own routes.
func (s *server) newHuma(version string) {
	registry := huma.NewMapRegistry("#/components/schemas/", schemaName)
	registry.RegisterTypeAlias(reflect.TypeFor[identity.FactSet](), reflect.TypeFor[[]identity.Fact]())
	format := jsonFormat()
	s.huma = huma.NewAPI(huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info: &huma.Info{
				Title: "Redoubt management API", Version: version, Description: about,
				License: &huma.License{Name: "Apache-2.0", Identifier: "Apache-2.0"},
			},
			Servers: []*huma.Server{{URL: "/", Description: "this server"}},
			Components: &huma.Components{
				Schemas: registry,
				SecuritySchemes: map[string]*huma.SecurityScheme{
					"operator": {Type: "http", Scheme: "bearer", Description: "The operator credential: operator.json in the server's data directory."},
					"machine":  {Type: "mutualTLS", Description: "The X.509-SVID of a machine that has joined."},
				},
			},
			Security: []map[string][]string{{"operator": {}}, {"machine": {}}},
			Tags:     sections,
		},
		Formats:       map[string]huma.Format{"application/json": format, "json": format},
		DefaultFormat: "application/json",
		Transformers:  []huma.Transformer{s.sanitize},
	}, adapter{s})
	s.problemSchema = registry.Schema(reflect.TypeFor[client.Problem](), true, "")
}

const about = "What `redoubt` itself uses. Every answer that is not a success is a problem (RFC 9457) with a stable `code`. " +
	"Every operation asks the policy engine whether the caller may administer it (`Access::Action::\"administer\"` on " +
	"`Operation::\"<operation id>\"`), and a refusal names the decision. Lists come in pages: `limit` (1 to 500, default 100) " +
	"and the opaque `cursor` of the page before, which is also in its `Link` header. GET answers have an `ETag`. Times are " +
	"RFC 3339 in UTC, durations ISO 8601. A change is answered when its audit record is in the log."

// schemaName names a type in the document. Types of other rooms that share a name with one of ours get their room's
// before it.
func schemaName(t reflect.Type, hint string) string {
	name := huma.DefaultSchemaNamer(t, hint)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch path.Base(t.PkgPath()) {
	case "ca":
		return "Authority" + name
	case "audit":
		return "Audit" + name
	default:
		return name
	}
}

// describe finishes the document once every operation is registered: a description for each property that its type does
// not describe itself, and the set of names that may be repeated in an error.
func (s *server) describe() error {
	doc := s.huma.OpenAPI()
	schemas := doc.Components.Schemas.Map()
	delete(schemas, "ErrorModel") // huma's own error, which never leaves
	delete(schemas, "ErrorDetail")
	s.names = map[string]bool{"body": true, "query": true, "path": true, "header": true}
	for name, schema := range schemas {
		for property, p := range schema.Properties {
			s.names[property] = true
			if p.Description != "" {
				continue
			}
			if text, ok := propertyDocs[name+"."+property]; ok {
				p.Description = text
			} else if text, ok := propertyDocs[property]; ok {
				p.Description = text
			}
		}
	}
	for _, item := range doc.Paths {
		for _, op := range []*huma.Operation{item.Get, item.Put, item.Post, item.Delete} {
			if op == nil {
				continue
			}
			for _, p := range op.Parameters {
				s.names[p.Name] = true
			}
		}
	}
	var err error
	if s.specJSON, err = json.Marshal(doc); err != nil {
		return fmt.Errorf("render the OpenAPI document: %w", err)
	}
	if s.specYAML, err = doc.YAML(); err != nil {
		return fmt.Errorf("render the OpenAPI document: %w", err)
	}
	return nil
}
