//go:build !linux

package main

import (
	"context"

	"github.com/redoubtsec/redoubt/refusal"
)

// attackResult is what an attacker saw, from its own side.
type attackResult struct {
	Got      string `json:"got"`
	Evidence string `json:"evidence"`
}

func (c *cli) attackInWorkload(context.Context, string, string) error {
	return &refusal.Error{
		Kind: refusal.Unsupported, Code: "not-linux", What: "the demo", Why: "workloads need Linux", Do: "run it on a Linux machine as root",
	}
}
