package sqlite

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// LockFile is the name of the lock in a data directory.
const LockFile = "lock"

// Lock is the right to work in a data directory.
type Lock struct{ file *os.File }

// LockDir takes the data directory dir for this process, and makes it 0700 if it is missing. The kernel gives it back
// when the process ends, however it ends; the file stays.
//
// Errors: [ErrLocked] while another process (or another Lock of this one) has it.
func LockDir(dir string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", fullOr("data directory", err))
	}
	file, err := os.OpenFile(filepath.Join(dir, LockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", fullOr("data directory", err))
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := holderOf(file)
		_ = file.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock data directory: %w", err)
		}
		return nil, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrLocked.Code, What: "data directory " + dir, Why: "another Redoubt process" + holder + " works in it",
			Do: "stop that one, or use another directory", Err: err,
		}
	}
	// Only for the message above; a full disk must not keep the server from starting.
	if err := file.Truncate(0); err == nil {
		_, _ = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &Lock{file: file}, nil
}

// Unlock gives the directory back.
func (l *Lock) Unlock() error { return l.file.Close() }

func holderOf(file *os.File) string {
	var buf [32]byte
	n, _ := file.ReadAt(buf[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", pid)
}
