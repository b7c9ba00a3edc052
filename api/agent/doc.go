// Package agent is the agent API: the server's end (gRPC, redoubt.agent.v1), and the client that the agent speaks with.
//
// An agent joins once, by a token whose root hash tells it the server from an impostor, and speaks by its own X509-SVID
// from then on. Down come the changes of the domain ([Client.Session] → [Receiver]), resumed where they were last
// applied; up go events from a queue on disk ([Spool]), acknowledged once they are stored. A refusal crosses the wire whole:
// what a [refusal.Error] says on the server it says on the client.
//
// Trust: the server believes of a certificate what it verified itself, on every call: chain against the bundle now, key
// against the one registered, and that nothing of it is revoked. Every message of an agent is attacker-controlled and
// bounded, and so are connections: a few seconds and few places for those who show no good certificate. The client trusts the server whose root it was given; it sends nothing to any other.
//
// Source: RFC 8446; X509-SVID 1.0; RFC 5280.
package agent

//go:generate ./generate.sh
