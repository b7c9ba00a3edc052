// Package api is the management API: REST under /v1, described by the OpenAPI 3.1 document at /v1/openapi.json, with
// RFC 9457 problems for every answer that is not a success. The CLI is its client.
//
// The life of a request is the five steps of flow.go: identify who asks, ask the policy engine whether they may
// administer this operation, decide, act, tell. Reading is an operation like any other. This point always enforces: the
// panic switch lifts enforcement for workloads, never the question of who may administer.
//
// Trust: callers are attackers until identified. Headers, queries and bodies are bounded, parsed strictly, and never
// repeated in an answer or a log line. Only public keys (/v1/bundle) and this API's own description are served without
// a credential. Operators prove themselves by a 256-bit bearer credential of which the server keeps a hash; machines by
// their SVID, which is verified here against the trust domain's bundle and the register of machines, whatever the TLS
// listener did. TLS itself is the roof's. Whoever is nobody yet takes no place that an operator needs: they have places of
// their own, few seconds for an answer, and per address a bounded number of connections (see [Bound]).
package api
