// Package spool keeps events on disk until whoever they are for has acknowledged them: a bounded, segmented queue that
// survives being killed, and that counts what it loses.
//
// # What can be lost, and how one learns of it
//
// [Spool.Emit] never waits. An event is in memory until [Spool.Run] has written it, usually within a millisecond; it then
// survives the end of the process, kill -9 included. It survives a power cut once it is synced: every SyncEvery (one
// second), when a segment is full, and before [Spool.Next] hands it out. So an event that was handed out is on disk, and
// its sequence number will never mean another event.
//
// What is on disk is kept until it is acknowledged: when the spool is full it is the new event that is dropped, so that
// a flood cannot wash away what came before it. Every loss is counted as spool_lost with its reason, and told to the
// reader as an event of kind [KindLost] in its place in the queue. After a kill or power cut the number of those that
// were in memory is unknown; the event then says how many it can have been at most.
//
// # On disk
//
// A directory with files of frames, each named by the sequence number of its first frame; a frame carries its own
// sequence number and checksum, so that what follows a damaged place is found again and the gap can be counted exactly.
// The file `state` holds what is acknowledged and what was lost but not yet told.
//
// Trust: the directory belongs to root of the machine (0700); its content is parsed defensively nevertheless, as disks
// and crashes damage it. Events may hold values an attacker chose; none is a secret.
package spool
