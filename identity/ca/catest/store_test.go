package catest_test

import (
	"testing"

	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/identity/ca/catest"
)

func TestMemoryKeepsTheContract(t *testing.T) {
	catest.TestStore(t, func() ca.Store { return &catest.Store{} })
}
