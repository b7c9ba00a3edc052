package set_test

import (
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

const tested = `
@id("stock") permit(principal in Service::"orders", action == Net::Action::"connect", resource == Service::"stock")
when { context has source && context.source.isInRange(ip("10.0.0.0/8")) && principal.hasTag("stage") && principal.getTag("stage") == "live" };
@id("night") forbid(principal, action == Access::Action::"login", resource) when { context has now && context.now > datetime("2026-01-01T00:00:00Z") };
@id("ann") permit(principal == User::"ann", action == Access::Action::"login", resource in Group::"hosts")
when { context has approvals && context.approvals.contains(User::"bob") };
`

const tests = `
trust_domain: corp.example
tests:
  - name: orders reaches stock
    facts: {workload.service: orders, machine.id: m1, label.stage: live, unix.uid: 1000, process.parents: [/bin/sh]}
    identity: /service/orders
    request: {action: Net::connect, resource: 'Service::"stock"', context: {source: {__extn: {fn: ip, arg: 10.1.2.3}}, port: 80, tls: true}}
    expect: permit
    policy: stock
  - name: ann logs in
    request:
      principal: User::"ann"
      action: Access::Action::"login"
      resource: Machine::"m1"
      context: {approvals: [{__entity: {type: User, id: bob}}], now: {__extn: {fn: datetime, arg: "2025-06-01T00:00:00Z"}}}
      entities:
        - {uid: 'Machine::"m1"', parents: ['Group::"hosts"'], attrs: {name: one}, tags: {rack: r1}}
    expect: permit
  - name: ann logs in too late
    request: {principal: 'User::"ann"', action: Access::login, resource: 'Machine::"m1"', context: {now: {__extn: {fn: datetime, arg: "2026-06-01T00:00:00Z"}}}}
    expect: deny
    policy: night
  - name: wrong verdict
    request: {principal: 'User::"eve"', action: Access::login, resource: 'Machine::"m1"'}
    expect: permit
  - name: wrong policy
    request: {principal: 'User::"eve"', action: Access::login, resource: 'Machine::"m1"'}
    expect: deny
    policy: night
  - name: wrong identity
    facts: {workload.service: orders}
    identity: /service/stock
    request: {action: Net::connect, resource: 'Service::"stock"'}
    expect: deny
  - name: no identity
    facts: {unix.uid: 7}
    identity: /service/stock
    request: {action: Net::connect, resource: 'Service::"stock"'}
    expect: deny
  - name: never touch
    facts: {workload.service: dns, machine.id: m1}
    request: {action: Net::connect, resource: 'Address::"192.0.2.1"', machine: m1}
    expect: permit
`

func TestRunsPolicyTests(t *testing.T) {
	s := mustParse(t, cedarFile(tested))
	results, err := set.RunTests(t.Context(), s, []set.File{{Name: "x_test.yaml", Content: tests}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		name   string
		passed bool
		got    policy.Verdict
		why    string
	}{
		{"orders reaches stock", true, policy.Permit, "permitted by stock"},
		{"ann logs in", true, policy.Permit, "permitted by ann"},
		{"ann logs in too late", true, policy.Deny, "forbidden by night"},
		{"wrong verdict", false, policy.Deny, "expected permit, got deny: "},
		{"wrong policy", false, policy.Deny, "the verdict is as expected, but night did not decide it"},
		{"wrong identity", false, "", "expected the identity /service/stock, got /service/orders"},
		{"no identity", false, "", "expected the identity /service/stock: identity of the workload: "},
		{"never touch", true, policy.Permit, "never-touch list"},
	} {
		if i >= len(results) {
			t.Fatalf("%d results", len(results))
		}
		r := results[i]
		if r.Name != want.name || r.Passed != want.passed || r.Got != want.got || !strings.Contains(r.Why, want.why) || r.File != "x_test.yaml" || r.Line == 0 {
			t.Errorf("want %+v, got %+v", want, r)
		}
	}
	if results[0].Line != 4 || results[0].Decision.Request.Principal.UID.ID != "spiffe://corp.example/service/orders" {
		t.Errorf("%+v", results[0])
	}
}

func TestRefusesPolicyTests(t *testing.T) {
	s := mustParse(t)
	request := func(text string) string {
		return "tests:\n- {name: x, expect: deny, request: {" + text + "}}\n"
	}
	const ok = `principal: 'User::"a"', action: Access::login, resource: 'Machine::"m"'`
	for name, c := range map[string]struct{ text, code, says string }{
		"unknown key":      {"tests: []\nextra: 1\n", set.CodeKey, "extra: there is no such key"},
		"no tests":         {"trust_domain: x\n", set.CodeKey, "tests: the key is missing"},
		"no name":          {"tests:\n- {expect: deny, request: {" + ok + "}}\n", set.CodeKey, "tests[0].name: the key is missing"},
		"unknown verdict":  {"tests:\n- {name: x, expect: maybe, request: {" + ok + "}}\n", set.CodeValue, "tests[0].expect: it is not one of"},
		"no request":       {"tests:\n- {name: x, expect: deny}\n", set.CodeKey, "tests[0].request: the key is missing"},
		"no principal":     {request(`action: Access::login, resource: 'Machine::"m"'`), set.CodeValue, "either from facts or from request.principal"},
		"two principals":   {"tests:\n- {name: x, expect: deny, facts: {unix.uid: 1}, request: {" + ok + "}}\n", set.CodeValue, "either from facts or"},
		"identity alone":   {"tests:\n- {name: x, expect: deny, identity: /a, request: {" + ok + "}}\n", set.CodeValue, "there are no facts to earn it"},
		"no entity":        {request(ok[:10] + ` 'ann', action: Access::login, resource: 'Machine::"m"'`), set.CodeValue, "request.principal: it is no entity"},
		"entity twice":     {request(ok + `, entities: [{uid: 'User::"a"'}, {uid: 'User::"a"'}]`), set.CodeDuplicate, "the entity is there twice"},
		"a fraction":       {request(ok + `, context: {port: 1.5}`), set.CodeType, "request.context.port: it is no whole number"},
		"nothing":          {request(ok + `, context: {port: }`), set.CodeType, "request.context.port: it is empty"},
		"no address":       {request(ok + `, context: {source: {__extn: {fn: ip, arg: ten}}}`), set.CodeValue, "it is no address"},
		"no time":          {request(ok + `, context: {now: {__extn: {fn: datetime, arg: noon}}}`), set.CodeValue, "it is no time"},
		"another function": {request(ok + `, context: {now: {__extn: {fn: decimal, arg: "1.0"}}}`), set.CodeValue, "it is not one of"},
		"a bad fact":       {"tests:\n- {name: x, expect: deny, facts: {unix.uid: {a: b}}, request: {action: Access::login, resource: 'Machine::\"m\"'}}\n", set.CodeValue, "a fact's name or value"},
		"trust domain":     {"trust_domain: A B\ntests: []\n", set.CodeValue, "it is no trust domain"},
		"not UTF-8":        {"\xff", set.CodeFile, "it is not UTF-8"},
		"large":            {strings.Repeat("#", set.MaxFileBytes+1), set.CodeBounds, "it is larger"},
		"many":             {"tests: [" + strings.Repeat("{}, ", set.MaxTests+1) + "]\n", set.CodeValue, "it does not have 1 to 10000 items"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := set.RunTests(t.Context(), s, []set.File{{Name: "x_test.yaml", Content: c.text}})
			wantProblem(t, err, c.code, c.says)
		})
	}
	half := "tests:\n" + strings.Repeat("- {name: x, expect: deny, request: {"+ok+"}}\n", set.MaxTests/2+1)
	_, err := set.RunTests(t.Context(), s, []set.File{{Name: "a_test.yaml", Content: "tests: []\n"}, {Name: "../b_test.yaml", Content: half}})
	wantProblem(t, err, set.CodeFile, "test file 2: its name is no relative path")
}
