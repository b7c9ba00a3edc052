package story_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// startLimit bounds the start of a role. It tells one that hangs, on a machine that may be busy.
const startLimit = 60 * time.Second

// role is a running `redoubt server`, `agent` or `dev`.
type role struct {
	name  string
	cmd   *exec.Cmd
	log   transcript // its standard error
	ready map[string]any
	ended chan struct{} // closed once it is over
	err   error         // how it ended; to be read when ended is closed
}

// transcript keeps what a process says; safe to read meanwhile.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Write(p)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// startOn starts a command on the thread that outlives the tests.
func startOn(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	err := make(chan error)
	starts <- func() { err <- cmd.Start() }
	return <-err
}

// start starts a role and waits until it is ready.
func start(t testing.TB, args ...string) *role {
	t.Helper()
	r := tryStart(t, args...)
	if r.ready == nil {
		t.Fatalf("redoubt %s ended with exit code %d before it was ready:\n%s", strings.Join(args, " "), r.code(), &r.log)
	}
	return r
}

// tryStart starts a role and waits until it is ready, or over: then ready is nil.
func tryStart(t testing.TB, args ...string) *role { return tryStartWith(t, nil, args...) }

// tryStartWith is tryStart with another way to start the process.
func tryStartWith(t testing.TB, begin func(*exec.Cmd) error, args ...string) *role {
	t.Helper()
	r := &role{name: args[0], cmd: exec.Command(program.redoubt, append(args, "--json")...), ended: make(chan struct{})}
	r.cmd.Env, r.cmd.Stderr = environment(), &r.log
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if begin == nil {
		begin = startOn
	}
	if err := begin(r.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.kill()
		if t.Failed() {
			t.Logf("%s said:\n%s", strings.Join(args, " "), last(r.log.String(), 6000))
		}
	})
	line := make(chan []byte, 1)
	go func() {
		b := bufio.NewReader(out)
		first, _ := b.ReadBytes('\n')
		line <- first
		_, _ = io.Copy(io.Discard, b)
		r.err = r.cmd.Wait()
		close(r.ended)
	}()
	select {
	case first := <-line:
		if len(first) == 0 {
			<-r.ended
			return r
		}
		if err := json.Unmarshal(first, &r.ready); err != nil {
			t.Fatalf("the first line of redoubt %s is no JSON: %q", args[0], first)
		}
	case <-time.After(startLimit):
		t.Fatalf("redoubt %s was not ready within %s:\n%s", strings.Join(args, " "), startLimit, &r.log)
	}
	return r
}

func last(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

func (r *role) text(key string) string {
	s, _ := r.ready[key].(string)
	return s
}

// code is the exit code of a role that is over; -1 if a signal ended it.
func (r *role) code() int {
	<-r.ended
	return r.cmd.ProcessState.ExitCode()
}

func (r *role) running() bool {
	select {
	case <-r.ended:
		return false
	default:
		return true
	}
}

// kill is kill -9.
func (r *role) kill() {
	_ = r.cmd.Process.Kill()
	<-r.ended
}

// term is SIGTERM; it returns the exit code, and fails the test if the role does not end.
func (r *role) term(t testing.TB) int {
	t.Helper()
	r.signal(t, syscall.SIGTERM)
	select {
	case <-r.ended:
		return r.code()
	case <-time.After(30 * time.Second):
		t.Fatalf("%s did not end on SIGTERM:\n%s", r.name, last(r.log.String(), 4000))
		return 0
	}
}

func (r *role) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// says waits until a log line of the role, from now on or before, has every part.
func (r *role) says(t testing.TB, parts ...string) string {
	t.Helper()
	var found string
	eventually(t, 30*time.Second, "log of "+r.name+": "+strings.Join(parts, " … "), func() (bool, string) {
		text := r.log.String()
	lines:
		for line := range strings.Lines(text) {
			for _, p := range parts {
				if !strings.Contains(line, p) {
					continue lines
				}
			}
			found = line
			return true, ""
		}
		return false, last(text, 3000)
	})
	return found
}

// environment is ours without what would lead a command elsewhere.
func environment(more ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "REDOUBT_") && !strings.HasPrefix(kv, "SPIFFE_") {
			env = append(env, kv)
		}
	}
	return append(env, more...)
}

// result is what a command did.
type result struct {
	out, err string
	code     int
}

// command runs a program to its end.
func command(t testing.TB, env []string, stdin string, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environment(env...), strings.NewReader(stdin), &out, &errs
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// redoubt runs a verb.
func redoubt(t testing.TB, args ...string) result {
	t.Helper()
	return command(t, nil, "", append([]string{program.redoubt}, args...)...)
}

// must runs a verb that has to succeed, and returns its standard output.
func must(t testing.TB, args ...string) string {
	t.Helper()
	r := redoubt(t, args...)
	if r.code != 0 {
		t.Fatalf("redoubt %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// document runs a verb with --json and reads its answer.
func document[T any](t testing.TB, args ...string) T {
	t.Helper()
	var v T
	if out := must(t, append(args, "--json")...); json.Unmarshal([]byte(out), &v) != nil {
		t.Fatalf("redoubt %s: no JSON of that shape: %s", strings.Join(args, " "), out)
	}
	return v
}

// refused runs a verb that has to be refused with an exit code, and with every part in its answer.
func refused(t testing.TB, code int, parts []string, args ...string) {
	t.Helper()
	r := redoubt(t, args...)
	what := "redoubt " + strings.Join(args, " ")
	if r.code != code {
		t.Errorf("%s: exit code %d, want %d\n%s%s", what, r.code, code, r.out, r.err)
	}
	contains(t, what, r.out+r.err, parts...)
}
