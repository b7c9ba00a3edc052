// Package audit is the tamper-evident log of what was changed: a sequencer that drains an [Outbox] into a Tessera log in
// C2SP formats (tlog-tiles, signed checkpoints), and [Verify], which checks such a log from its files alone with other
// code than the writer's.
//
// The life of a leaf: a store writes a change and its event.Record in one transaction (the outbox row); the sequencer
// ([Log.Run]) adds pending rows in order, one batch at a time, waits until they are durably integrated, and marks each
// row with its index; a checkpoint that covers it is signed and published soon after. A leaf is never added while it is
// unknown whether a former attempt reached the log: at start and after every failure the tail of the log is compared
// with the outbox by record id.
//
// Files: Dir/signer.key (0600, the note signer), Dir/verifier.pub (the note verifier), and below Dir/log a log as
// https://c2sp.org/tlog-tiles lays it out (checkpoint, tile/…), which may be served as it is, and Tessera's own .state.
//
// Trust: the log proves that nothing was altered since a checkpoint that somebody else remembers. Who owns the server
// owns the signing key and can write another history; a remembered checkpoint ([Options.Since]) shows that. Verify
// treats every byte below the directory as attacker-controlled.
//
// Source: C2SP tlog-tiles v1, tlog-checkpoint v1, signed-note v1; RFC 6962, section 2.1.
package audit
