package set_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/policy/set"
)

func mustParse(t testing.TB, files ...set.File) *set.Set {
	t.Helper()
	s, err := set.Parse(files)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func yml(text string) set.File       { return set.File{Name: "set.yaml", Content: text} }
func cedarFile(text string) set.File { return set.File{Name: "set.cedar", Content: text} }

// everything has one document of every kind, with every key.
const everything = `
kind: IssuanceRule
name: by-service
spec: {when: 'context has service && context.machine.id == "m1"', id: "/service/{workload.service}", priority: 10}
---
kind: Service
name: orders
spec:
  description: takes orders
  owner: team-shop
  groups: [backend]
  endpoints:
    - {address: 10.0.0.5, port: 8080, protocol: http, machine: m1}
    - {address: orders.internal, port: 5432, protocol: tcp}
  openapi:
    openapi: 3.1.0
    info: {title: Orders, version: "1"}
    paths:
      /orders/{id}:
        get: {operationId: get-order, responses: {"200": {description: ok}}}
--- # a comment on the marker
kind: Address
name: partners
spec: {description: who we buy from, cidrs: [192.0.2.0/24, "2001:db8::/32"], names: [api.example.com, "*.example.net"], groups: [outside]}
---
kind: Mode
name: orders-enforced
spec: {for: {service: orders, machine: m1, labels: {stage: live}}, namespaces: [Run, Net, Api], mode: enforce}
---
kind: Mode
name: access
spec: {for: {all: true}, namespaces: [Access], mode: enforce}
---
kind: Route
name: shop
spec: {hosts: [shop.example.com], paths: [/orders], methods: [GET, POST], service: orders, strip_prefix: true, timeout: 30s}
---
kind: Issuer
name: corp
spec:
  url: https://idp.example.com
  audiences: [redoubt]
  jwks_url: https://idp.example.com/keys
  algorithms: [ES256]
  claims: {user: sub, groups: groups}
  client_id: redoubt
  client_secret_file: /etc/redoubt/corp.secret
---
kind: Response
name: cut-off
spec: {when: {score: 80, layers: [runtime], signals: [reverse-shell]}, for: {all: true}, actions: [quarantine, notify], lasts: 1h}
`

func TestParsesEveryKind(t *testing.T) {
	s := mustParse(t, yml(everything), cedarFile(`@id("a") permit(principal, action == Net::Action::"connect", resource);`))
	if n := len(s.Services()) + len(s.Addresses()) + len(s.Modes()) + len(s.Routes()) + len(s.Issuers()) + len(s.Responses()) + len(s.Rules()); n != 8 {
		t.Errorf("%d documents, want 8", n)
	}
	if v := s.Services()[0]; v.Line != 6 || v.Owner != "team-shop" || len(v.Endpoints) != 2 || !strings.Contains(string(v.OpenAPI), `"operationId":"get-order"`) {
		t.Errorf("service: %+v", v)
	}
	if m := s.Modes()[0]; m.For.String() != "service=orders,machine=m1,label.stage=live" || m.Mode != policy.Enforce {
		t.Errorf("mode: %+v", m)
	}
	if r := s.Responses()[0]; r.Score != 80 || r.Lasts.Hours() != 1 {
		t.Errorf("response: %+v", r)
	}
	for _, ref := range s.Policies() {
		if ref.File != "set.cedar" && !strings.HasPrefix(ref.ID, "builtin/") {
			t.Errorf("policy %+v", ref)
		}
	}
}

func TestTheDigestIsOfNamesAndContents(t *testing.T) {
	a, b := set.File{Name: "a.yaml", Content: "# 1"}, set.File{Name: "b.yaml", Content: "# 2"}
	one := mustParse(t, a, b)
	if two := mustParse(t, b, a); one.Digest() != two.Digest() {
		t.Error("the order of files must not count")
	}
	for _, other := range [][]set.File{{a}, {{Name: "a.yaml", Content: "# 2"}, b}, {{Name: "c.yaml", Content: "# 1"}, b}} {
		if mustParse(t, other...).Digest() == one.Digest() {
			t.Errorf("%v has the same digest", other)
		}
	}
	if d := cmp.Diff([]set.File{a, b}, mustParse(t, b, a).Files()); d != "" {
		t.Error(d)
	}
}

// doc renders a document of a kind with this spec, in flow form.
func doc(kind, spec string) string { return "kind: " + kind + "\nname: x\nspec: " + spec + "\n" }

func TestRefusesWhatItDoesNotKnow(t *testing.T) {
	service := func(spec string) string { return doc("Service", spec) }
	route := func(more string) string { return doc("Route", "{hosts: [a.example], service: s, "+more+"}") }
	issuer := func(more string) string { return doc("Issuer", "{audiences: [a], "+more+"}") }
	openapi := func(text string) string { return service("{openapi: " + text + "}") }
	rule := func(id string) string { return doc("IssuanceRule", `{when: "true", id: "`+id+`"}`) }
	for name, c := range map[string]struct{ text, code, says string }{
		"unknown kind":           {doc("Widget", "{}"), set.CodeKind, "set.yaml:1: Widget/x: kind: there is no such kind; use one of: IssuanceRule, "},
		"missing kind":           {"name: x\nspec: {}\n", set.CodeKey, "set.yaml:1: kind: the key is missing"},
		"missing name":           {"kind: Mode\nspec: {for: {all: true}, namespaces: [Run], mode: enforce}\n", set.CodeKey, "name: the key is missing"},
		"missing spec":           {"kind: Mode\nname: x\n", set.CodeKey, "Mode/x: spec: the key is missing"},
		"empty spec":             {"kind: Mode\nname: x\nspec:\n", set.CodeType, "Mode/x: spec: it is empty, not a mapping"},
		"unknown top key":        {"kind: Mode\nname: x\nspecs: {}\n", set.CodeKey, "specs: there is no such key here; use only: kind, name, spec"},
		"unknown key":            {service("{endpoint: []}"), set.CodeKey, "set.yaml:3: Service/x: spec.endpoint: there is no such key here"},
		"duplicate key":          {service("{owner: a, owner: b}"), set.CodeDuplicate, "spec.owner: the key is there twice"},
		"duplicate name":         {service("{}") + "---\n" + service("{}"), set.CodeDuplicate, "set.yaml:5: Service/x: name: there is a document of this kind and name at set.yaml:1"},
		"a list for a document":  {"- kind: Mode\n", set.CodeType, "set.yaml:1: it is a list, not a mapping"},
		"text for a number":      {service(`{endpoints: [{address: a, port: "80", protocol: tcp}]}`), set.CodeType, "spec.endpoints[0].port: it is text, not a whole number"},
		"number for a text":      {service("{owner: 7}"), set.CodeType, "spec.owner: it is a whole number, not text; put it in quotes"},
		"a key that is no text":  {service("{7: a}"), set.CodeType, "a key is a whole number, not text"},
		"port out of range":      {service("{endpoints: [{address: a, port: 65536, protocol: tcp}]}"), set.CodeValue, "port: it is not a decimal number from 1 to 65535"},
		"octal":                  {service("{endpoints: [{address: a, port: 0o17, protocol: tcp}]}"), set.CodeValue, "port: it is not a decimal number"},
		"unknown protocol":       {service("{endpoints: [{address: a, port: 1, protocol: udp}]}"), set.CodeValue, "protocol: it is not one of the words known here; use one of: http, tcp"},
		"address with a port":    {service("{endpoints: [{address: 'a:80', port: 1, protocol: tcp}]}"), set.CodeValue, "address: it is neither"},
		"group twice":            {service("{groups: [a, a]}"), set.CodeDuplicate, "spec.groups[1]: the item is there twice"},
		"empty list":             {service("{groups: []}"), set.CodeValue, "spec.groups: it does not have 1 to 64 items"},
		"name with blanks":       {"kind: Service\nname: a b\nspec: {}\n", set.CodeValue, "name: it is no plain name"},
		"name too long":          {"kind: Service\nname: " + strings.Repeat("a", 129) + "\nspec: {}\n", set.CodeValue, "it does not have 1 to 128 bytes"},
		"range with host bits":   {doc("Address", "{cidrs: [10.0.0.1/8]}"), set.CodeValue, "the range is 10.0.0.0/8"},
		"no range":               {doc("Address", "{cidrs: [ten]}"), set.CodeValue, "spec.cidrs[0]: it is no range of addresses"},
		"address of nothing":     {doc("Address", "{}"), set.CodeKey, "it declares neither cidrs nor names"},
		"address named like one": {"kind: Address\nname: 10.0.0.1\nspec: {cidrs: [10.0.0.0/8]}\n", set.CodeReserved, "the name is an IP address"},
		"upper-case host":        {doc("Address", "{names: [API.example.com]}"), set.CodeValue, "it is no lower-case host name"},
		"mode of nothing":        {doc("Mode", "{for: {}, namespaces: [Run], mode: enforce}"), set.CodeValue, "spec.for: it selects nothing"},
		"mode of all and some":   {doc("Mode", "{for: {all: true, service: a}, namespaces: [Run], mode: enforce}"), set.CodeValue, "it selects all and names properties as well"},
		"unknown namespace":      {doc("Mode", "{for: {all: true}, namespaces: [Disk], mode: enforce}"), set.CodeValue, "spec.namespaces[0]: it is not one of the words"},
		"unknown mode":           {doc("Mode", "{for: {all: true}, namespaces: [Run], mode: off}"), set.CodeValue, "spec.mode: it is not one of the words"},
		"route to nowhere":       {doc("Route", "{hosts: [a.example]}"), set.CodeKey, "spec.service: the key is missing"},
		"route with dots":        {route("paths: [/a/../b]"), set.CodeValue, "spec.paths[0]: it has a relative segment"},
		"route with encoding":    {route("paths: [/a%2fb]"), set.CodeValue, "spec.paths[0]: it is no plain path"},
		"route with a method":    {route("methods: [BREW]"), set.CodeValue, "spec.methods[0]: it is not one of"},
		"route without unit":     {route("timeout: '30'"), set.CodeValue, "spec.timeout: it is not a span from 1s to 1h0m0s"},
		"two routes for one":     {route("") + "---\n" + strings.Replace(route("methods: [GET]"), "name: x", "name: y", 1), set.CodeDuplicate, "Route/x answers a.example/ for the same methods"},
		"issuer without TLS":     {issuer("url: 'http://a.example'"), set.CodeValue, "spec.url: it is not https"},
		"issuer with a query":    {issuer("url: 'https://a.example?x'"), set.CodeValue, "spec.url: it has a query or fragment"},
		"issuer and HMAC":        {issuer("url: 'https://a.example', algorithms: [HS256]"), set.CodeValue, "spec.algorithms[0]: it is not one of"},
		"issuer without a place": {issuer("url: 'https://a.example', client_secret_file: secret"), set.CodeValue, "it is no absolute path"},
		"response of score 101":  {doc("Response", "{when: {score: 101}, actions: [notify]}"), set.CodeValue, "spec.when.score: it is not a decimal number from 1 to 100"},
		"response that explodes": {doc("Response", "{when: {score: 1}, actions: [explode]}"), set.CodeValue, "spec.actions[0]: it is not one of"},
		"openapi 2":              {openapi("{openapi: '2.0', paths: {}}"), set.CodeValue, "spec.openapi.openapi: its version is not 3.0.x or 3.1.x"},
		"openapi path":           {openapi("{openapi: 3.1.0, paths: {orders: {}}}"), set.CodeValue, "a path does not begin with a slash"},
		"openapi method":         {openapi("{openapi: 3.1.0, paths: {/orders: {fetch: {}}}}"), set.CodeKey, "spec.openapi.paths./orders.fetch: there is no such key here"},
		"openapi reference":      {openapi("{openapi: 3.1.0, paths: {/a: {get: {$ref: 'https://evil.example/x'}}}}"), set.CodeValue, "a $ref leads out of the document"},
		"openapi twice":          {openapi("{openapi: 3.1.0, paths: {/a: {get: {operationId: o}, put: {operationId: o}}}}"), set.CodeDuplicate, "put.operationId: another operation has the same id"},
		"alias":                  {"kind: Service\nname: x\nspec: {owner: &a b, groups: [*a]}\n", set.CodeSyntax, "anchors and aliases are not taken"},
		"alias without anchor":   {"kind: Service\nname: x\nspec: {owner: *hunter2}\n", set.CodeSyntax, "it is not well-formed"},
		"tag":                    {"kind: Service\nname: x\nspec: {owner: !!binary aGk=}\n", set.CodeSyntax, "explicit tags are not taken"},
		"merge key":              {"kind: Service\nname: x\nspec: {<<: {owner: a}}\n", set.CodeSyntax, "merge keys are not taken"},
		"syntax":                 {"kind: Service\nname: x\nspec: {owner: a\n", set.CodeSyntax, "YAML: did not find expected"},
		"too deep":               {service(strings.Repeat("[", 40) + strings.Repeat("]", 40)), set.CodeBounds, "nested more than 32 deep"},
		"a hidden document":      {"kind: Service\nname: x\nspec: {}\r---\rkind: Mode\nname: y\n", set.CodeSyntax, "another document follows"},
		"rule without when":      {doc("IssuanceRule", "{id: /a}"), set.CodeKey, "spec.when: the key is missing"},
		"rule of no predicate":   {doc("IssuanceRule", `{when: "1 +", id: /a}`), set.CodeValue, "IssuanceRule/x: spec.when: "},
		"rule over principals":   {doc("IssuanceRule", `{when: "principal.x == 1", id: /a}`), set.CodeValue, "spec.when: it speaks of principal"},
		"template without slash": {rule("service/x"), set.CodeValue, "spec.id: it does not begin with a slash"},
		"template with a gap":    {rule("/a//b"), set.CodeValue, "a segment is empty"},
		"template upwards":       {rule("/a/.."), set.CodeValue, "a segment is empty, relative"},
		"template encoded":       {rule("/a%2f"), set.CodeValue, "a character that SPIFFE does not allow"},
		"template open":          {rule("/a/{workload.service"), set.CodeValue, "a brace is not closed"},
		"template closed":        {rule("/a/workload.service}"), set.CodeValue, "a brace is not closed"},
		"template of two":        {rule("/{workload.service}{machine.id}"), set.CodeValue, "two placeholders"},
		"template of nothing":    {rule("/a/{}"), set.CodeValue, "there is no such fact"},
		"template of unknown":    {rule("/a/{workload.color}"), set.CodeValue, "{workload.color}: there is no such fact"},
		"template of a path":     {rule("/a/{executable.path}"), set.CodeValue, "a path has slashes"},
		"template of a list":     {rule("/a/{process.parents}"), set.CodeValue, "it is a list"},
		"reserved machine":       {rule("/machine/{machine.id}"), set.CodeReserved, "/machine/… names Redoubt's own agents and servers"},
		"reserved redoubt":       {rule("/redoubt/server"), set.CodeReserved, "/redoubt/… names Redoubt's own"},
		"reserved bare":          {rule("/machine"), set.CodeReserved, "/machine/… names Redoubt's own"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := set.Parse([]set.File{yml(c.text)})
			wantProblem(t, err, c.code, c.says)
		})
	}
}

// wantProblem expects a problem of this code whose text has this in it.
func wantProblem(t *testing.T, err error, code, says string) {
	t.Helper()
	var problems set.Problems
	if !errors.As(err, &problems) {
		t.Fatalf("got %v, want Problems", err)
	}
	for _, p := range problems {
		if p.Code == code && strings.Contains(p.Error(), says) {
			if p.Kind == "" || p.What == "" || p.Why == "" || p.Do == "" {
				t.Errorf("an incomplete refusal: %+v", p)
			}
			return
		}
	}
	t.Errorf("no problem %s with %q in:\n%v", code, says, err)
}

func TestAModeCannotObserveAccess(t *testing.T) {
	_, err := set.Parse([]set.File{yml(doc("Mode", "{for: {all: true}, namespaces: [Run, Access], mode: observe}"))})
	wantProblem(t, err, set.CodeValue, "Access is never observed")
}

func manyRoutes(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "---\nkind: Route\nname: r%d\nspec: {hosts: [h%d.example], service: s}\n", i, i)
	}
	return b.String()
}

func TestRefusesFiles(t *testing.T) {
	for name, c := range map[string]struct {
		files []set.File
		code  string
		says  string
	}{
		"absolute name":       {[]set.File{{Name: "/etc/a.yaml"}}, set.CodeFile, "no relative path"},
		"name upwards":        {[]set.File{{Name: "../a.yaml"}}, set.CodeFile, "no relative path"},
		"control character":   {[]set.File{{Name: "a\x1b[2J.yaml"}}, set.CodeFile, "a character that is not taken"},
		"other ending":        {[]set.File{{Name: "a.txt"}}, set.CodeFile, "ends in none of"},
		"two of a name":       {[]set.File{{Name: "a.yaml"}, {Name: "a.yaml"}}, set.CodeDuplicate, "two files of this name"},
		"tests":               {[]set.File{{Name: "a_test.yaml"}}, set.CodeFile, "it holds tests"},
		"built-in name":       {[]set.File{{Name: "builtin/redoubt.cedar"}}, set.CodeReserved, "Redoubt's own"},
		"built-in in capital": {[]set.File{{Name: "BUILTIN/x.cedar"}}, set.CodeReserved, "Redoubt's own"},
		"built-in policy id":  {[]set.File{cedarFile(`@id("builtin/mine") permit(principal, action, resource);`)}, set.CodeReserved, "begins with builtin/"},
		"no UTF-8":            {[]set.File{yml("a: \xff")}, set.CodeFile, "not UTF-8"},
		"a large file":        {[]set.File{yml(strings.Repeat("#", set.MaxFileBytes+1))}, set.CodeBounds, "larger than 1048576 bytes"},
		"a long value":        {[]set.File{yml("a: " + strings.Repeat("b", 64<<10+1))}, set.CodeBounds, "a value is longer"},
		"many nodes":          {[]set.File{yml("a: [" + strings.Repeat("1,", 50_000) + "]")}, set.CodeBounds, "more than 50000 keys and values"},
		"many documents":      {[]set.File{yml(strings.Repeat("---\na: b\n", set.MaxDocuments+1))}, set.CodeBounds, "more than 5000 documents"},
		"many routes":         {[]set.File{yml(manyRoutes(1001))}, set.CodeBounds, "more than 1000 routes"},
		"bad policy":          {[]set.File{cedarFile("permit(principal, action, resource) when { context.nonsense };")}, "policy-invalid", "set.cedar#1"},
		"same id as built-in": {[]set.File{cedarFile(`@id("builtin/operators-administer") permit(principal, action, resource);`)}, "policy-duplicate-id", "same name"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := set.Parse(c.files)
			wantProblem(t, err, c.code, c.says)
		})
	}
	t.Run("many files", func(t *testing.T) {
		files := make([]set.File, set.MaxFiles+1)
		for i := range files {
			files[i].Name = fmt.Sprintf("%d.yaml", i)
		}
		_, err := set.Parse(files)
		wantProblem(t, err, set.CodeBounds, "more than 1000 files")
	})
	t.Run("many bytes", func(t *testing.T) {
		var files []set.File
		for i := range set.MaxBytes/set.MaxFileBytes + 1 {
			files = append(files, set.File{Name: fmt.Sprintf("%d.yaml", i), Content: strings.Repeat("#", set.MaxFileBytes)})
		}
		_, err := set.Parse(files)
		wantProblem(t, err, set.CodeBounds, "larger than 8388608 bytes together")
	})
	t.Run("many policies", func(t *testing.T) {
		var files []set.File
		for i := range 2 {
			files = append(files, set.File{Name: fmt.Sprintf("%d.cedar", i), Content: strings.Repeat("permit(principal, action, resource);\n", set.MaxPolicies/2)})
		}
		_, err := set.Parse(files)
		wantProblem(t, err, set.CodeBounds, "more than 10000 policies")
	})
}

func TestTellsAllProblemsAtOnceAndInOrder(t *testing.T) {
	_, err := set.Parse([]set.File{
		{Name: "b.yaml", Content: doc("Widget", "{}") + "---\n{\n---\n" + doc("Mode", "{for: {all: true}, namespaces: [Run], mode: off, extra: 1}")},
		{Name: "a.yaml", Content: doc("Service", "{owner: 1}")},
		{Name: "c.cedar", Content: "permit(principal, action);\nforbid(principal, action, resource) when { principal.nonsense };"},
	})
	var problems set.Problems
	if !errors.As(err, &problems) {
		t.Fatal(err)
	}
	var got []string
	for _, p := range problems {
		got = append(got, strings.SplitN(p.What, ": ", 2)[0])
	}
	want := []string{"a.yaml:3", "b.yaml:1", "b.yaml:5", "b.yaml:9", "b.yaml:9"}
	if len(got) < 7 {
		t.Fatalf("%d problems, want 7 or more:\n%v", len(got), err)
	}
	if d := cmp.Diff(want, got[:5]); d != "" {
		t.Errorf("%s\n%v", d, err)
	}
}

func TestTellsABoundedNumberOfProblems(t *testing.T) {
	_, err := set.Parse([]set.File{yml(strings.Repeat("---\nkind: Widget\n", 3000))})
	var problems set.Problems
	if !errors.As(err, &problems) || len(problems) != set.MaxProblems {
		t.Fatalf("%d problems, want %d", len(problems), set.MaxProblems)
	}
	if last := problems[len(problems)-1].Why; last != fmt.Sprintf("there are %d more problems", 3000*2-set.MaxProblems+1) {
		t.Errorf("last: %s", last)
	}
}

// TestNeverRepeatsWhatMayBeASecret puts a secret into every place where one could slip, and looks for it in what is said.
func TestNeverRepeatsWhatMayBeASecret(t *testing.T) {
	const secret = "hunter2=s3cr3t!"
	for name, text := range map[string]string{
		"an inline secret":   doc("Issuer", "{url: 'https://a.example', audiences: [a], client_secret: '"+secret+"'}"),
		"a URL with one":     doc("Issuer", "{url: 'https://u:"+secret+"@a.example', audiences: [a]}"),
		"a wrong type":       doc("Issuer", "{url: ['"+secret+"'], audiences: '"+secret+"', client_secret_file: '"+secret+"'}"),
		"a key":              doc("Issuer", "{'"+secret+"': x}"),
		"a claim":            doc("Issuer", "{url: 'https://a.example', audiences: [a], claims: {user: ['"+secret+"']}}"),
		"an action":          doc("Response", "{when: {score: 1}, actions: ['"+secret+"']}"),
		"a span":             doc("Response", "{when: {score: 1}, actions: [notify], lasts: '"+secret+"'}"),
		"a kind":             "kind: '" + secret + "'\nname: '" + secret + "'\nspec: {}\n",
		"broken syntax":      "kind: Issuer\nname: x\nspec: {url: '" + secret + "\n",
		"an alias":           "kind: Issuer\nname: x\nspec: {url: *" + secret + "}\n",
		"a tab":              "kind: Issuer\nspec:\n\turl: " + secret + "\n",
		"a bad directive":    "%" + secret + "\nkind: Issuer\n",
		"a tag":              "kind: !" + secret + " Issuer\n",
		"an openapi version": doc("Service", "{openapi: {openapi: '"+secret+"', paths: {'"+secret+"': {'"+secret+"': 1}}}}"),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := set.Parse([]set.File{yml(text)})
			if err == nil {
				t.Fatal("it must be refused")
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "s3cr3t") {
				t.Errorf("it repeats the value: %v", err)
			}
		})
	}
	_, err := set.Parse([]set.File{yml(doc("Issuer", "{url: 'https://a.example', audiences: [a], client_secret: x}"))})
	wantProblem(t, err, set.CodeKey, "put it in a file on the server and give client_secret_file")
}

func TestSaysWhatNothingActsOn(t *testing.T) {
	s := mustParse(t, yml(everything), cedarFile(`@id("net") forbid(principal, action in [Net::Action::"connect", Net::Action::"listen"], resource);
		@id("access") permit(principal, action == Access::Action::"login", resource);`))
	var got []string
	for _, n := range set.Unenforced(s) {
		got = append(got, n.String())
	}
	for i, want := range []string{
		"not done yet: set.cedar: policy/net: no point acts in Net yet",
		"not done yet: set.yaml:6: Service/orders: the OpenAPI document",
		"not done yet: set.yaml:26: Mode/orders-enforced: no point acts in Run yet",
		"not done yet: set.yaml:26: Mode/orders-enforced: no point acts in Net yet",
		"not done yet: set.yaml:26: Mode/orders-enforced: no point acts in Api yet",
		"not done yet: set.yaml:34: Route/shop: there is no gateway yet",
		"not done yet: set.yaml:38: Issuer/corp: no login",
		"not done yet: set.yaml:49: Response/cut-off: there is no detection yet",
	} {
		if i >= len(got) || !strings.HasPrefix(got[i], want) {
			t.Errorf("notice %d: want %q in\n%s", i, want, strings.Join(got, "\n"))
		}
	}
	if n := len(set.Unenforced(s, policy.Run, policy.Net, policy.API, policy.Access)); n != len(got)-4 {
		t.Errorf("%d notices with every namespace acted in, want %d", n, len(got)-4)
	}
	if n := set.Unenforced(mustParse(t)); len(n) != 0 {
		t.Errorf("the built-in set has notices: %v", n)
	}
}

func TestKnowsTheActionsOfTheSchema(t *testing.T) {
	var text strings.Builder
	namespace := ""
	for line := range strings.SplitSeq(string(eval.Schema()), "\n") {
		if rest, ok := strings.CutPrefix(line, "namespace "); ok {
			namespace = strings.Fields(rest)[0]
		}
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), `action "`); ok {
			name, _, _ := strings.Cut(rest, `"`)
			fmt.Fprintf(&text, "@id(\"%s-%s\") forbid(principal, action == %s::Action::%q, resource);\n", namespace, name, namespace, name)
		}
	}
	s := mustParse(t, cedarFile(text.String()))
	if got, want := len(set.Unenforced(s, "none")), strings.Count(text.String(), "forbid"); got != want || want == 0 {
		t.Errorf("%d notices for %d actions: the table of actions is behind the schema", got, want)
	}
}

func TestSelectorsReadWhatTheyWrite(t *testing.T) {
	for _, text := range []string{"service=orders", "machine=m1", "label.app=orders", "service=orders,machine=m1,label.a=b,label.c=d=e"} {
		s, err := set.ParseSelector(text)
		if err != nil || s.String() != text {
			t.Errorf("%s: %v, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "orders", "service=", "service=a,service=b", "label.a=b,label.a=c", "color=red", "service=a b", "label.=x", "label.a=" + strings.Repeat("x", 257)} {
		if s, err := set.ParseSelector(text); !errors.Is(err, set.ErrSelector) {
			t.Errorf("%s: %v, %v, want ErrSelector", text, s, err)
		}
	}
	var many []string
	for i := range 17 {
		many = append(many, fmt.Sprintf("label.l%d=x", i))
	}
	if _, err := set.ParseSelector(strings.Join(many, ",")); !errors.Is(err, set.ErrSelector) {
		t.Errorf("17 labels: %v", err)
	}
}
