// Package workload serves the SPIFFE Workload API on a unix socket: X.509-SVIDs, JWT-SVIDs and bundles, pushed again
// whenever they change, to workloads that prove nothing and are told apart by the kernel alone.
//
// # Who is calling
//
// The caller is the process that connected, as the kernel recorded it at connect(2) (see [Identify]). It is held by a
// pidfd, so that its pid cannot be taken over by another process, and it is looked at again before every single message:
// it must still live, in the cgroup it had when the connection was accepted. When it is gone its streams end, whoever
// else may hold the socket. A workload that hands its connected socket to another process has handed over its identity
// for as long as it lives itself, just as it could hand over its key.
//
// # What it is given
//
// That is the [Source]'s to say; this package neither signs nor decides.
//
// Trust: the peer of every connection is an attacker. Whatever it sends, keeps open or leaves unread is bounded per
// connection, per process, per user and in total; the bounds are counted as workloadapi_refused. Private keys pass
// through memory only and are never logged.
//
// Source: SPIFFE Workload Endpoint 1.0; SPIFFE Workload API 1.0, sections 4 to 6 and 8.
package workload

//go:generate sh -c "protoc -I . -I include --plugin=protoc-gen-go=$(go tool -n protoc-gen-go) --plugin=protoc-gen-go-grpc=$(go tool -n protoc-gen-go-grpc) --go_out=gen --go_opt=paths=source_relative --go-grpc_out=gen --go-grpc_opt=paths=source_relative workload.proto"
