package sandbox

import "os"

// For tests of what cannot be seen from outside.
var (
	ParseStatus       = parseStatus
	ParseCgroupMounts = func(data []byte) (int, error) { m, err := parseCgroupMounts(data); return len(m), err }
	RootTester        = rootTester
	OnlyNotRoot       = statusNotRoot
	OnlyRoot          = statusIsRoot
)

const MaxSpecBytes = maxSpecBytes

// Disarm undoes Init until the returned function is called.
func Disarm() func() { armed.Store(false); return func() { armed.Store(true) } }

// Judged is what Prove would say of one attack.
func Judged(c ProveConfig, name string, refused bool, how string) any {
	return protections(c, []outcome{{Name: ProtectCaps, Refused: true}, {Name: name, Refused: refused, How: how}})
}

// Attacks of the prober, for use as a workload of the tests.
var Attacks = map[string]func() (refused bool, how string){
	"leave":     say(leaveCgroup),
	"cgroupfs":  say(writeCgroupfs),
	"io_uring":  say(ioUring),
	"packet":    say(packet),
	"vsock":     say(vsock),
	"caps":      say(capabilities),
	"nnp":       say(noNewPrivs),
	"foreign":   say(func() outcome { return inChild(ProtectForeign, childForeign, nil) }),
	"sockpkt":   say(func() outcome { return trySocket("", 2, sockPacket) }),
	"vsockonly": say(func() outcome { return trySocket("", 40, 1) }),
}

func say(attack func() outcome) func() (bool, string) {
	return func() (bool, string) { o := attack(); return o.Refused, o.How }
}

// Accounts are the ids of a file of accounts.
func Accounts(data []byte) map[uint32]bool {
	used := map[uint32]bool{}
	addAccounts(used, data)
	return used
}

// ProtectCgroupfsHere is the step without the one before it.
func ProtectCgroupfsHere() error {
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	return protectCgroupfs(wire{HostMounts: mounts})
}
