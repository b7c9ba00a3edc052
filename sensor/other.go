//go:build !linux

package sensor

import (
	"context"
	"runtime"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// Probe returns the ledger of a system that is not Linux: it has no entries, since Redoubt uses no other kernel's
// facilities. It never fails.
func Probe(ctx context.Context, _ string) (*Ledger, error) {
	return &Ledger{Time: time.Now().UTC(), System: runtime.GOOS, Arch: runtime.GOARCH, Entries: []Capability{}}, ctx.Err()
}

func noBPFFS(what, dir string) error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: what + " " + dir,
		Why: runtime.GOOS + " has no bpffs", Do: "run the agent on Linux",
	}
}

// Mount is refused: only Linux has a bpffs. Errors: matches [ErrUnsupported].
func Mount(dir string) error { return noBPFFS("mount bpffs at", dir) }

// Unmount is refused: only Linux has a bpffs. Errors: matches [ErrUnsupported].
func Unmount(dir string) error { return noBPFFS("unmount bpffs at", dir) }

// Pins is refused: only Linux has a bpffs. Errors: matches [ErrUnsupported].
func Pins(dir string) ([]Pin, error) { return nil, noBPFFS("list pins below", dir) }

// Unpin is refused: only Linux has a bpffs. Errors: matches [ErrUnsupported].
func Unpin(dir string) (removed []string, err error) { return nil, noBPFFS("unpin below", dir) }
