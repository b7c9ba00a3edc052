//go:build linux && !amd64

package sandbox

// haveForeignCalls says that this build can make system calls of another architecture: arm64 has no entry for them that
// 64-bit code could reach, and a 32-bit program's are denied by the same rule of the filter.
const haveForeignCalls = false

func foreignCalls() outcome {
	return outcome{Name: ProtectForeign, Refused: true, How: "there is no such entry"}
}
