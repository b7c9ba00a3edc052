// Package backup makes and restores a copy of the server's state while the server runs: database, audit log, key
// material and configuration, as one tar stream encrypted to a passphrase with age.
//
// Order: the database is snapshotted first, the audit log after it. A leaf is marked in the database only once the log
// holds it, so a log copied later holds every leaf that the snapshot calls logged; leaves that the snapshot still calls
// pending may be in the copy too, and the sequencer finds them there by record id. The other order would leave marks
// without leaves, which audit.Open refuses. The copy of the log may end with records of changes that the snapshot lacks:
// they did happen, and a restored server continues after them. Checkpoints that the old server published after the
// back-up are not extended by the restored one: audit.Verify since such a checkpoint says so, rightly.
//
// Trust: an archive is attacker-controlled until its passphrase opened it, and its content is checked even then: names,
// types, sizes, hashes, and the audit log as a whole. Nothing is written outside the target directory, which must be
// empty. The passphrase appears in no error or log. Who has archive and passphrase has the authority's keys.
//
// Source: age v1 (https://c2sp.org/age), scrypt recipient stanza.
package backup
