package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
)

// attackResult is what an attacker saw, from its own side.
type attackResult struct {
	Got      string `json:"got"`      // "refused" or "through"
	Evidence string `json:"evidence"` // errno, bytes, paths: what the kernel or the peer answered
}

func refusedWith(evidence string) attackResult { return attackResult{"refused", evidence} }

func through(evidence string) attackResult { return attackResult{"through", evidence} }

// attack runs one attempt in this very process, which the demo has started as a workload.
func attack(ctx context.Context, name, arg string) attackResult {
	switch name {
	case "leave-cgroup":
		return leaveCgroup()
	case "io-uring":
		var params [120]byte
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params[0])), 0)
		return answered("io_uring_setup", int(fd), errno)
	case "packet-socket":
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		return answered("socket(AF_PACKET)", fd, err)
	case "vsock":
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		return answered("socket(AF_VSOCK)", fd, err)
	case "become-root":
		err := unix.Setresuid(0, 0, 0)
		if err == nil && os.Geteuid() == 0 {
			return through("setresuid(0): uid is 0 now")
		}
		return refusedWith("setresuid(0): " + errnoName(err))
	case "agent-socket":
		conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "unix", arg)
		if err != nil {
			return refusedWith("connect " + arg + ": " + errnoName(err))
		}
		defer func() { _ = conn.Close() }()
		_, _ = conn.Write([]byte("GET /v1/workloads HTTP/1.0\r\n\r\n"))
		buf := make([]byte, 64)
		n, _ := conn.Read(buf)
		line, _, _ := strings.Cut(string(buf[:n]), "\r")
		if strings.Contains(line, "403") {
			return refusedWith(line)
		}
		return through(line)
	case "impostor":
		return impostor(ctx, arg)
	case "read-key":
		raw, err := os.ReadFile(arg)
		if err != nil {
			return refusedWith("open " + arg + ": " + errnoName(err))
		}
		return through(string(raw[:min(8, len(raw))]) + "… read")
	case "identity":
		return ownIdentity(ctx)
	case "wait":
		<-ctx.Done()
		return through("waited")
	default:
		return attackResult{"unknown", "no such attempt"}
	}
}

func answered(call string, fd int, err error) attackResult {
	var errno syscall.Errno
	if errors.As(err, &errno) && errno != 0 {
		return refusedWith(call + ": " + errnoName(errno))
	}
	_ = unix.Close(fd)
	return through(call + ": done")
}

func errnoName(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return unix.ErrnoName(errno)
	}
	if err == nil {
		return "done"
	}
	return err.Error()
}

// leaveCgroup writes itself into the root of every cgroup hierarchy that it can find or mount.
func leaveCgroup() attackResult {
	before := unifiedCgroup()
	dir, err := os.MkdirTemp("", "escape")
	if err == nil {
		_ = unix.Mount("none", dir, "cgroup2", 0, "")
	}
	last := "no cgroupfs is in sight"
	for _, procs := range []string{
		"/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs", dir + "/cgroup.procs", "/proc/1/root/sys/fs/cgroup/unified/cgroup.procs",
	} {
		f, err := os.OpenFile(procs, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("0")
			_ = f.Close()
		}
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				last = procs + ": " + errnoName(err)
			}
			continue
		}
		if now := unifiedCgroup(); now != before {
			return through("wrote " + procs + "; was in " + before + ", is in " + now)
		}
	}
	return refusedWith(last + "; still in " + before)
}

func unifiedCgroup() string {
	raw, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(raw)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return p
		}
	}
	return ""
}

// impostor asks the Workload API for another's identity.
func impostor(ctx context.Context, other string) attackResult {
	id, err := identity.ParseID(other)
	if err != nil {
		return attackResult{"unknown", err.Error()}
	}
	client, ctx, cancel, err := workloadAPI(ctx)
	if err != nil {
		return attackResult{"unknown", err.Error()}
	}
	defer cancel()
	defer func() { _ = client.Close() }()
	if _, err := client.FetchJWT(ctx, []string{"demo"}, id); err != nil {
		return refusedWith(err.Error())
	}
	return through("was given a token for " + other)
}

func ownIdentity(ctx context.Context) attackResult {
	client, ctx, cancel, err := workloadAPI(ctx)
	if err != nil {
		return attackResult{"unknown", err.Error()}
	}
	defer cancel()
	defer func() { _ = client.Close() }()
	svids, _, err := client.FetchX509(ctx)
	if err != nil {
		return refusedWith(err.Error())
	}
	return through(svids[0].ID.String())
}

func (c *cli) attackInWorkload(ctx context.Context, name, arg string) error {
	return json.NewEncoder(c.out).Encode(attack(ctx, name, arg))
}
