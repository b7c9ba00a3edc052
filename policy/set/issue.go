package set

import (
	"errors"
	"fmt"
	"strings"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/refusal"
)

// The refusals of [Set.Issue]; compare with errors.Is.
var (
	// ErrNoIssuanceRule says that no rule matches the facts.
	ErrNoIssuanceRule = &refusal.Error{Code: "no-issuance-rule"}
	// ErrAmbiguousIssuance says that rules of one priority give different identities.
	ErrAmbiguousIssuance = &refusal.Error{Code: "ambiguous-issuance"}
	// ErrIssuanceTemplate says that the rule that matches cannot make an identity of these facts.
	ErrIssuanceTemplate = &refusal.Error{Code: "issuance-template"}
	// ErrReservedIdentity says that the rule would make an identity of an agent or a server.
	ErrReservedIdentity = &refusal.Error{Code: "reserved-identity"}
)

// Issuance explains which identity facts earn: every rule, and what became of it.
type Issuance struct {
	ID     identity.ID   `json:"id,omitzero"`      // zero if refused
	Winner string        `json:"winner,omitempty"` // name of the rule
	Rules  []RuleOutcome `json:"rules"`            // highest priority first
}

// RuleOutcome is what became of one issuance rule.
type RuleOutcome struct {
	Rule     string      `json:"rule"`
	File     string      `json:"file"`
	Line     int         `json:"line,omitempty"`
	Priority int64       `json:"priority"`
	Matched  bool        `json:"matched"`
	ID       identity.ID `json:"id,omitzero"` // what it would give, or gave
	Won      bool        `json:"won"`
	Why      string      `json:"why"` // one sentence
}

// builtinRule is the rule of a set that has none of its own.
var builtinRule = func() *IssuanceRule {
	template, _, _, _ := parseTemplate("/service/{" + identity.FactService + "}")
	return &IssuanceRule{
		Document: Document{Kind: KindIssuanceRule, Name: "builtin/service", File: builtinName},
		When:     "true", ID: "/service/{" + identity.FactService + "}", builtin: true, template: template,
	}
}()

// matches reports whether the rule's predicate holds, and why not in words.
func (r *IssuanceRule) matches(facts identity.FactSet, context policy.Record) (bool, string) {
	if r.builtin {
		if facts.Text(identity.FactService) == "" {
			return false, "the workload has no service: the fact " + identity.FactService + " is absent or empty"
		}
		return true, ""
	}
	ok, err := r.predicate.Match(context)
	switch {
	case err != nil:
		why := "its predicate could not be evaluated"
		if e := refusal.As(err); e != nil {
			why += ": " + e.Why
		}
		return false, why
	case !ok:
		return false, "its predicate does not hold"
	}
	return true, ""
}

// Issue returns the identity that these facts earn in the trust domain, and the explanation, which is there whether or
// not it is refused.
//
// Of the rules whose predicate holds, those of the highest priority count, and no others. Each of them must make an
// identity, and all of them the same one.
//
// Errors: match [ErrNoIssuanceRule], [ErrIssuanceTemplate], [ErrReservedIdentity] or [ErrAmbiguousIssuance].
// Trust: facts come from the agent of the workload's machine, which is trusted for that machine only. A set that gives
// identities to be relied on elsewhere should say in its predicates which machines may hold them.
func (s *Set) Issue(td identity.TrustDomain, facts identity.FactSet) (identity.ID, Issuance, error) {
	var out Issuance
	var top []int // indexes into out.Rules of the matching rules of highest priority
	refused := func(e *refusal.Error, why, do string) (identity.ID, Issuance, error) {
		return identity.ID{}, out, &refusal.Error{Kind: refusal.Denied, Code: e.Code, What: "identity of the workload", Why: why, Do: do}
	}
	context := eval.FactsRecord(facts)
	for _, r := range s.rules { // sorted by priority, highest first
		o := RuleOutcome{Rule: r.Name, File: r.File, Line: r.Line, Priority: r.Priority}
		o.Matched, o.Why = r.matches(facts, context)
		if o.Matched {
			o.Why = "its predicate holds, but a rule of higher priority matched"
			if len(top) == 0 || out.Rules[top[0]].Priority == r.Priority {
				top = append(top, len(out.Rules))
			}
		}
		out.Rules = append(out.Rules, o)
	}
	if len(top) == 0 {
		why := fmt.Sprintf("none of %d issuance rules matches its facts", len(s.rules))
		if len(s.rules) == 1 {
			why = "the only issuance rule, " + s.rules[0].Name + ", does not match: " + out.Rules[0].Why
		}
		return refused(ErrNoIssuanceRule, why, "see which facts it has with redoubt identity explain, and apply an IssuanceRule that they fulfil")
	}
	for _, i := range top {
		o, rule := &out.Rules[i], s.rules[i]
		id, err := rule.identity(td, facts)
		if err != nil {
			o.Why = "its predicate holds, but " + err.Why
			return refused(err, "the rule "+rule.Name+" matches, but "+err.Why, err.Do)
		}
		o.ID, o.Why = id, "its predicate holds"
	}
	first := &out.Rules[top[0]]
	for _, i := range top[1:] {
		if o := out.Rules[i]; o.ID != first.ID {
			return refused(ErrAmbiguousIssuance,
				fmt.Sprintf("the rules %s and %s, both of priority %d, give different identities", first.Rule, o.Rule, o.Priority),
				"give one of them a higher priority, or make their predicates exclude each other")
		}
	}
	first.Won, first.Why = true, "its predicate holds, and no rule of higher priority matched"
	out.ID, out.Winner = first.ID, first.Rule
	return out.ID, out, nil
}

// identity makes the identity of a rule that matches. Only Code, Why and Do of the refusal are set.
func (r *IssuanceRule) identity(td identity.TrustDomain, facts identity.FactSet) (identity.ID, *refusal.Error) {
	path, why := r.fill(facts)
	if why != "" {
		return identity.ID{}, &refusal.Error{
			Code: ErrIssuanceTemplate.Code, Why: why,
			Do: "give the workload that fact, or change the id of the rule",
		}
	}
	// A template's literal first segment was checked when it was parsed; with a placeholder in it, only now.
	if isReserved(path) {
		return identity.ID{}, &refusal.Error{
			Code: ErrReservedIdentity.Code, Why: "its id would be one of Redoubt's own (/" + strings.Join(reservedPaths, "/…, /") + "/…)",
			Do: "begin the id of the rule with a literal segment, like /service/…",
		}
	}
	id, err := identity.MakeID(td, path)
	if err != nil {
		why := "its id is no SPIFFE ID"
		if e := (*refusal.Error)(nil); errors.As(err, &e) {
			why = "its id is no SPIFFE ID: " + e.Why
		}
		return identity.ID{}, &refusal.Error{Code: ErrIssuanceTemplate.Code, Why: why, Do: "change the id of the rule"}
	}
	return id, nil
}
