//go:build linux

package workload_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/redoubtsec/redoubt/identity/workload/gen"
)

// The test binary is also the programs that call the Workload API: identity is of processes, so that real ones are needed.
const roleVariable = "REDOUBT_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		code := m.Run()
		_ = os.RemoveAll(builtClient) // nothing if it is ""
		os.Exit(code)
	case "watch":
		watch(os.Args[1])
	case "lend":
		lend(os.Args[1], os.Args[2])
	case "borrow":
		borrow()
	case "ask":
		ask(os.Args[1])
	case "connect":
		connect(os.Args[1:])
	case "flood":
		flood(os.Args[1], os.Args[2])
	}
}

// heard is what a program says on a line of standard output.
type heard struct {
	ID      string `json:"id,omitempty"`
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	Open    int    `json:"open,omitempty"`
	Refused int    `json:"refused,omitempty"`
	Clear   int    `json:"clear,omitempty"`
}

func say(h heard) { _ = json.NewEncoder(os.Stdout).Encode(h) }

// watch calls FetchX509SVID and says what arrives.
func watch(socket string) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	go streamOnce(gen.NewSpiffeWorkloadAPIClient(conn))
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

func streamOnce(client gen.SpiffeWorkloadAPIClient) {
	stream, err := client.FetchX509SVID(withHeader(context.Background()), &gen.X509SVIDRequest{})
	for err == nil {
		var got *gen.X509SVIDResponse
		if got, err = stream.Recv(); err == nil {
			say(heard{ID: got.Svids[0].SpiffeId})
		}
	}
	say(heard{Code: status.Code(err).String(), Message: status.Convert(err).Message()})
}

// lend connects, hands the connected socket to a program in another cgroup, and ends when standard input does. The
// other program goes on.
func lend(socket, cgroupDir string) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		panic(err)
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		panic(err)
	}
	dir, err := os.Open(cgroupDir)
	if err != nil {
		panic(err)
	}
	r, w, err := os.Pipe() // keeps the borrower's standard input open when this process is gone
	if err != nil {
		panic(err)
	}
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), roleVariable+"=borrow")
	child.ExtraFiles = []*os.File{f, w}
	child.Stdin, child.Stdout, child.Stderr = r, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := child.Start(); err != nil {
		panic(err)
	}
	_ = os.Stdout.Close() // the borrower alone speaks
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// borrow calls on a connection that another process made (file 3).
func borrow() {
	time.AfterFunc(20*time.Second, func() { os.Exit(1) }) // nobody waits for this process
	c, err := net.FileConn(os.NewFile(3, "socket"))
	if err != nil {
		panic(err)
	}
	once := make(chan net.Conn, 1)
	once <- c
	conn, err := grpc.NewClient("passthrough:borrowed", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the borrowed connection is closed")
			}
		}))
	if err != nil {
		panic(err)
	}
	client := gen.NewSpiffeWorkloadAPIClient(conn)
	for { // again on what is left of the connection
		streamOnce(client)
		time.Sleep(600 * time.Millisecond)
	}
}

// ask calls FetchJWTSVID and says what it got.
func ask(socket string) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	got, err := gen.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(withHeader(context.Background()), &gen.JWTSVIDRequest{Audience: []string{"a"}})
	said := heard{Code: status.Code(err).String(), Message: status.Convert(err).Message()}
	if err == nil {
		said.ID = got.Svids[0].SpiffeId
	}
	say(said)
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// connect connects, as a user and group if it is told one, says so, and ends with standard input.
func connect(args []string) {
	if len(args) > 1 {
		id, err := strconv.Atoi(args[1])
		if err == nil {
			err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(id+1), syscall.Setuid(id))
		}
		if err != nil {
			panic(err)
		}
	}
	if _, err := net.Dial("unix", args[0]); err != nil {
		panic(err)
	}
	say(heard{Open: 1})
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// flood opens connections, as many as it is told, and says how many of them were refused, and how many of those with
// the reason. It keeps the others open until standard input ends.
func flood(socket, count string) {
	n, err := strconv.Atoi(count)
	if err != nil {
		panic(err)
	}
	var conns []net.Conn
	for len(conns) < n {
		c, err := net.Dial("unix", socket)
		if errors.Is(err, unix.EAGAIN) {
			time.Sleep(time.Millisecond) // the listener's queue is full
			continue
		}
		if err != nil {
			panic(err)
		}
		conns = append(conns, c)
	}
	time.Sleep(1500 * time.Millisecond) // refused connections are closed within a second
	var (
		said    heard
		counts  sync.Mutex
		reading sync.WaitGroup
	)
	for _, c := range conns {
		reading.Go(func() {
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			text, err := io.ReadAll(c)
			counts.Lock()
			defer counts.Unlock()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				said.Open++
				return
			}
			said.Refused++
			if strings.Contains(string(text), "connections open, which is the limit of one process") {
				said.Clear++
			}
		})
	}
	reading.Wait()
	say(said)
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// program is a running role.
type program struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan heard
}

// run starts the test binary in a role, in a cgroup of the unified hierarchy ("" for that of the test).
func run(t *testing.T, role, cgroup string, args ...string) *program {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	return startIn(t, cmd, cgroup)
}

// runAs is run as another user, of a copy of the test binary that it can execute, in the cgroup of the test.
func runAs(t *testing.T, uid uint32, role string, args ...string) *program {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can start processes of other users")
	}
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "own")
	code, err := os.ReadFile(os.Args[0])
	if err = errors.Join(err, os.Chmod(dir, 0o711), os.WriteFile(path, code, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Env = "/", append(os.Environ(), roleVariable+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return startIn(t, cmd, "")
}

func startIn(t *testing.T, cmd *exec.Cmd, cgroup string) *program {
	t.Helper()
	if cgroup != "" {
		dir, err := os.Open(filepath.Join(cgroupRoot(t), cgroup))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = dir.Close() }()
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, w, err := os.Pipe() // of our own: cmd.Wait must not close it while a borrower writes
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	p := &program{cmd: cmd, stdin: stdin, lines: make(chan heard, 100)}
	go func() {
		defer close(p.lines)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var h heard
			if json.Unmarshal(lines.Bytes(), &h) == nil {
				p.lines <- h
			}
		}
	}()
	t.Cleanup(func() { p.end(); _ = out.Close() })
	return p
}

// end ends the program and waits for it.
func (p *program) end() {
	_ = p.stdin.Close()
	kill := time.AfterFunc(2*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	_ = p.cmd.Wait()
}

// next returns the next line.
func (p *program) next(t *testing.T) heard {
	t.Helper()
	select {
	case h, ok := <-p.lines:
		if !ok {
			t.Fatal("the program has ended")
		}
		return h
	case <-time.After(8 * time.Second):
		t.Fatal("the program says nothing")
	}
	return heard{}
}
