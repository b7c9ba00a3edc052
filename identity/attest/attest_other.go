//go:build !linux

package attest

import (
	"context"
	"runtime"

	"github.com/redoubtsec/redoubt/refusal"
)

func unsupported() error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: "attest",
		Why: "processes can be attested on Linux only, this is " + runtime.GOOS,
		Do:  "run the agent on a Linux machine; the CLI, server and gateway work here",
	}
}

// Attestor reads facts of processes; there are none on this system.
type Attestor struct{}

// New refuses: this system is not supported.
func New(Config) (*Attestor, error) { return nil, unsupported() }

// CgroupRoot refuses.
func (*Attestor) CgroupRoot() string { return "" }

// Process refuses.
func (*Attestor) Process(context.Context, int) (Subject, error) { return Subject{}, unsupported() }

// Resolve refuses.
func (*Attestor) Resolve(context.Context, string) (Target, error) { return Target{}, unsupported() }

// Containers refuses.
func (*Attestor) Containers(context.Context) ([]Subject, error) { return nil, unsupported() }

// CgroupRoot refuses.
func CgroupRoot() (string, error) { return "", unsupported() }

// CgroupIDOf refuses.
func CgroupIDOf(string) (uint64, error) { return 0, unsupported() }
