// Package sqlite keeps every durable thing of the server in one SQLite database: CA keys (sealed), editions of the
// policy set, overrides, machines, join tokens, workloads, the change log, decisions, events, and the audit outbox.
//
// A mutating method takes an event.Record and writes the change and its outbox row in one transaction: there is no
// change without its record and no record without its change. The database runs in WAL mode with synchronous=FULL:
// what a method acknowledged survives kill -9 and power loss. One connection writes, a small pool reads.
//
// Views: a [Store] hands out one small type per interface that an engine or registry declares ([Store.Keys],
// [Store.Editions], [Store.Outbox]…), so that nobody holds an object that can do everything.
//
// Trust: the file is trusted as far as its owner is; it is checked at [Open] (type, owner application, schema version,
// quick_check) and refused, never repaired or overwritten. Values are bound, never spliced into SQL. Keys are sealed
// before they get here, tokens are hashed.
package sqlite
