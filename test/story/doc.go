// Package story holds the tests of the whole: they build the one binary, start real servers, agents and workloads with data
// directories of their own, break them (kill -9, full disks, wrong clocks, stolen credentials, ten thousand connections), and
// look from the outside, as an operator, a workload or an attacker would, at what is left.
//
// They need root and a cgroup v2 hierarchy, since what they start are workloads. Every machine of theirs has a subtree of
// cgroups of its own, and every trust domain a loopback address of its own, so that they run beside each other and beside
// whatever else is on the host.
package story
