package eval

import (
	"bytes"
	_ "embed"
	"fmt"
	"sync"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

//go:embed schema/redoubt.cedarschema
var schemaText []byte

// Schema returns the published Cedar schema: every entity type, action and context key that a policy may speak of, with
// comments. The caller owns the copy.
func Schema() []byte { return bytes.Clone(schemaText) }

// model is a resolved schema in the forms the engine asks it in. Immutable.
type model struct {
	schema    *resolved.Schema
	validator *validate.Validator
}

// published is the model of [Schema]. The text is embedded and a test resolves it, so that failing here is a defect of
// the build.
var published = sync.OnceValues(func() (*model, error) { return newModel("redoubt.cedarschema", schemaText) })

func newModel(name string, text []byte) (*model, error) {
	var s schema.Schema
	s.SetFilename(name)
	if err := s.UnmarshalCedar(text); err != nil {
		return nil, fmt.Errorf("parse schema: %w", err)
	}
	r, err := s.Resolve()
	if err != nil {
		return nil, fmt.Errorf("resolve schema: %w", err)
	}
	return &model{schema: r, validator: validate.New(r)}, nil
}

// action returns the entity of an action of the schema, with its parents.
func (m *model) action(uid types.EntityUID) (types.Entity, bool) {
	if m == nil {
		return types.Entity{}, false
	}
	a, ok := m.schema.Actions[uid]
	return a.Entity, ok
}
