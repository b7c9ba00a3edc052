package machine

import (
	"testing"

	"github.com/redoubtsec/redoubt/identity"
)

// A unit or container is bounded by the cgroup that bears its very name, seen from the top: what it makes below cannot pass
// for a workload of its own, however it is called.
func TestUnitIsTheTopmostCgroupOfThatVeryName(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, c := range []struct{ fact, value, cgroup, want string }{
		{identity.FactUnit, "x.service", "/system.slice/x.service", "/system.slice/x.service"},
		{identity.FactUnit, "x.service", "/system.slice/x.service/x.service-1", "/system.slice/x.service"},
		{identity.FactUnit, "x.service", "/system.slice/x.service/x.service", "/system.slice/x.service"},
		{identity.FactUnit, "x.service", "/system.slice/my-x.service", ""},
		{identity.FactUnit, "session-1.scope", "/user.slice/session-1.scope", ""},
		{identity.FactContainerID, id, "/machine.slice/libpod-" + id + ".scope/a", "/machine.slice/libpod-" + id + ".scope"},
		{identity.FactContainerID, id, "/libpod_parent/libpod-" + id, "/libpod_parent/libpod-" + id},
		{identity.FactContainerID, id, "/docker/" + id + "/" + id, "/docker/" + id},
		{identity.FactContainerID, id, "/elsewhere/" + id + "x", ""},
		{"unix.uid", "7", "/x", ""},
	} {
		facts, err := identity.NewFactSet(identity.Fact{Name: c.fact, Value: c.value})
		if err != nil {
			t.Fatal(err)
		}
		if got := unitOf(Subject{Cgroup: c.cgroup, Facts: facts}); got != c.want {
			t.Errorf("%s in %s: got %q, want %q", c.value, c.cgroup, got, c.want)
		}
	}
}
