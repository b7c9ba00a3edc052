// Command redoubt is all of Redoubt in one binary: the roles (server, agent, dev) and the verbs that people and scripts
// use. One file a verb.
//
// Exit codes: 0 done, 1 refused or failed, 2 usage, 3 not reachable. `redoubt run` exits as the program does.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/sandbox"
)

// version is set at link time.
var version = "unversioned"

func main() {
	sandbox.Init() // in the re-executed init step of `redoubt run` this confines and never returns
	redoubt.SetVersion(version)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
	stop()
	os.Exit(code)
}

// streams are where a verb reads and writes, so that tests can stand in for a terminal.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// execute runs one command line and returns its exit code.
func execute(ctx context.Context, args []string, s streams) int {
	c := &cli{streams: s}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	err := root.ExecuteContext(ctx)
	var status exitStatus
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &status):
		return int(status)
	}
	return c.report(err)
}
