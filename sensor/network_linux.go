package sensor

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// loopback is the index of the one interface of a new network namespace.
const loopback = 1

// inNetns runs f on a thread in a network namespace of its own, which ends with it.
func inNetns(f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		return f()
	})
}

// onNetns asks by loading a program and attaching it in a network namespace of its own.
func onNetns(spec ebpf.ProgramSpec, attach func(*ebpf.Program) (io.Closer, error)) func(*scene) error {
	return func(*scene) error {
		return inNetns(func() error {
			p, err := load(&spec)
			if err != nil {
				return err
			}
			defer p.Close()
			l, err := attach(p)
			if err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			return l.Close()
		})
	}
}

var networkProbes = []probe{
	{
		"net.sk_lookup", KindNetwork, "5.9", "gives inbound connections to the proxy, whatever their port",
		onNetns(ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, Instructions: always(1)}, func(p *ebpf.Program) (io.Closer, error) {
			ns, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return nil, err
			}
			defer ns.Close()
			return link.AttachNetNs(int(ns.Fd()), p)
		}),
	},
	{
		"net.tcx_ingress", KindNetwork, "6.6", "sees packets that enter an interface",
		onNetns(ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.SchedCLS, Instructions: always(-1)}, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachTCX(link.TCXOptions{Interface: loopback, Program: p, Attach: ebpf.AttachTCXIngress})
		}),
	},
	{
		"net.tcx_egress", KindNetwork, "6.6", "stops packets that no socket hook sees, as those of AF_PACKET",
		onNetns(ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.SchedCLS, Instructions: always(-1)}, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachTCX(link.TCXOptions{Interface: loopback, Program: p, Attach: ebpf.AttachTCXEgress})
		}),
	},
	{
		"net.xdp", KindNetwork, "5.9", "drops packets before the network stack (generic mode)",
		onNetns(ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.XDP, Instructions: always(2)}, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachXDP(link.XDPOptions{Interface: loopback, Program: p, Flags: link.XDPGenericMode})
		}),
	},
	{
		"net.netfilter", KindNetwork, "6.4", "decides forwarded packets, without nftables",
		onNetns(ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.Netfilter, AttachType: ebpf.AttachNetfilter, Instructions: always(1)}, func(p *ebpf.Program) (io.Closer, error) {
			return link.AttachNetfilter(link.NetfilterOptions{
				Program: p, ProtocolFamily: link.NetfilterProtoIPv4, Hook: link.NetfilterInetLocalIn, Priority: -128,
			})
		}),
	},
	{"net.sk_msg", KindNetwork, "4.17", "joins two local sockets without the network stack between them", func(*scene) error {
		sockets, err := newMap(ebpf.MapSpec{Type: ebpf.SockHash, KeySize: 8, ValueSize: 8, MaxEntries: 1})
		if err != nil {
			return err
		}
		defer sockets.Close()
		p, err := load(&ebpf.ProgramSpec{Name: "redoubt_probe", Type: ebpf.SkMsg, AttachType: ebpf.AttachSkMsgVerdict, Instructions: always(1)})
		if err != nil {
			return err
		}
		defer p.Close()
		if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: sockets.FD(), Program: p, Attach: ebpf.AttachSkMsgVerdict}); err != nil {
			return fmt.Errorf("attach: %w", err)
		}
		if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: sockets.FD(), Program: p, Attach: ebpf.AttachSkMsgVerdict}); err != nil {
			return fmt.Errorf("detach: %w", err)
		}
		return nil
	}},
	{"net.redirect", KindNetwork, "3.19", "a listener steers by SO_ORIGINAL_DST where there is no BPF: transparent sockets can be made", func(*scene) error {
		return inNetns(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1), unix.Close(fd))
		})
	}},
}
