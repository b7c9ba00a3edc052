// Package local is the agent's own door: HTTP and JSON on a unix socket, for root of the machine. It is what `redoubt run`,
// `enroll`, `release`, `doctor` and `identity explain` speak with, and it works while the server is away.
//
// Trust: the socket is 0600 and its directory 0700, and every caller's uid is read from the kernel (SO_PEERCRED): only root
// and the user the agent runs as are answered. That caller is root of the machine and trusted for it; what it sends is
// bounded and checked all the same.
package local
