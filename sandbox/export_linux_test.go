package sandbox

import "os"

// For tests of what cannot be seen from outside.
var (
	ParseStatus       = parseStatus
	ParseCgroupMounts = func(data []byte) (int, error) { m, err := parseCgroupMounts(data); return len(m), err }
	BaitParents       = baitParents
	SweepBaits        = sweepBaits
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

// JudgedUntried is what Prove would say of an attack that was not made.
func JudgedUntried(c ProveConfig, name, how string) any {
	return protections(c, []outcome{{Name: ProtectCaps, Refused: true}, {Name: name, Untried: true, How: how}})
}

// Complete are the names of the attacks not made, of a prober that says nothing.
func Complete() (names []string) {
	for _, o := range complete(nil) {
		if o.Untried {
			names = append(names, o.Name)
		}
	}
	return names
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
	"foreign":   say(func() outcome { return inChild(ProtectForeign, childForeign) }),
	"sockpkt":   say(func() outcome { return trySocket("", 2, sockPacket) }),
	"no-bait":   say(func() outcome { return setUID("") }),
	"bad-bait":  say(func() outcome { return setUID("/nonexistent/bait") }),
	"odd-bait":  say(func() outcome { return setUID("/bin/false") }),
	"no-child":  say(func() outcome { return inChild(ProtectForeign, "child-unknown") }),
	"no-family": say(func() outcome { return trySocket("", 9999, 1) }),
	"vsockonly": say(func() outcome { return trySocket("", 40, 1) }),
}

func say(attack func() outcome) func() (bool, string) {
	return func() (bool, string) {
		o := attack()
		if o.Untried {
			return false, "untried: " + o.How
		}
		return o.Refused, o.How
	}
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
