package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// execute becomes the program. It returns only if that failed.
func execute(w wire) failure {
	argv, env := stringsOf(w.Argv), stringsOf(w.Env)
	if w.Self {
		return execFailed(argv[0], syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", selfFD), argv, env))
	}
	if strings.Contains(argv[0], "/") {
		return execFailed(argv[0], syscall.Exec(argv[0], argv, env))
	}
	// As execvpe(3): try each directory, and remember a program that may not be executed.
	failed := error(unix.ENOENT)
	for _, dir := range filepath.SplitList(pathOf(env)) {
		if !filepath.IsAbs(dir) {
			continue // the working directory is no place to find programs in
		}
		err := syscall.Exec(filepath.Join(dir, argv[0]), argv, env)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		case errors.Is(err, unix.EACCES):
			failed = err
		default:
			return execFailed(argv[0], err)
		}
	}
	return execFailed(argv[0], failed)
}

// execFailed explains why exec failed, with the exit statuses of env(1): 127 not found, 126 found but not executable.
func execFailed(name string, err error) failure {
	f := failure{Kind: refusal.Invalid, Code: ErrNotExecutable.Code, exitedStatus: StatusNotExecutable}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		f.Errno = uintptr(errno)
	}
	switch {
	case errors.Is(err, unix.ENOENT) && strings.Contains(name, "/") && exists(name):
		f.Why = "it exists, but the interpreter that it names (in its #! line or as its dynamic loader) does not"
		f.Do = "install the interpreter"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		f.Kind, f.Code, f.exitedStatus = refusal.Unknown, ErrMissing.Code, StatusMissing
		f.Why, f.Do = "there is no such program", "give its absolute path, or a PATH in its environment that has it"
	case errors.Is(err, unix.EACCES):
		f.Why = "the workload's user may not execute it"
		f.Do = "check its mode, the directories above it and noexec; the user is not root any more"
	case errors.Is(err, unix.ENOEXEC):
		f.Why, f.Do = "it is no program: no #! line and no format that the kernel knows", "name its interpreter"
	case errors.Is(err, unix.E2BIG):
		f.Why, f.Do = "its arguments and environment are larger than the kernel takes", "pass large data in a file"
	default:
		f.Why, f.Do = fmt.Sprintf("the kernel does not execute it: %v", err), "look at the program"
	}
	return f
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func pathOf(env []string) string {
	path := ""
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	return path
}

func stringsOf(list [][]byte) []string {
	out := make([]string, len(list))
	for i, b := range list {
		out[i] = string(b)
	}
	return out
}
