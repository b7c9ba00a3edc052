package story_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// program is what TestMain built: the one binary, an independent SPIFFE client, and these tests themselves as a program
// that workloads can run.
var program struct {
	dir     string // 0755, so that workloads may run what is in it
	redoubt string
	spiffe  string
	self    string
	cgroups string // below the unified root: everything of this run
}

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == playing {
		os.Exit(play(os.Args[2], os.Args[3:]))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() == 0 {
		if err := build(); err != nil {
			fmt.Fprintln(os.Stderr, "story: "+err.Error())
			return 1
		}
		defer func() { _ = os.RemoveAll(program.dir) }()
		go starting()
	}
	code := m.Run()
	if program.cgroups != "" {
		for _, root := range hierarchies() {
			removeCgroups(filepath.Join(root, program.cgroups))
		}
	}
	return code
}

// build makes the programs, once.
func build() error {
	dir, err := os.MkdirTemp("", "rs")
	if err != nil {
		return err
	}
	program.dir, program.cgroups = dir, "/"+filepath.Base(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	program.redoubt, program.spiffe, program.self = filepath.Join(dir, "redoubt"), filepath.Join(dir, "spiffeclient"), filepath.Join(dir, "story")
	// Static, as `make build` makes it: one of the workloads is an empty container.
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "../../cmd/redoubt", "../spiffeclient")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	return os.WriteFile(program.self, raw, 0o755)
}

// starts takes what starts a child. One thread starts them all and stays as long as the tests do: the children ask the
// kernel to be killed when it is gone (PR_SET_PDEATHSIG), so that a test run that is killed leaves no server behind.
var starts = make(chan func())

func starting() {
	runtime.LockOSThread()
	for start := range starts {
		start()
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("it starts workloads in cgroups of their own, which needs root")
	}
	if _, err := unifiedRoot(); err != nil {
		t.Skip(err)
	}
}

func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed; make prerequisites installs it as root", name)
	}
	return path
}

// unifiedRoot is where the cgroup v2 hierarchy is mounted: the first one, since tests of escapes may mount more.
func unifiedRoot() (string, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(raw)) {
		before, after, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(before); strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted")
}

func unified(t testing.TB) string {
	t.Helper()
	root, err := unifiedRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// hierarchies are the mounts of cgroups of either version: a container engine makes its cgroups in all of them.
func hierarchies() (mounts []string) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(raw)) {
		before, after, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(before); strings.HasPrefix(after, "cgroup") && len(fields) > 4 && strings.HasPrefix(fields[4], "/sys/") {
			mounts = append(mounts, fields[4])
		}
	}
	return mounts
}

// removeCgroups ends what still runs in a subtree of ours and removes it.
func removeCgroups(top string) {
	if _, err := os.Stat(top); err != nil {
		return
	}
	_ = os.WriteFile(filepath.Join(top, "cgroup.kill"), []byte("1"), 0)
	for range 100 {
		var dirs []string
		_ = filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			_ = os.Remove(dir)
		}
		if _, err := os.Stat(top); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// eventually asks again and again until ok, or fails the test with what was seen last. Time limits are generous: they tell
// that something never comes, not how fast it is.
func eventually(t testing.TB, within time.Duration, what string, ask func() (ok bool, saw string)) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		ok, saw := ask()
		if ok {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s; last seen: %s", what, within, saw)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// contains fails the test unless text has every part.
func contains(t testing.TB, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s does not say %q:\n%s", what, p, text)
		}
	}
}

func writeFile(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// copyFile copies a file, for its owner only.
func copyFile(t testing.TB, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = src.Close() }()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Close()); err != nil {
		t.Fatal(err)
	}
}

// counted numbers what has to have a name of its own in this run.
var counted atomic.Int64
