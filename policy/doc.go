// Package policy holds the words for MAY: the [Request] (principal, action, resource, context), the [Decision] with its
// [Explanation], and the [Mode] it is given in. It does no I/O and knows no engine: policy/eval answers requests, points
// ask and act.
//
// A refusal is a value ([Deny]); an error means that the engine could not decide. A point in enforce that gets an error
// refuses.
//
// Trust: names and attributes in a request may come from attackers; engines treat them as data only.
package policy
