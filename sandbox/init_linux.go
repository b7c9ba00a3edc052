package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// The names under which this program is executed again.
const (
	initName  = "redoubt-sandbox"
	probeName = "redoubt-sandbox-probe"
)

// reportConfined is what the init step reports when all that is left is exec. What follows it is a failure of exec.
const reportConfined = "+"

// failure is what the init step reports instead of executing the program.
type failure struct {
	Kind         refusal.Kind
	Code         string
	Why, Do      string
	Errno        uintptr
	exitedStatus int
}

// Init is the first line of main. In the re-executed init step it confines itself, becomes the program and never
// returns; in any other process it returns at once.
//
// Trust: whoever executes this program under the name of the init step gains nothing: it acts with the rights it was
// started with and only gives them up.
func Init() {
	armed.Store(true)
	if len(os.Args) == 0 {
		return
	}
	switch os.Args[0] {
	case initName:
		// Credentials, capabilities, mounts and filters are a thread's until exec: all of it happens on this one, and
		// exec ends the others.
		runtime.LockOSThread()
		report := os.NewFile(reportFD, "report")
		unix.CloseOnExec(reportFD)
		f := become(report)
		data, _ := json.Marshal(f) // plain data: cannot fail
		_, _ = report.Write(data)
		os.Exit(f.exitedStatus)
	case probeName:
		os.Exit(probeMain(os.Args[1:]))
	}
}

// become confines this thread and executes the program. It returns only if that failed.
func become(report io.Writer) failure {
	in := os.NewFile(specFD, "spec")
	data, err := io.ReadAll(io.LimitReader(in, maxSpecBytes+1))
	_ = in.Close()
	var w wire
	if err == nil {
		err = json.Unmarshal(data, &w)
	}
	if err == nil && len(w.Argv) == 0 {
		err = errors.New("it has no program")
	}
	if err != nil {
		return stepFailed("spec", fmt.Errorf("read the spec: %w", err))
	}
	for _, s := range steps(w) {
		if err := s.do(w); err != nil {
			return stepFailed(s.name, err)
		}
	}
	if _, err := io.WriteString(report, reportConfined); err != nil {
		return stepFailed("report", err)
	}
	return execute(w)
}

// step is one step between clone and exec. Its order is the order of steps.
type step struct {
	name string
	do   func(wire) error
}

// steps returns what is done, in order: whatever needs a privilege comes before the privilege is given up, and the
// filter comes last, because it is for the program.
func steps(w wire) []step {
	if w.Privileged {
		return []step{
			{"groups", dropGroups},
			{"user", dropUser},
			{"keyring", newKeyring},
			{"directory", enterDirectory},
			{"descriptors", closeDescriptors},
		}
	}
	return []step{
		{"mount namespace", ownMounts},
		{"cgroupfs", protectCgroupfs},
		{"bounding set", dropBounding},
		{"securebits", lockSecurebits},
		{"groups", dropGroups},
		{"user", dropUser},
		{"capabilities", dropCapabilities},
		{"no_new_privs", forbidNewPrivileges},
		{"keyring", newKeyring},
		{"directory", enterDirectory},
		{"descriptors", closeDescriptors},
		{"system calls", filterSystemCalls},
		{"check", checkConfined},
	}
}

// advice says what to do when a step fails.
var advice = map[string]string{
	"cgroup":          "make the cgroup in a cgroup2 hierarchy, run the agent as root, on Linux 5.7 or later",
	"mount namespace": "run the agent with CAP_SYS_ADMIN",
	"cgroupfs":        "run the agent with CAP_SYS_ADMIN, on Linux 5.12 or later, with /proc mounted",
	"bounding set":    "run the agent with CAP_SETPCAP",
	"securebits":      "run the agent with CAP_SETPCAP",
	"groups":          "run the agent with CAP_SETGID",
	"user":            "run the agent with CAP_SETUID, and give the user room for another process (RLIMIT_NPROC)",
	"keyring":         "raise kernel.keys.maxkeys",
	"directory":       "give a directory that the workload's user may enter",
	"descriptors":     "use Linux 5.11 or later",
	"system calls":    "use a kernel with CONFIG_SECCOMP_FILTER, on amd64 or arm64",
	"check":           "report this: the kernel accepted a rule that it does not show",
}

const otherAdvice = "look into the agent's log and the kernel's (an out-of-memory kill?), and try again"

func stepFailed(name string, err error) failure {
	var errno syscall.Errno
	errors.As(err, &errno)
	do, ok := advice[name]
	if !ok {
		do = otherAdvice
	}
	return failure{
		Kind: refusal.Unsupported, Code: ErrStep.Code, Errno: uintptr(errno), exitedStatus: StatusRefused,
		Why: fmt.Sprintf("step %q failed: %v", name, err), Do: do,
	}
}

// stepRefused is the refusal of a step that the parent takes.
func stepRefused(what, name string, err error) error {
	f := stepFailed(name, err)
	return &refusal.Error{Kind: f.Kind, Code: f.Code, What: what, Why: f.Why, Do: f.Do, Err: err}
}
