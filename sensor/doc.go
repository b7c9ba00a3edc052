// Package sensor is the kernel's door: what this kernel lets Redoubt do (the capability [Ledger]), and the bpffs on which
// programs and links outlive the process that loaded them ([Mount], [Pins], [Unpin]).
//
// The ledger is measured, never inferred. Kernels list an LSM and refuse its programs, are built with a feature and locked
// out of it, or have features of later versions ported back; so each capability is a tiny program that is really loaded,
// and attached where attaching is what fails. Attaching is done to objects made for the purpose (a cgroup, a network
// namespace, a file) that are gone when [Probe] returns.
//
// Trust: nothing outside is read but the kernel's answers. Everything here needs root; without it the ledger is true for
// the caller, and says that it was not root.
package sensor
