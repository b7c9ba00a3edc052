package story_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The clock of a process cannot be moved: time namespaces know the monotonic clocks only, and libfaketime does not reach
// static programs. But a Go program asks the time of the vDSO, code that the kernel maps into each process and that a tracer
// may write. So this starts the real binary, stopped at its first instruction, replaces the vDSO's clock_gettime by one that
// asks the kernel and adds some seconds to CLOCK_REALTIME, and lets it go: everything in it believes the wrong time.

// withClock returns a way to start a process whose clock is off.
func withClock(t testing.TB, off time.Duration) func(*exec.Cmd) error {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("the code that is written into the vDSO is amd64's")
	}
	return func(cmd *exec.Cmd) error {
		cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}
		done := make(chan error)
		starts <- func() { done <- startOff(cmd, off) } // tracing is a matter of one thread
		err := <-done
		if errors.Is(err, syscall.EPERM) {
			t.Skipf("processes cannot be traced here: %v", err)
		}
		return err
	}
}

func startOff(cmd *exec.Cmd, off time.Duration) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
		return fmt.Errorf("wait for the stop at exec: %w", err)
	}
	base, size, err := mapping(pid, "[vdso]")
	if err != nil {
		return err
	}
	image := make([]byte, size)
	if _, err := unix.PtracePeekData(pid, base, image); err != nil {
		return fmt.Errorf("read the vDSO: %w", err)
	}
	file, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return err
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		return err
	}
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" {
			if _, err := unix.PtracePokeData(pid, base+uintptr(s.Value), clockCode(int32(off/time.Second))); err != nil {
				return fmt.Errorf("write the vDSO: %w", err)
			}
			return unix.PtraceDetach(pid)
		}
	}
	return errors.New("the vDSO has no clock_gettime")
}

// clockCode is int clock_gettime(clockid_t edi, struct timespec *rsi) that adds seconds to CLOCK_REALTIME.
func clockCode(seconds int32) []byte {
	code := []byte{
		0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xc0, // test eax, eax
		0x75, 0x0b, // jnz ret
		0x85, 0xff, // test edi, edi
		0x75, 0x07, // jnz ret
		0x48, 0x81, 0x06, // add qword [rsi], …
	}
	return append(binary.LittleEndian.AppendUint32(code, uint32(seconds)), 0xc3)
}

func mapping(pid int, name string) (base uintptr, size int, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if strings.HasSuffix(strings.TrimSpace(line), name) {
			var from, to uintptr
			if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil {
				return 0, 0, err
			}
			return from, int(to - from), nil
		}
	}
	return 0, 0, errors.New("the process has no " + name)
}

// A machine whose clock is two hours off is told so: it does not join, does not spend its token, and does not take a
// certificate's end for something else. Set right, it goes on.
func TestClockTwoHoursOff(t *testing.T) {
	t.Parallel()
	d := found(t, "authority: {svid_ttl: 6h}") // long enough that a clock that is ahead sees no certificate expire
	for _, c := range []struct {
		off  time.Duration
		says string
	}{{2 * time.Hour, "ahead of"}, {-2 * time.Hour, "behind"}} {
		name := "new" + strings.ReplaceAll(c.says, " ", "-")
		token := d.token(t, name)
		a := d.machine(t, name)
		r := tryStartWith(t, withClock(t, c.off), a.args("--machine", name, "--join-token-file", token)...)
		if r.ready != nil || r.code() != 1 {
			t.Fatalf("%s: a machine whose clock is %s off joined, or ended with another code than 1:\n%s", name, c.off, &r.log)
		}
		why := plainError(t, r.log.String())
		contains(t, name, why, "clock", "set the clock")
		if !strings.Contains(why, c.says) && !strings.Contains(why, "this machine's clock says") {
			t.Errorf("%s: it is not said how far off the clock is: %s", name, why)
		}
		a.start(t, "--machine", name, "--join-token-file", token) // the token was not spent
		a.connected(t)
		before := a.shell(t, "orders").fetch(t)

		// The clock goes wrong later: it is said, the agent stays, and what it has it serves as far as it holds.
		a.role.kill()
		a.role = tryStartWith(t, withClock(t, c.off), a.args()...)
		if a.role.ready == nil {
			t.Fatalf("%s: the agent did not start: %s", name, &a.role.log)
		}
		a.role.says(t, "clock")
		if got := a.askLocal(t, "orders", "payments"); got.ID == "" {
			t.Errorf("%s: no decision", name)
		}
		if code := a.role.term(t); code != 0 {
			t.Errorf("%s: the agent ended with %d", name, code)
		}
		a.start(t)
		a.connected(t)
		if got := a.shell(t, "orders").fetch(t); got.ID != before.ID {
			t.Errorf("%s: with the clock set right the SVID is %+v", name, got)
		}
	}

	// The server's clock is wrong, and its agents' are right.
	m1 := d.join(t, "m1")
	orders := m1.shell(t, "orders")
	held := orders.fetch(t)
	d.server.kill()
	d.server = tryStartWith(t, withClock(t, 2*time.Hour), "server", "--config", d.config, "--data", d.serverData())
	if d.server.ready == nil {
		t.Fatalf("the server did not start: %s", &d.server.log)
	}
	m1.role.says(t, "clock")
	if got := orders.fetch(t); got.Serial != held.Serial {
		t.Errorf("the workload holds %+v, which a server with a wrong clock signed; want %+v still", got, held)
	}
	d.server.kill()
	d.start(t)
	m1.connected(t)
	orders.fetch(t)
}
