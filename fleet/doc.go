// Package fleet is the server's view of the domain: the machines that joined and the tokens they joined with, the
// workloads present on them, the identities those were given, what was revoked or quarantined, what agents said
// happened, and the change log from which every agent follows all of it.
//
// An agent proves which machine it is and is believed about that machine only: which workloads are present, and the
// facts that kernel, container engine and operator vouch for. Everything else is the server's word: the machine of a
// workload, its identity (issuance rules, see [Rules]), quarantine and revocation. Identities are signed for workloads
// present, and for nobody ahead of need.
//
// Trust: the store and the authority are trusted. Agents are trusted for their own machine and nothing else; every
// argument that comes from one (token, CSR, report, instance, events) is attacker-controlled and bounded here. Facts
// whose source is the server cannot come from an agent.
package fleet
