package eval

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	exptypes "github.com/cedar-policy/cedar-go/x/exp/types"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of what [Evaluate] reads.
const (
	maxSchemaBytes   = 4 << 20
	maxEntitiesBytes = 64 << 20
	maxLineBytes     = 4 << 20
)

// codeEvaluate is the code of every refusal of [Evaluate] that is not about policies.
const codeEvaluate = "malformed-evaluation"

// Evaluate answers requests in Cedar's own formats: entities are a JSON array, requests one JSON object a line with
// principal, action, resource (`"Type::\"id\""` or {"type","id"}) and context; out comes one line a request:
//
//	{"decision":"allow","reason":["policy0"],"errors":[]}
//
// reason and errors are names of policies, in order: the @id annotation, else policy0, policy1…, counted through all
// files as Cedar's own tools do. With a schema (of any system, not of ours only) entities are checked against it, and
// values in its short forms are read by it; policies are not validated. Blank lines are skipped. Lines are written as
// they are answered, before the next one is waited for.
//
// Errors: [Problems] for policies, else a refusal with code malformed-evaluation that names the line.
// Trust: entities and requests are hostile; schema and policies are of whoever runs it, and bounded all the same.
func Evaluate(w io.Writer, schema []byte, policies []File, entities, requests io.Reader) error {
	return evaluate(w, schema, policies, entities, requests, false)
}

// EvaluateLinear is [Evaluate] without the index: every policy is tried, as cedar-go does. It exists to be compared with.
func EvaluateLinear(w io.Writer, schema []byte, policies []File, entities, requests io.Reader) error {
	return evaluate(w, schema, policies, entities, requests, true)
}

func cedarName(_ string, _, inSet int) string { return "policy" + strconv.Itoa(inSet) }

func evaluate(w io.Writer, schemaText []byte, files []File, entities, requests io.Reader, linear bool) error {
	var m *model
	if schemaText != nil {
		if len(schemaText) > maxSchemaBytes {
			return unevaluated("schema", fmt.Errorf("it is larger than %d bytes", maxSchemaBytes))
		}
		var err error
		if m, err = newModel("schema", schemaText); err != nil {
			return unevaluated("schema", err)
		}
	}
	e, err := compile(files, nil, false, cedarName)
	if err != nil {
		return err
	}
	store, err := readEntities(entities, m)
	if err != nil {
		return unevaluated("entities", err)
	}
	contexts := newContextReader(m)
	var s scratch
	in, out := bufio.NewReaderSize(requests, 64<<10), bufio.NewWriter(w)
	for n := 1; ; n++ {
		if in.Buffered() == 0 {
			if err := out.Flush(); err != nil {
				return fmt.Errorf("write result: %w", err)
			}
		}
		line, err := readLine(in)
		if errors.Is(err, io.EOF) {
			return out.Flush()
		}
		what := "request on line " + strconv.Itoa(n)
		if err != nil {
			return errors.Join(out.Flush(), unevaluated(what, err))
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		r, err := readRequest(line, contexts)
		if err != nil {
			return errors.Join(out.Flush(), unevaluated(what, err))
		}
		if linear {
			s.matches = s.matches[:0]
			for i := range e.policies {
				s.matches = append(s.matches, int32(i))
			}
		} else {
			e.index.candidates(&s, r.Principal, r.Action, r.Resource, stored{store})
		}
		verdict, diag := e.answer(s.matches, store, r.Principal, r.Action, r.Resource, r.Context)
		if err := writeResult(out, verdict, diag); err != nil {
			return fmt.Errorf("write result: %w", err)
		}
	}
}

// stored is the lineage of a store of entities.
type stored struct{ types.EntityMap }

func (s stored) parents(into []types.EntityUID, uid types.EntityUID) []types.EntityUID {
	if e, ok := s.Get(uid); ok {
		into = slices.AppendSeq(into, e.Parents.All())
	}
	return into
}

func unevaluated(what string, err error) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: codeEvaluate, What: what, Why: quote(err.Error()),
		Do: "give it in Cedar's own format", Err: err,
	}
}

func readEntities(r io.Reader, m *model) (types.EntityMap, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxEntitiesBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxEntitiesBytes {
		return nil, fmt.Errorf("they are larger than %d bytes", maxEntitiesBytes)
	}
	var entities types.EntityMap
	if m == nil {
		if err := json.Unmarshal(data, &entities); err != nil {
			return nil, err
		}
		return entities, nil
	}
	var checked exptypes.EntityMap
	if err := checked.UnmarshalJSONWithSchema(data, m.schema); err != nil {
		return nil, err
	}
	entities = types.EntityMap(checked)
	for uid, a := range m.schema.Actions {
		if _, ok := entities[uid]; !ok {
			entities[uid] = a.Entity
		}
	}
	return entities, nil
}

func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxLineBytes:
			return nil, fmt.Errorf("it is longer than %d bytes", maxLineBytes)
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(line) > 0:
			return line, nil
		default:
			return line, err
		}
	}
}

// uidJSON reads an entity in either form.
type uidJSON struct{ types.EntityUID }

func (u *uidJSON) UnmarshalJSON(b []byte) error {
	var text string
	if json.Unmarshal(b, &text) == nil {
		return u.UnmarshalCedar([]byte(text))
	}
	return u.EntityUID.UnmarshalJSON(b)
}

func readRequest(line []byte, contexts *contextReader) (cedar.Request, error) {
	var in struct {
		Principal *uidJSON        `json:"principal"`
		Action    *uidJSON        `json:"action"`
		Resource  *uidJSON        `json:"resource"`
		Context   json.RawMessage `json:"context"`
	}
	if err := json.Unmarshal(line, &in); err != nil {
		return cedar.Request{}, err
	}
	if in.Principal == nil || in.Action == nil || in.Resource == nil {
		return cedar.Request{}, errors.New("it lacks principal, action or resource")
	}
	r := cedar.Request{Principal: in.Principal.EntityUID, Action: in.Action.EntityUID, Resource: in.Resource.EntityUID}
	if len(in.Context) == 0 || string(in.Context) == "null" {
		return r, nil
	}
	if err := r.Context.UnmarshalJSON(in.Context); err != nil {
		return r, fmt.Errorf("context: %w", err)
	}
	r.Context = contexts.read(r.Context, r.Action)
	return r, nil
}

// contextReader reads contexts by a schema. cedar-go does so within entities only, so a context is read as the attributes
// of an entity, of a type whose name the schema does not have.
//
// Concurrency: of one goroutine.
type contextReader struct {
	schema *resolved.Schema // a copy that has the type too
	as     types.EntityType
}

func newContextReader(m *model) *contextReader {
	if m == nil {
		return nil
	}
	c := &contextReader{schema: &resolved.Schema{Actions: m.schema.Actions, Enums: m.schema.Enums}, as: "Context"}
	c.schema.Entities = maps.Clone(m.schema.Entities)
	for m.knows(types.NewEntityUID(c.as, "")) {
		c.as += "_"
	}
	return c
}

// read reads what a context has in the schema's short forms (an address as a string, an entity as {"type","id"}). A
// context that does not fit the schema stays as it is.
func (c *contextReader) read(context types.Record, action types.EntityUID) types.Record {
	if c == nil || context.Len() == 0 {
		return context
	}
	a, ok := c.schema.Actions[action]
	if !ok || a.AppliesTo == nil {
		return context
	}
	data, err := json.Marshal(types.Entity{UID: types.NewEntityUID(c.as, ""), Attributes: context})
	if err != nil {
		return context
	}
	c.schema.Entities[c.as] = resolved.Entity{Name: c.as, Shape: a.AppliesTo.Context}
	var read exptypes.Entity
	if err := read.UnmarshalJSONWithSchema(data, c.schema); err != nil {
		return context
	}
	return read.Attributes
}

// result is one line of [Evaluate].
type result struct {
	Decision string   `json:"decision"`
	Reason   []string `json:"reason"`
	Errors   []string `json:"errors"`
}

func writeResult(w io.Writer, v policy.Verdict, diag cedar.Diagnostic) error {
	r := result{Decision: "deny", Reason: []string{}, Errors: []string{}}
	if v == policy.Permit {
		r.Decision = "allow"
	}
	for _, x := range diag.Reasons {
		r.Reason = append(r.Reason, string(x.PolicyID))
	}
	for _, x := range diag.Errors {
		r.Errors = append(r.Errors, string(x.PolicyID))
	}
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
