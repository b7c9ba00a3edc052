//go:build race

package eval_test

// racing says that the race detector is on, which allocates on its own.
const racing = true
