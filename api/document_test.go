package api_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
)

// The one operation that needs no credential: public keys.
var public = []string{"get-bundle"}

func TestEveryOperationIsDescribed(t *testing.T) {
	s := serve(t)
	seen := map[string]bool{}
	for _, op := range s.operations() {
		if op.ID == "" || op.Summary == "" || op.Description == "" || len(op.Tags) != 1 {
			t.Errorf("%s %s: id %q, summary %q, description %q, tags %v", op.Method, op.Path, op.ID, op.Summary, op.Description, op.Tags)
		}
		if seen[op.ID] {
			t.Errorf("operation id %s is there twice", op.ID)
		}
		seen[op.ID] = true
		if op.public() != slices.Contains(public, op.ID) {
			t.Errorf("%s: public is %v", op.ID, op.public())
		}
		want := []string{"500", "503"}
		if !op.public() {
			want = append(want, "401", "403", "429")
		}
		if op.RequestBody != nil {
			want = append(want, "400", "413", "415", "422")
		}
		for _, status := range want {
			r, ok := op.Responses[status]
			if _, problem := r.Content["application/problem+json"]; !ok || !problem || r.Description == "" {
				t.Errorf("%s: response %s is no described problem", op.ID, status)
			}
		}
		success := 0
		for status := range op.Responses {
			if strings.HasPrefix(status, "2") {
				success++
			}
		}
		if success != 1 {
			t.Errorf("%s: %d responses of success", op.ID, success)
		}
		for _, p := range op.Parameters {
			if p.Description == "" {
				t.Errorf("%s: parameter %s has no description", op.ID, p.Name)
			}
		}
	}
}

func TestEveryPropertyIsDescribed(t *testing.T) {
	s := serve(t)
	var doc struct {
		OpenAPI    string `json:"openapi"`
		Components struct {
			Schemas map[string]struct {
				Properties map[string]struct {
					Description string
					Ref         string `json:"$ref"`
				}
			}
			SecuritySchemes map[string]any
		}
	}
	raw := s.call("GET", "/v1/openapi.json", "", "Authorization", "")
	if err := json.Unmarshal([]byte(raw.body), &doc); err != nil || raw.status != 200 {
		t.Fatal(err, raw.status)
	}
	if doc.OpenAPI != "3.1.0" || len(doc.Components.SecuritySchemes) != 2 || raw.header.Get("Content-Type") != "application/openapi+json" {
		t.Errorf("version %s, %d security schemes, %v", doc.OpenAPI, len(doc.Components.SecuritySchemes), raw.header)
	}
	for name, schema := range doc.Components.Schemas {
		if strings.HasPrefix(name, "Error") {
			t.Errorf("schema %s is huma's own", name)
		}
		for property, p := range schema.Properties {
			if p.Description == "" {
				t.Errorf("%s.%s has no description", name, property)
			}
		}
	}
	yaml := s.call("GET", "/v1/openapi.yaml", "", "Authorization", "")
	if yaml.status != 200 || !strings.Contains(yaml.body, "openapi: 3.1.0") || !strings.Contains(yaml.body, "operationId: apply-policy-set") {
		t.Errorf("YAML: %d %.80s", yaml.status, yaml.body)
	}
	if got := s.call("POST", "/v1/openapi.json", "{}"); got.status != 405 || got.header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST of the document: %d", got.status)
	}
}

// Fails if identify is left out of the flow, or an operation is made public.
func TestEveryOperationRefusesWithoutCredential(t *testing.T) {
	s := serve(t)
	for _, op := range s.operations() {
		if slices.Contains(public, op.ID) {
			continue
		}
		for _, credential := range []string{"", "Bearer ro1.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "Bearer ", "Basic b3BlcmF0b3I6eA=="} {
			got := s.call(op.Method, op.address(), "{}", "Authorization", credential)
			if got.status != 401 && got.status != 429 {
				t.Errorf("%s with credential %q: %d %s", op.ID, credential, got.status, got.body)
				continue
			}
			got.problem(t)
			if got.status == 401 && !strings.HasPrefix(got.header.Get("WWW-Authenticate"), `Bearer realm="redoubt"`) {
				t.Errorf("%s: WWW-Authenticate %q", op.ID, got.header.Get("WWW-Authenticate"))
			}
		}
	}
	if asked := s.Engine.Asked(); len(asked) != 0 {
		t.Errorf("policy was asked %d times for nobody", len(asked))
	}
}

// Fails if ask or decide is left out of the flow, or if a mode is heeded that only observes.
func TestEveryOperationAsksPolicy(t *testing.T) {
	s := serve(t)
	engine, err := eval.Compile([]eval.File{{Name: "p.cedar", Text: []byte("permit(principal, action, resource);")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []policy.Mode{policy.Enforce, policy.Observe} {
		s.Engine.Answer(policy.Deny, mode)
		for _, op := range s.operations() {
			if slices.Contains(public, op.ID) {
				continue
			}
			s.Engine.Asked()
			got := s.call(op.Method, op.address(), "{}")
			p := got.problem(t)
			if got.status != 403 || p.Decision == "" || p.Explanation == nil || p.Explanation.Summary != "the test says so" {
				t.Errorf("%s in %s: %d %s", op.ID, mode, got.status, got.body)
			}
			asked := s.Engine.Asked()
			if len(asked) != 1 {
				t.Errorf("%s: asked %d times", op.ID, len(asked))
				continue
			}
			q := asked[0]
			if q.Principal.UID != (policy.UID{Type: "User", ID: "operator"}) || q.Resource.UID != (policy.UID{Type: "Operation", ID: op.ID}) ||
				q.Action != policy.Action(policy.Access, "administer") || q.Point != "api" ||
				!slices.Contains(q.Resource.Parents, policy.UID{Type: "Operation", ID: op.Tags[0]}) ||
				q.Resource.Attrs["path"] != op.Path || q.Resource.Attrs["method"] != op.Method {
				t.Errorf("%s asks %+v", op.ID, q)
			}
			// The question must be of the published schema, or the engine could not decide it.
			if _, _, err := engine.Decide(t.Context(), &q); err != nil {
				t.Errorf("%s: the engine does not take the question: %v", op.ID, err)
			}
		}
	}
	s.Engine.Silence()
	if got := s.call("GET", "/v1/status", ""); got.status != 503 || got.problem(t).Code != "undecided" {
		t.Errorf("without an answer of the engine: %d %s", got.status, got.body)
	}
}

func TestDecisionsOfTheAPIAreRecorded(t *testing.T) {
	s := serve(t)
	s.call("GET", "/v1/machines", "", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	s.Engine.Answer(policy.Deny, policy.Enforce)
	denied := s.call("GET", "/v1/status", "").problem(t)
	s.Engine.Answer("", "")
	var found policy.Decision
	eventually(t, func() bool {
		page := into[client.Page[policy.Decision]](t, s.call("GET", "/v1/decisions?layer=access&verdict=deny", ""))
		for _, d := range page.Items {
			if string(d.ID) == denied.Decision {
				found = d
			}
		}
		return found.ID != ""
	})
	if found.Verdict != policy.Deny || found.Mode != policy.Enforce || found.Machine != "server" || found.Request.Resource.UID.ID != "get-status" {
		t.Errorf("recorded: %+v", found)
	}
	page := into[client.Page[policy.Decision]](t, s.call("GET", "/v1/decisions?verdict=permit", ""))
	if !slices.ContainsFunc(page.Items, func(d policy.Decision) bool {
		return d.Request.Resource.UID.ID == "list-machines" && d.Request.Trace == "0af7651916cd43dd8448eb211c80319c"
	}) {
		t.Error("the permitted decision, or its trace, is not recorded")
	}
	known := into[client.Known](t, s.call("GET", "/v1/decisions/"+denied.Decision, ""))
	if len(known.Told) != 1 || string(known.Told[0].Decision.ID) != denied.Decision {
		t.Errorf("known: %+v", known)
	}
}
