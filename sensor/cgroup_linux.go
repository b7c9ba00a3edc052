package sensor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/identity"
)

// cgroupPrefix begins the name of the cgroup made for a probe; the id of the process that made it follows.
const cgroupPrefix = "redoubt-probe-"

// cgroupPatience is how long the kernel may take to let go of a cgroup whose last process has ended.
const cgroupPatience = 2 * time.Second

// makeCgroup makes a cgroup for one probe, and removes those of probes whose process is gone.
func makeCgroup(root string) (string, error) {
	if root == "" {
		return "", errors.New("no cgroup2 mount is known")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil {
		return "", fmt.Errorf("%s: %w", root, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return "", fmt.Errorf("%s is not a cgroup2 mount", root)
	}
	sweepCgroups(root)
	dir := filepath.Join(root, identity.Unique(cgroupPrefix+strconv.Itoa(os.Getpid())))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	return dir, nil
}

// staleAfter is how old a cgroup must be to be swept up: process ids mean nothing across namespaces, and no probe takes
// that long.
const staleAfter = time.Minute

// sweepCgroups removes what killed probes have left. A directory that is not empty stays: rmdir refuses it.
func sweepCgroups(root string) {
	left, _ := filepath.Glob(filepath.Join(root, cgroupPrefix+"*")) // the pattern is well-formed
	for _, dir := range left {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix), "-")
		st, err := os.Stat(dir)
		if err != nil || time.Since(st.ModTime()) < staleAfter {
			continue
		}
		if n, err := strconv.Atoi(pid); err == nil && n > 0 && errors.Is(unix.Kill(n, 0), unix.ESRCH) {
			_ = unix.Rmdir(dir) // another may have been quicker
		}
	}
}

func removeCgroup(dir string) error {
	for end := time.Now().Add(cgroupPatience); ; time.Sleep(time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

var cgroupProbes = []probe{
	{"cgroup.v2", KindCgroup, "4.5", "every workload has a cgroup of its own in the unified hierarchy", func(s *scene) error {
		return s.cgroupErr
	}},
	{"cgroup.clone_into", KindCgroup, "5.7", "a workload starts inside its cgroup, and is never outside it (CLONE_INTO_CGROUP)", func(s *scene) error {
		if s.cgroupErr != nil {
			return s.cgroupErr
		}
		_, err := runChild(s.cgroup)
		return err
	}},
	{"cgroup.freeze", KindCgroup, "5.2", "a quarantined workload is stopped as a whole", func(s *scene) error {
		if s.cgroupErr != nil {
			return s.cgroupErr
		}
		return control(s.cgroup, "cgroup.freeze", "1", "0")
	}},
	{"cgroup.kill", KindCgroup, "5.14", "a workload is ended as a whole, with what it has forked", func(s *scene) error {
		if s.cgroupErr != nil {
			return s.cgroupErr
		}
		// In a cgroup of its own: one that was killed once kills whatever is later started into it by CLONE_INTO_CGROUP
		// (measured on 6.18: the kernel compares the kill counts of the new cgroup and of the parent's).
		dir := filepath.Join(s.cgroup, "kill")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		return errors.Join(control(dir, "cgroup.kill", "1"), removeCgroup(dir))
	}},
	{"cgroup.denies", KindCgroupHook, "4.17", "proof that hooks refuse: a process in the cgroup tries to connect, and gets EPERM", func(s *scene) error {
		if s.cgroupErr != nil {
			return s.cgroupErr
		}
		return provesDenial(s.cgroup, 0)
	}},
}

// provesDenial attaches a program with this verdict, which is to refuse, and has a process in the cgroup connect.
func provesDenial(cgroup string, verdict int32) error {
	free, err := runChild(cgroup)
	if err != nil {
		return err
	}
	if free == unix.EPERM {
		return errors.New("connecting is refused here without a hook, so that nothing can be proved")
	}
	l, err := attachHook(cgroup, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, verdict)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	got, err := runChild(cgroup)
	if err != nil {
		return err
	}
	if got != unix.EPERM {
		return fmt.Errorf("%w: a process in the cgroup got error number %d", errAllowed, int(got))
	}
	return nil
}

// control writes each value to a control file of a cgroup.
func control(cgroup, file string, values ...string) error {
	for _, v := range values {
		if err := os.WriteFile(filepath.Join(cgroup, file), []byte(v), 0); err != nil {
			return err
		}
	}
	return nil
}

// hook is a place on a cgroup where a program decides or watches.
type hook struct {
	name  string
	typ   ebpf.ProgramType
	at    ebpf.AttachType
	least string
	means string
}

var hooks = []hook{
	{"connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, "4.17", "decides and steers connections over IPv4"},
	{"connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, "4.17", "decides and steers connections over IPv6, IPv4-mapped ones too"},
	{"connect_unix", ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixConnect, "6.7", "decides connections to local sockets"},
	{"sendmsg4", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Sendmsg, "4.18", "decides datagrams over IPv4, IPv4-mapped ones too"},
	{"sendmsg6", ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Sendmsg, "4.18", "decides datagrams over IPv6"},
	{"bind4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind, "4.17", "decides who listens over IPv4"},
	{"bind6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind, "4.17", "decides who listens over IPv6"},
	{"post_bind4", ebpf.CGroupSock, ebpf.AttachCGroupInet4PostBind, "4.17", "learns the port that was bound over IPv4"},
	{"post_bind6", ebpf.CGroupSock, ebpf.AttachCGroupInet6PostBind, "4.17", "learns the port that was bound over IPv6"},
	{"getpeername4", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername, "5.8", "shows a steered client the peer that it asked for"},
	{"getpeername6", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername, "5.8", "shows a steered client the peer that it asked for"},
	{"sock_create", ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, "4.10", "decides kinds of sockets: raw ones above all"},
	{"sock_release", ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, "5.9", "forgets what was known of a socket"},
	{"sockops", ebpf.SockOps, ebpf.AttachCGroupSockOps, "4.13", "ties a connection to the destination that was asked for"},
	{"skb_ingress", ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress, "4.10", "drops packets to a workload"},
	{"skb_egress", ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, "4.10", "drops packets of a workload, of inherited sockets too"},
	{"getsockopt", ebpf.CGroupSockopt, ebpf.AttachCGroupGetsockopt, "5.3", "tells the proxy where a steered connection was to go"},
	{"setsockopt", ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, "5.3", "decides marks and options of sockets"},
	{"sysctl", ebpf.CGroupSysctl, ebpf.AttachCGroupSysctl, "5.2", "decides kernel settings"},
	{"device", ebpf.CGroupDevice, ebpf.AttachCGroupDevice, "4.15", "decides devices"},
}

// hookProbes attaches a program that allows everything to the probe's own, empty cgroup.
func hookProbes() []probe {
	var out []probe
	for _, h := range hooks {
		out = append(out, probe{Name("cgroup." + h.name), KindCgroupHook, h.least, h.means, func(s *scene) error {
			if s.cgroupErr != nil {
				return s.cgroupErr
			}
			l, err := attachHook(s.cgroup, h.typ, h.at, 1)
			if err != nil {
				return err
			}
			return l.Close()
		}})
	}
	return out
}

// attachHook attaches a program that answers verdict (1 allows, 0 refuses) to everything.
func attachHook(cgroup string, typ ebpf.ProgramType, at ebpf.AttachType, verdict int32) (io.Closer, error) {
	p, err := load(&ebpf.ProgramSpec{Name: "redoubt_probe", Type: typ, AttachType: at, Instructions: always(verdict)})
	if err != nil {
		return nil, err
	}
	defer p.Close() // the link holds it
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: p})
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	return l, nil
}

// childPatience bounds the life of the probe's child, which makes two system calls.
const childPatience = 5 * time.Second

// runChild starts the probe's own tiny program directly in a cgroup, and returns the error number that its attempt to
// connect to port 1 of this machine came to (0: something listens there).
func runChild(cgroup string) (unix.Errno, error) {
	program, err := childProgram()
	if err != nil {
		return 0, err
	}
	file, err := memoryFile(program)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	dir, err := os.Open(cgroup)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	ctx, cancel := context.WithTimeout(context.Background(), childPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	cmd.Args, cmd.Env = []string{"redoubt-probe"}, []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return unix.Errno(exit.ExitCode()), nil
	}
	if err != nil {
		return 0, fmt.Errorf("start a process in the cgroup: %w", err)
	}
	return 0, nil
}

// memoryFile returns an executable file that has no name.
func memoryFile(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("redoubt-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "redoubt-probe")
	if _, err := f.Write(content); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
