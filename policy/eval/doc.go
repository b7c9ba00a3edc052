// Package eval answers policy requests: it parses Cedar policies, validates them against the published schema, indexes
// them by scope, decides, and explains.
//
// [Compile] makes an immutable [Engine]; [Engine.Decide] answers a [policy.Request]. Cedar's own evaluator (cedar-go)
// gives every answer: the index only chooses which policies it is asked about, and tests hold both to the same answers on
// random policies and on Cedar's published corpus. [CompilePredicate] compiles a single condition over facts, which
// issuance rules use. [Evaluate] speaks Cedar's own JSON formats.
//
// Trust: policy text comes from whoever may apply policies, and predicates and files may be hostile all the same:
// everything is bounded before it is parsed, and parsers are fuzzed. Names and attributes in a request may come from
// attackers; they are data, never text that is parsed.
//
// Source: Cedar language 4 (docs.cedarpolicy.com), as implemented by github.com/cedar-policy/cedar-go v1.9.0.
package eval
