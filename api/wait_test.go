package api_test

import (
	"testing"
	"time"
)

// eventually waits for what another goroutine does.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("it did not happen within 5 s")
}
