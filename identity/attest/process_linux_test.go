package attest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestFactsOfAProcess(t *testing.T) {
	a := attestor(t, attest.Config{})
	path := filepath.Join(t.TempDir(), ") R 1 (") // the command name that proc shows is hostile
	sum := copied(t, path)
	s := facts(t, a, sleeping(t, path, strings.Repeat("x", 100<<10), strings.Repeat("y", 100<<10)))
	wantText(t, s, identity.FactExePath, path, identity.FromKernel)
	wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)
	if f, _ := s.Facts.Get(identity.FactUID); f.Value != int64(os.Geteuid()) || f.Source != identity.FromKernel {
		t.Errorf("got %+v", f)
	}
	if f, _ := s.Facts.Get(identity.FactGID); f.Value != int64(os.Getegid()) {
		t.Errorf("got %+v", f)
	}
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if f, _ := s.Facts.Get(identity.FactParents); len(f.Value.([]string)) == 0 || f.Value.([]string)[0] != own {
		t.Errorf("got %+v", f)
	}
	if id, err := attest.CgroupIDOf(filepath.Join(a.CgroupRoot(), s.Cgroup)); err != nil || id != s.CgroupID || id == 0 {
		t.Errorf("got %d, want %d, %v", s.CgroupID, id, err)
	}
	if s.Start == 0 || len(s.Warnings) != 0 {
		t.Errorf("got %+v", s)
	}
	again := facts(t, a, s.PID)
	if again.Facts.Digest() != s.Facts.Digest() || again.Start != s.Start {
		t.Error("two readings of one process differ")
	}
}

func wantRefusal(t *testing.T, err error, code *refusal.Error) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Errorf("got %v, want %s", err, code.Code)
	} else if e := refusal.As(err); e.Why == "" || e.Do == "" || e.What == "" {
		t.Errorf("half a refusal: %+v", e)
	}
}

func TestWhatIsNoProcess(t *testing.T) {
	meter := counts{}
	a := attestor(t, attest.Config{Meter: meter})
	for _, pid := range []int{0, -1} {
		_, err := a.Process(t.Context(), pid)
		wantRefusal(t, err, attest.ErrNotProcess)
	}
	_, err := a.Process(t.Context(), 1<<30)
	wantRefusal(t, err, attest.ErrGone)

	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	_, err = a.Process(t.Context(), cmd.Process.Pid)
	wantRefusal(t, err, attest.ErrGone)

	zombie := exec.Command("/bin/true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, zombie.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	_, err = a.Process(t.Context(), zombie.Process.Pid)
	wantRefusal(t, err, attest.ErrGone)
	_ = zombie.Wait()

	if comm, err := os.ReadFile("/proc/2/comm"); err == nil && string(comm) == "kthreadd\n" {
		_, err = a.Process(t.Context(), 2)
		wantRefusal(t, err, attest.ErrKernelThread)
	}
	tids := make(chan int)
	go func() {
		runtime.LockOSThread()
		tids <- unix.Gettid()
		<-tids
	}()
	if tid := <-tids; tid != os.Getpid() {
		_, err = a.Process(t.Context(), tid)
		wantRefusal(t, err, attest.ErrNotProcess)
	}
	close(tids)
	if meter["attest_refused code process-gone"] != 3 {
		t.Errorf("counted %v", meter)
	}
}

// The process ends between the reading and the check, and is waited for: its pid is free for others.
func TestAProcessThatEndsMeanwhileHasNoFacts(t *testing.T) {
	a := attestor(t, attest.Config{})
	for _, reap := range []bool{true, false} {
		cmd := exec.Command("/proc/self/exe", player, "sleep")
		pid, _ := started(t, cmd)
		a.Between(func() {
			_ = cmd.Process.Kill()
			if reap {
				_ = cmd.Wait()
			} else {
				var info unix.Siginfo
				_ = unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
			}
		})
		_, err := a.Process(t.Context(), pid)
		wantRefusal(t, err, attest.ErrGone)
	}
}

// A real reuse, in a pid namespace of its own, where the next pid can be chosen: the victim ends while it is read, and
// the impostor has its pid.
func TestPidReuseIsRefused(t *testing.T) {
	needRoot(t)
	cmd := exec.Command("/proc/self/exe", player, "reuse")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "reused\nprocess-gone\n" {
		t.Errorf("%v: %s", err, out)
	}
}

func playReuse() int {
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("proc", "/proc", "proc", 0, "")); err != nil {
		fmt.Println(err)
		return 1
	}
	a, err := attest.New(attest.Config{})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	start := func() *exec.Cmd {
		cmd := exec.Command("/bin/sleep", "60")
		_ = cmd.Start()
		return cmd
	}
	victim := start()
	pid := victim.Process.Pid
	a.Between(func() {
		_ = victim.Process.Kill()
		_ = victim.Wait()
		for range 100 { // threads of this program take numbers too
			_ = os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0)
			if impostor := start(); impostor.Process.Pid == pid {
				fmt.Println("reused")
				return
			}
		}
	})
	_, err = a.Process(context.Background(), pid)
	if e := refusal.As(err); e != nil {
		fmt.Println(e.Code)
		return 0
	}
	fmt.Println("facts of the impostor were believed:", err)
	return 1
}

// A process that was one thing when its user was read and another when its executable was: no mixture becomes facts.
func TestAProcessThatChangesIsReadAgain(t *testing.T) {
	a := attestor(t, attest.Config{})
	base := "/" + identity.Unique("redoubt-attest")
	cgroups(t, a, base, base+"/a", base+"/b")
	pid := playing(t, "sleep")
	enter(t, a, base+"/a", pid)
	moves := 0
	a.Between(func() {
		if moves++; moves == 1 {
			enter(t, a, base+"/b", pid)
		}
	})
	if s := facts(t, a, pid); s.Cgroup != base+"/b" || s.Facts.Text(identity.FactCgroup) != base+"/b" || moves != 2 {
		t.Errorf("after %d readings it is in %s", moves, s.Cgroup)
	}
	moves = 0
	a.Between(func() {
		moves++
		enter(t, a, fmt.Sprintf("%s/%c", base, 'a'+rune(moves%2)), pid)
	})
	enter(t, a, base+"/a", pid)
	_, err := a.Process(t.Context(), pid)
	wantRefusal(t, err, attest.ErrChanging)
	if moves != attest.MaxReadings {
		t.Errorf("it was read %d times", moves)
	}
	a.Between(func() {})
	enter(t, a, "/", pid)
}

func TestExecMeanwhileIsSeen(t *testing.T) {
	a := attestor(t, attest.Config{})
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line; exec sleep 60")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := started(t, cmd)
	done := false
	a.Between(func() {
		if done {
			return
		}
		done = true
		_, _ = stdin.Write([]byte("\n"))
		for range 500 {
			if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); strings.HasSuffix(link, "sleep") {
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
	})
	if s := facts(t, a, pid); !strings.HasSuffix(s.Facts.Text(identity.FactExePath), "/sleep") {
		t.Errorf("facts of the program before: %q", s.Facts.Text(identity.FactExePath))
	}
}

func TestDeletedAndReplacedExecutables(t *testing.T) {
	a := attestor(t, attest.Config{})
	path := filepath.Join(t.TempDir(), "orders")
	sum := copied(t, path)
	pid := sleeping(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		s := facts(t, a, pid)
		wantText(t, s, identity.FactExePath, path, identity.FromKernel)
		wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)
		wantWarning(t, s, "deleted or replaced")
	}
	check()
	if err := os.WriteFile(path, []byte("another"), 0o755); err != nil { // the hash is of what runs, not of what is there
		t.Fatal(err)
	}
	check()

	odd := filepath.Join(t.TempDir(), "x (deleted)") // a name like any other
	copied(t, odd)
	s := facts(t, a, sleeping(t, odd))
	wantText(t, s, identity.FactExePath, odd, identity.FromKernel)
	if len(s.Warnings) > 0 {
		t.Errorf("warned: %q", s.Warnings)
	}
}

// A workload of redoubt run has a mount namespace of its own and outlives the upgrade of its package.
func TestPathIsRememberedThroughAnUpgrade(t *testing.T) {
	needRoot(t)
	a := attestor(t, attest.Config{})
	dir := t.TempDir()
	path, impostor := filepath.Join(dir, "orders"), filepath.Join(dir, "impostor")
	sum := copied(t, path)
	pid, said := started(t, inOwnMounts(path, player, "sleep"))
	unseen, _ := started(t, inOwnMounts(path, player, "sleep"))
	if said != "ready" {
		t.Fatalf("the player said %q", said)
	}
	before := facts(t, a, pid)
	wantText(t, before, identity.FactExePath, path, identity.FromKernel)
	if len(before.Warnings) > 0 {
		t.Errorf("warned: %q", before.Warnings)
	}
	copied(t, impostor)
	if err := os.Rename(impostor, path); err != nil { // as package managers do
		t.Fatal(err)
	}
	s := facts(t, a, pid)
	wantText(t, s, identity.FactExePath, path, identity.FromKernel)
	wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)
	wantWarning(t, s, "deleted or replaced")

	// Of another process of the same file, or by another agent, it was never seen to be true.
	s = facts(t, a, unseen)
	wantText(t, s, identity.FactExePath, "", "")
	wantWarning(t, s, "mount namespace")
	wantText(t, facts(t, attestor(t, attest.Config{}), pid), identity.FactExePath, "", "")
}

// What a process executes later, under the path that it was believed to have, is another file.
func TestARememberedPathIsOfOneFile(t *testing.T) {
	needRoot(t)
	a := attestor(t, attest.Config{})
	dir := t.TempDir()
	path, next := filepath.Join(dir, "orders"), filepath.Join(dir, "next")
	copied(t, path)
	copied(t, next)
	cmd := inOwnMounts(path, player, "bind-later", path, next)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := started(t, cmd)
	wantText(t, facts(t, a, pid), identity.FactExePath, path, identity.FromKernel)
	_, _ = stdin.Write([]byte("\n"))
	for range 100 { // until it executes what it has put there, and has deleted it
		if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); link == path+" (deleted)" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); link != path+" (deleted)" {
		t.Fatalf("the impostor failed: %q", link)
	}
	wantText(t, facts(t, a, pid), identity.FactExePath, "", "")
}

func inOwnMounts(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	return cmd
}

func TestProgramInMemoryHasNoPath(t *testing.T) {
	a := attestor(t, attest.Config{})
	s := facts(t, a, playing(t, "memfd", "../usr/bin/orders"))
	wantText(t, s, identity.FactExePath, "", "")
	wantWarning(t, s, "memfd")
	if len(s.Facts.Text(identity.FactExeSHA256)) != 64 {
		t.Error("its hash is known all the same")
	}
}

// In a mount namespace of its own, which any user can have, a process has any file at any path.
func TestPathInAnotherMountNamespaceIsNotBelieved(t *testing.T) {
	needRoot(t)
	a := attestor(t, attest.Config{})
	path := filepath.Join(t.TempDir(), "orders")
	if err := os.WriteFile(path, []byte("the true one"), 0o755); err != nil {
		t.Fatal(err)
	}
	impostor := filepath.Join(t.TempDir(), "impostor")
	sum := copied(t, impostor)
	cmd := exec.Command("/proc/self/exe", player, "bind", path, impostor)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	pid, said := started(t, cmd)
	if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); link != path {
		t.Fatalf("the impostor failed: %q, %q", said, link)
	}
	s := facts(t, a, pid)
	wantText(t, s, identity.FactExePath, "", "")
	wantWarning(t, s, "mount namespace")
	wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)

	// The same file in another namespace is believed: so is a workload that redoubt run started.
	cmd = exec.Command("/proc/self/exe", player, "sleep")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	pid, _ = started(t, cmd)
	if facts(t, a, pid).Facts.Text(identity.FactExePath) == "" {
		t.Error("a path that leads to the same file was not believed")
	}
}

func TestNamesThatAreNoTextAreNoFacts(t *testing.T) {
	a := attestor(t, attest.Config{})
	for _, name := range []string{"bad\xff", "line\nend"} {
		path := filepath.Join(t.TempDir(), name)
		copied(t, path)
		s := facts(t, a, sleeping(t, path))
		wantText(t, s, identity.FactExePath, "", "")
		wantWarning(t, s, identity.FactExePath)
	}
}

func TestMixedUsersAreWarnedOf(t *testing.T) {
	needRoot(t)
	a := attestor(t, attest.Config{})
	cmd := exec.Command("/proc/self/exe", player, "mixed")
	cmd.Env = []string{"GOMAXPROCS=1"}
	pid, said := started(t, cmd)
	if said != "ready" {
		t.Fatal(said)
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if !strings.Contains(string(status), "Uid:\t1\t2\t1\t") {
		t.Skip("the runtime moved the player off its first thread")
	}
	s := facts(t, a, pid)
	if f, _ := s.Facts.Get(identity.FactUID); f.Value != int64(2) {
		t.Errorf("got %+v", f)
	}
	wantWarning(t, s, "can change between them")
}

func TestWithoutTheRightToLookTheFactsAreAbsent(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	copied(t, filepath.Join(dir, "attest"))
	cmd := exec.Command(filepath.Join(dir, "attest"), player, "attest", strconv.Itoa(playing(t, "sleep")))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), `err=<nil> path="" sha="" uid=true`) || !strings.Contains(string(out), "CAP_SYS_PTRACE") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestChainOfParentsIsBounded(t *testing.T) {
	meter := counts{}
	a := attestor(t, attest.Config{Meter: meter})
	_, said := started(t, exec.Command("/proc/self/exe", player, "deep", strconv.Itoa(attest.MaxParents+2)))
	pid, err := strconv.Atoi(strings.Fields(said)[0])
	if err != nil {
		t.Fatal(said)
	}
	s := facts(t, a, pid)
	if f, _ := s.Facts.Get(identity.FactParents); len(f.Value.([]string)) != attest.MaxParents {
		t.Errorf("got %d", len(f.Value.([]string)))
	}
	wantWarning(t, s, "only the nearest")
	if meter["attest_parents_cut"] != 1 {
		t.Errorf("counted %v", meter)
	}
}

func TestHashesAreRememberedAndBounded(t *testing.T) {
	meter := counts{}
	a := attestor(t, attest.Config{Meter: meter})
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line") // a file that has been there for long
	cmd.Stdin, _, _ = os.Pipe()
	pid, _ := started(t, cmd)
	first := facts(t, a, pid).Facts.Text(identity.FactExeSHA256)
	if second := facts(t, a, pid).Facts.Text(identity.FactExeSHA256); second != first || first == "" {
		t.Errorf("%q, then %q", first, second)
	}
	if meter["attest_hash_cache result hit"] != 1 || a.Hashes() != 1 {
		t.Errorf("counted %v, %d remembered", meter, a.Hashes())
	}
	// A file that was written a moment ago may be written again within the same tick of its times.
	path := filepath.Join(t.TempDir(), "new")
	copied(t, path)
	facts(t, a, sleeping(t, path))
	if a.Hashes() != 1 {
		t.Error("the hash of a file that is still settling was remembered")
	}
	if stay, gone := attest.Bounded(attest.MaxHashes, attest.MaxHashes+10); stay != attest.MaxHashes || gone != 10 {
		t.Errorf("%d stay, %d had to go", stay, gone)
	}
}

func TestLargeExecutablesAreNotHashed(t *testing.T) {
	meter := counts{}
	a := attestor(t, attest.Config{MaxExecutable: 1000, Meter: meter})
	s := facts(t, a, os.Getpid())
	wantText(t, s, identity.FactExeSHA256, "", "")
	wantWarning(t, s, "larger than 1000 bytes")
	if meter["attest_executable_too_large"] != 1 {
		t.Errorf("counted %v", meter)
	}
}

func TestHungFileSystemsDoNotHangTheAgent(t *testing.T) {
	meter := counts{}
	a := attestor(t, attest.Config{EngineTimeout: 20 * time.Millisecond, Meter: meter})
	free := a.Hang()
	_, err := a.Process(t.Context(), os.Getpid())
	wantRefusal(t, err, attest.ErrBusy)
	if meter["attest_refused code attest-too-many-at-once"] == 0 {
		t.Errorf("counted %v", meter)
	}
	free()
	facts(t, a, os.Getpid())
}

func TestContextEndsAReading(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a := attestor(t, attest.Config{})
	if _, err := a.Process(ctx, os.Getpid()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := a.Containers(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestCgroupRootsThatAreNone(t *testing.T) {
	_, err := attest.New(attest.Config{CgroupRoot: t.TempDir()})
	wantRefusal(t, err, attest.ErrNoCgroup)
	_, err = attest.CgroupIDOf(t.TempDir())
	wantRefusal(t, err, attest.ErrNoCgroup)
}

func BenchmarkProcess(b *testing.B) {
	a, err := attest.New(attest.Config{})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := a.Process(b.Context(), 1); err != nil {
			b.Fatal(err)
		}
	}
}
