// Package set is the registry of what `redoubt apply` takes: policies, issuance rules, services, addresses and modes, as
// one [Set] that is parsed whole or refused whole, kept as numbered [Edition]s with confirmation and return.
//
// A [Set] answers three questions. [Set.Decide]: may this happen (through policy/eval), in which mode, and does the
// never-touch list or the un-lock rule change the answer? [Set.Issue]: which identity do these facts earn? And
// [Unenforced]: which words of the set does no point act on yet?
//
// A [Registry] holds the set in force on the server. [Registry.Run] returns an edition that nobody confirmed and ends
// overrides that ran out, also after a restart, since their deadlines are in the [Store].
//
// # What the set decides by itself
//
//   - Modes: without a Mode document, Run, Net and Api are observed and Access is enforced. Access is never observed, nor
//     released, nor is any namespace this package does not know.
//   - Issuance: a set without an IssuanceRule has the built-in `/service/{workload.service}`; the first rule an operator
//     writes replaces it. Nothing can issue /machine/… or /redoubt/…, which name agents and servers.
//   - Never touch: sshd, dns, dhcp, ntp and redoubt-agent pass in Run and Net unless a forbid names them in its scope.
//   - Un-lock: the local operator can always administer policy sets, whatever the set in force says, so that a policy
//     that forbids everything can be rolled back.
//
// Trust: files come from an authenticated operator, but are parsed as hostile bytes: strictly, within bounds, without
// aliases or tags, and no message repeats a value that might be a secret. Facts come from agents and requests from
// points; names in them may be chosen by attackers and are data only. The [Store] is trusted.
package set
