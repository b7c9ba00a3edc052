package workload

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxSocketPath is the longest path of a unix socket on Linux, without the final zero (unix(7)).
const maxSocketPath = 107

// ErrSocket is the code of the refusal to listen on a path.
var ErrSocket = &refusal.Error{Code: "workload-socket"}

// Listen returns a listener on a unix socket that every local user may connect to: who is served is decided by caller. A
// socket that a killed agent left is replaced, one that is served is not. The directory must exist; every workload must
// be able to search it, and none to write to it.
//
// Errors: matches [ErrSocket], or the system's.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, socketRefusal(refusal.Invalid, path, fmt.Sprintf("the path is longer than %d bytes", maxSocketPath), "choose a shorter one")
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen for workloads: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return nil, socketRefusal(refusal.Conflict, path, "there is something else of that name", "move it away, or choose another path")
	default:
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			_ = conn.Close()
			return nil, socketRefusal(refusal.Conflict, path, "another process serves it", "stop the other agent, or choose another path")
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("listen for workloads: %w", err)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen for workloads: %w", err)
		}
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for workloads: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("listen for workloads: %w", err)
	}
	return ln, nil
}

func socketRefusal(kind refusal.Kind, path, why, do string) error {
	return &refusal.Error{Kind: kind, Code: ErrSocket.Code, What: "Workload API on " + path, Why: why, Do: do}
}
