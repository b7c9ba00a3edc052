// Package event holds the words for WHAT HAPPENED: the [Event] of one layer, the audit [Record] of a change, and the
// [Meter] that counts what every bound dropped or refused. It does no I/O.
//
// Trust: Attrs may hold values an attacker chose; readers escape them. No secret is ever put into an event.
package event
