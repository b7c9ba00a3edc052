package fleettest_test

import (
	"testing"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/fleet/fleettest"
)

func TestMemory(t *testing.T) {
	fleettest.TestStores(t, func(*testing.T) fleet.Store { return &fleettest.Memory{} })
}
