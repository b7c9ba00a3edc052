package settest_test

import (
	"testing"

	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/policy/set/settest"
)

func TestMemoryKeepsTheContracts(t *testing.T) {
	settest.TestStore(t, func() set.Store { return new(settest.Memory) })
	settest.TestOverrideStore(t, func() set.OverrideStore { return new(settest.Memory) })
}
