// Package redoubt is the roof: it wires the rooms into roles, one role a file, in straight lines. [Server] is the control
// plane, [Agent] the part on every machine, [Dev] both of them in one process for one machine.
//
// Trust: docs/threat-model.md. The roof holds no rules of its own; it only says which room is plugged into which.
package redoubt
