package attest_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
)

// player is the first argument by which this test program plays a process; the next names what it does.
const player = "play-process"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == player {
		os.Exit(play(os.Args[2], os.Args[3:]))
	}
	os.Exit(m.Run())
}

func play(what string, args []string) int {
	switch what {
	case "sleep":
	case "deep": // a chain of this many parents
		if n, _ := strconv.Atoi(args[0]); n > 0 {
			cmd := exec.Command("/proc/self/exe", player, "deep", strconv.Itoa(n-1))
			cmd.Stdout = os.Stdout
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			_ = cmd.Run()
			return 0
		}
		fmt.Println(os.Getpid())
	case "mixed":
		if err := unix.Setresuid(1, 2, 1); err != nil { // this thread, which is the first: the one that proc shows
			fmt.Println(err)
			return 1
		}
	case "bind": // shows its own file at the path of another
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return 1
		}
		if err := unix.Mount(args[1], args[0], "", unix.MS_BIND, ""); err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println(unix.Exec(args[0], []string{args[0], player, "sleep"}, nil))
		return 1
	case "bind-later": // the same, when it is told to: a file system of its own over the directory, without the file in the end
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1))
		data, _ := os.ReadFile(args[1])
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return 1
		}
		if err := unix.Mount("none", filepath.Dir(args[0]), "tmpfs", 0, ""); err != nil {
			return 1
		}
		_ = os.WriteFile(args[0], data, 0o755)
		fmt.Println(unix.Exec(args[0], []string{args[0], player, "delete", args[0]}, nil))
		return 1
	case "delete":
		_ = os.Remove(args[0])
		time.Sleep(time.Minute)
	case "memfd":
		fd, _ := unix.MemfdCreate(args[0], 0)
		data, _ := os.ReadFile("/proc/self/exe")
		_ = os.WriteFile(fmt.Sprintf("/proc/self/fd/%d", fd), data, 0o755)
		fmt.Println(unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), []string{"x", player, "sleep"}, nil))
		return 1
	case "attest": // as whoever runs this
		a, err := attest.New(attest.Config{})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		pid, _ := strconv.Atoi(args[0])
		s, err := a.Process(context.Background(), pid)
		fmt.Printf("err=%v path=%q sha=%q uid=%t\n%s\n", err, s.Facts.Text(identity.FactExePath), s.Facts.Text(identity.FactExeSHA256), has(s, identity.FactUID), strings.Join(s.Warnings, "\n"))
		return 0
	case "reuse":
		return playReuse()
	}
	fmt.Println("ready")
	time.Sleep(time.Minute)
	return 0
}

func has(s attest.Subject, fact string) bool {
	_, ok := s.Facts.Get(fact)
	return ok
}

// started starts a command that says a line once it is ready, and returns its pid and that line.
func started(t *testing.T, cmd *exec.Cmd) (int, string) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	b := make([]byte, 200)
	n, err := out.Read(b)
	if err != nil {
		t.Fatalf("%v said nothing: %v", cmd.Args, err)
	}
	return cmd.Process.Pid, strings.TrimSpace(string(b[:n]))
}

// playing starts this test program as a process.
func playing(t *testing.T, args ...string) int {
	t.Helper()
	pid, said := started(t, exec.Command("/proc/self/exe", append([]string{player}, args...)...))
	if said != "ready" {
		t.Fatalf("the player said %q", said)
	}
	return pid
}

// sleeping starts path, a copy of this test program.
func sleeping(t *testing.T, path string, args ...string) int {
	t.Helper()
	pid, said := started(t, exec.Command(path, append([]string{player, "sleep"}, args...)...))
	if said != "ready" {
		t.Fatalf("the player said %q", said)
	}
	return pid
}

// copied copies this test program to a file and returns its SHA-256.
func copied(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("this test makes cgroups or namespaces, which only root can")
	}
}

func attestor(t *testing.T, c attest.Config) *attest.Attestor {
	t.Helper()
	if c.RuncRoots == nil {
		c.RuncRoots = []string{t.TempDir()}
	}
	a, err := attest.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func facts(t *testing.T, a *attest.Attestor, pid int) attest.Subject {
	t.Helper()
	s, err := a.Process(t.Context(), pid)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func wantWarning(t *testing.T, s attest.Subject, part string) {
	t.Helper()
	if !strings.Contains(strings.Join(s.Warnings, "\n"), part) {
		t.Errorf("no warning of %q among %q", part, s.Warnings)
	}
}

func wantText(t *testing.T, s attest.Subject, fact, want string, source identity.Source) {
	t.Helper()
	f, ok := s.Facts.Get(fact)
	switch {
	case want == "" && ok:
		t.Errorf("%s is %v, from %s; there should be none", fact, f.Value, f.Source)
	case want != "" && (f.Value != want || f.Source != source || f.Evidence == ""):
		t.Errorf("%s is %+v, want %q from %s", fact, f, want, source)
	}
}

// cgroups makes cgroups below the root and removes them, innermost first, when the test ends.
func cgroups(t *testing.T, a *attest.Attestor, paths ...string) {
	t.Helper()
	needRoot(t)
	for _, p := range paths {
		dir := filepath.Join(a.CgroupRoot(), p)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for range 200 {
				if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
			t.Errorf("%s could not be removed", dir)
		})
	}
}

// enter moves a process into a cgroup.
func enter(t *testing.T, a *attest.Attestor, cgroup string, pid int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(a.CgroupRoot(), cgroup, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

type counts map[string]int64

func (c counts) Count(name string, n int64, labels ...string) {
	c[strings.TrimSpace(name+" "+strings.Join(labels, " "))] += n
}
