//go:build !linux

package workload

import (
	"net"
	"os"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

func unsupported() error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: "not-linux", What: "Workload API",
		Why: "who calls it can be told on Linux only", Do: "run the agent on Linux",
	}
}

func identify(*net.UnixConn, Options) (*Caller, error)       { return nil, unsupported() }
func cgroupNow(*Caller) (uint64, error)                      { return 0, unsupported() }
func exited(*os.File) bool                                   { return true }
func waitExit(*os.File)                                      {}
func sinceBoot() time.Duration                               { return 0 }
func unifiedRoot() (string, error)                           { return "", unsupported() }
func peerIDs(*net.UnixConn) (pid int, uid uint32, err error) { return 0, 0, unsupported() }
func descriptors() int                                       { return 1 << 10 }
