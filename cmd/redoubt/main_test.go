package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/redoubtsec/redoubt/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Init() // the test binary stands for redoubt, and so is re-executed by it
	testscript.Main(cleaning{m}, map[string]func(){"redoubt": main})
}

// cleaning removes what the tests built.
type cleaning struct{ *testing.M }

func (c cleaning) Run() int {
	code := c.M.Run()
	if builtIn != "" {
		_ = os.RemoveAll(builtIn)
	}
	return code
}

// TestScripts proves every verb by txtar scripts: offline ones, and those that speak to a `redoubt dev` of their own.
func TestScripts(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("ROOT", root)
			env.Setenv("REDOUBT_DATA", filepath.Join(env.WorkDir, "data"))
			env.Setenv("NO_COLOR", "1")
			return nil
		},
		Condition: func(cond string) (bool, error) { return cond == "root" && os.Geteuid() == 0, nil },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await": await,
		},
	})
}

// await waits until a command succeeds: await [-out REGEXP] PROGRAM ARGS…
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: await [-out REGEXP] PROGRAM ARGS…")
	}
	var want *regexp.Regexp
	if args[0] == "-out" {
		want, args = regexp.MustCompile(args[1]), args[2:]
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil && (want == nil || want.MatchString(ts.ReadFile("stdout"))) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v: %v", args, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

var builtIn string // the directory of built, once it is made

// built is the real binary, built once, in a place that any user may pass.
var built = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "redoubt-cmd")
	if err != nil {
		return "", err
	}
	builtIn = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	name := filepath.Join(dir, "redoubt")
	if out, err := exec.Command("go", "build", "-o", name, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return name, nil
})

func binary(t *testing.T) string {
	t.Helper()
	name, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestREADME runs every command that the README shows, in its order, as a reader would.
func TestREADME(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the README's tour makes cgroups")
	}
	binary := binary(t)
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	script.WriteString("set -e\ntrap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf \"$REDOUBT_DATA\"' EXIT\n")
	commands := 0
	for _, block := range regexp.MustCompile("(?s)```console\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		for line := range strings.Lines(block[1]) {
			command, ok := strings.CutPrefix(strings.TrimSpace(line), "$ ")
			if !ok {
				continue
			}
			commands++
			if strings.HasPrefix(command, "install bin/redoubt ") {
				continue // the binary under test is in PATH, where everybody may run it
			}
			command = strings.ReplaceAll(command, "d-…", "$(redoubt get decisions --json | grep -o 'd-[0-9a-v]*' | head -1)")
			script.WriteString("echo '+ " + strings.ReplaceAll(command, "'", `'\''`) + "'\n" + command + "\n")
			switch {
			case strings.Contains(command, "redoubt dev"):
				script.WriteString("for i in $(seq 100); do [ -S $REDOUBT_DATA/agent/agent.sock ] && break; sleep 0.1; done\n")
			case strings.HasSuffix(command, "&"):
				script.WriteString("for i in $(seq 100); do redoubt get workloads | grep -q spiffe && break; sleep 0.1; done\n")
			}
		}
	}
	if commands < 15 {
		t.Fatalf("found %d commands in the README: has its form changed?", commands)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script.String())
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"spiffe://redoubt.local/service/orders", "spiffe://redoubt.local/service/web", "stays in force", "nothing found"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the tour never showed %q:\n%s", want, out.String())
		}
	}
}

// TestDemo runs the demo: what it says must be what its attackers saw, and enough must be refused.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the demo makes cgroups")
	}
	cmd := exec.Command(binary(t), "demo", "--once", "--json")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, stderr.String())
	}
	var report demoReport
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, s := range report.Steps {
		if s.Got != s.Expected {
			t.Errorf("%s: expected %s, got %s (%s)", s.Name, s.Expected, s.Got, s.Evidence)
		}
		if s.Got == "refused" {
			refused++
			if s.Evidence == "" {
				t.Errorf("%s: refused without evidence", s.Name)
			}
		}
	}
	if refused < 9 || len(report.Protections) < 10 || report.Machine == nil || len(report.Machine.Entries) == 0 {
		t.Errorf("%d refused, %d protections: the story has lost parts", refused, len(report.Protections))
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), demoPrefix+"*")); len(left) != 0 {
		t.Errorf("the demo left %v", left)
	}
}

// TestReferenceIsCurrent compares docs/cli with what the commands say of themselves.
func TestReferenceIsCurrent(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	if code := execute(t.Context(), []string{"docs", "--to", dir}, streams{in: strings.NewReader(""), out: &out, err: &out}); code != 0 {
		t.Fatal(out.String())
	}
	pages, _ := filepath.Glob(filepath.Join(dir, "*.md"))
	if len(pages) < 40 {
		t.Fatalf("only %d pages", len(pages))
	}
	for _, page := range pages {
		want, _ := os.ReadFile(page)
		got, err := os.ReadFile(filepath.Join("../../docs/cli", filepath.Base(page)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not current: run make generate", filepath.Base(page))
		}
	}
}
