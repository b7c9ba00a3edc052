package sensor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// TestAProgramThatNeverRunsIsFound attaches the watching program where this thread does not pass.
func TestAProgramThatNeverRunsIsFound(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ask := watches(ebpf.ProgramSpec{Type: ebpf.RawTracepoint}, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exit", Program: p})
	})
	if err := ask(nil); !errors.Is(err, errNeverRan) {
		t.Errorf("got %v, want %v", err, errNeverRan)
	}
}

// TestARefusalThatIsNoneIsFound gives the proofs filters that allow, and calls that end otherwise.
func TestARefusalThatIsNoneIsFound(t *testing.T) {
	if err := wantErrno(nil, unix.EPERM); !errors.Is(err, errAllowed) {
		t.Errorf("allowed: %v", err)
	}
	if err := wantErrno(unix.ENOENT, unix.EPERM); err == nil {
		t.Error("another error was taken for the refusal")
	}
	if err := wantErrno(fmt.Errorf("open: %w", unix.EPERM), unix.EPERM); err != nil {
		t.Error(err)
	}
	err := onThread(func() error {
		if _, err := seccomp(0, unix.SECCOMP_RET_ALLOW); err != nil {
			return err
		}
		return wantErrno(filtered(), unix.EPERM)
	})
	if !errors.Is(err, errAllowed) {
		t.Errorf("a filter that allows: %v", err)
	}
	if dir := scratchCgroup(t); dir != "" {
		if err := provesDenial(dir, 1); !errors.Is(err, errAllowed) {
			t.Errorf("a hook that allows: %v", err)
		}
	}
}

// scratchCgroup returns a cgroup for a test, or "" where none can be made.
func scratchCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if dir, err := makeCgroup(root); err == nil {
			t.Cleanup(func() {
				if err := removeCgroup(dir); err != nil {
					t.Error(err)
				}
			})
			return dir
		}
	}
	return ""
}

// TestAnEventThatNeverComesIsFound waits for a permission event that nobody causes.
func TestAnEventThatNeverComesIsFound(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	f, err := os.CreateTemp(t.TempDir(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := fanotify(f.Name(), unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM, wait); !errors.Is(err, errNoEvent) {
		t.Errorf("got %v, want %v", err, errNoEvent)
	}
}

func TestTheChildTellsWhatConnectingCameTo(t *testing.T) {
	for name, code := range map[string][]byte{"amd64": childAMD64(), "arm64": childARM64()} {
		if !bytes.HasSuffix(code, childAddress) {
			t.Errorf("%s: the address is not behind the code", name)
		}
	}
	program, err := childProgram()
	if err != nil {
		t.Skip(err)
	}
	file, err := memoryFile(program)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	err = exec.CommandContext(t.Context(), fmt.Sprintf("/proc/self/fd/%d", file.Fd())).Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || unix.Errno(exit.ExitCode()) != unix.ECONNREFUSED {
		t.Errorf("it ended with %v, want the exit code of %v", err, unix.ECONNREFUSED)
	}
}

// TestAKilledCgroupKillsWhatIsClonedIntoIt is why the probe for cgroup.kill has a cgroup of its own. Should a kernel be
// mended, the test says so.
func TestAKilledCgroupKillsWhatIsClonedIntoIt(t *testing.T) {
	dir := scratchCgroup(t)
	if dir == "" {
		t.Skip("needs root, and a cgroup2 mount in a usual place")
	}
	if err := control(dir, "cgroup.kill", "1"); err != nil {
		t.Skip(err)
	}
	if _, err := runChild(dir); err == nil {
		t.Log("this kernel starts processes in a cgroup that was killed")
	} else if !strings.Contains(err.Error(), "killed") {
		t.Error(err)
	}
}

func TestAnswersAreOneBoundedLine(t *testing.T) {
	long := answer(fmt.Errorf("a\n\tb %s", strings.Repeat("é", maxAnswerBytes)))
	if strings.ContainsAny(long, "\n\t") || len(long) > maxAnswerBytes+len("…") || !strings.HasSuffix(long, "…") {
		t.Errorf("answer of %d bytes: %q", len(long), long)
	}
	verifier := &ebpf.VerifierError{Cause: unix.EINVAL, Log: []string{"0: call x", "invalid func x#1", "processed 1 insns"}}
	if got, want := answer(fmt.Errorf("load: %w", verifier)), "load: invalid argument (invalid func x#1)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// OnThread is for the tests that run before all others, on the first thread.
var OnThread = onThread
