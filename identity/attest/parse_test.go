package attest_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/identity/attest"
)

var id64 = strings.Repeat("0123456789abcdef", 4)

func TestStatWithHostileNames(t *testing.T) {
	tail := " S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 5 6"
	for _, name := range []string{"sh", "a) R 1 (b", "x y", ") S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", "\n) Z 9", "", "((("} {
		state, parent, flags, start, err := attest.ParseStat([]byte("412 (" + name + ")" + tail + "\n"))
		if err != nil || state != 'S' || parent != 7 || flags != 4194560 || start != 4242 {
			t.Errorf("%q: state %c, parent %d, flags %d, start %d, %v", name, state, parent, flags, start, err)
		}
	}
	for _, bad := range []string{"", "412 (sh", "412 (sh)", "412 (sh) S 7", "412 (sh) SS" + tail[2:], "412 (sh) S x" + tail[4:], "412 (sh) S -1" + tail[4:]} {
		if _, _, _, _, err := attest.ParseStat([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestStatusWithHostileNames(t *testing.T) {
	// The kernel escapes the line end that the process put into its name.
	uid, gid, err := attest.ParseStatus([]byte("Name:\tx\\nUid:\t0\t0\t0\t0\nUid:\t5\t6\t7\t8\nGid:\t1\t2\t3\t4\n"))
	if err != nil || uid != [4]uint32{5, 6, 7, 8} || gid != [4]uint32{1, 2, 3, 4} {
		t.Errorf("got %v, %v, %v", uid, gid, err)
	}
	for _, bad := range []string{"", "Uid:\t1\t2\t3\t4\n", "Uid:\t1\nGid:\t1\t1\t1\t1\n", "Uid:\t1\t1\t1\t-1\nGid:\t1\t1\t1\t1\n", "Uid:\t1\t1\t1\t1\nUid:\t0\t0\t0\t0\nGid:\t1\t1\t1\t1\n"} {
		if _, _, err := attest.ParseStatus([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestCgroupFile(t *testing.T) {
	for text, want := range map[string][2]string{
		"0::/a/b\n":                              {"/a/b", ""},
		"0::/\n":                                 {"/", ""},
		"9:name=systemd:/s\n1:cpu:/c\n0::/u:v\n": {"/u:v", "/s"},
	} {
		unified, systemd, err := attest.ParseCgroup([]byte(text))
		if err != nil || unified != want[0] || systemd != want[1] {
			t.Errorf("%q: %q, %q, %v", text, unified, systemd, err)
		}
	}
	for _, bad := range []string{"", "1:cpu:/x\n", "0::relative\n", "0::/../outside\n", "0::/..\n", "0::/gone (deleted)\n", "0::/a\n0::/b\n", "x\n"} {
		if _, _, err := attest.ParseCgroup([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestUnits(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/nginx.service":                         "nginx.service",
		"/system.slice/system-getty.slice/getty@tty1.service": "getty@tty1.service",
		"/init.scope":                   "init.scope",
		"/system.slice/_cgroup.service": "cgroup.service",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service": "user@1000.service",
		"/user.slice/user-1000.slice/session-1.scope":                           "session-1.scope",
		"/system.slice/docker-" + id64 + ".scope/system.slice/fake.service":     "docker-" + id64 + ".scope",
		"/libpod_parent/nginx.service":                                          "",
		"/system.slice":                                                         "",
		"/":                                                                     "",
		"/system.slice/ng inx.service":                                          "",
		"/system.slice/.service":                                                "",
		"/system.slice/" + strings.Repeat("x", 300) + ".service":                "",
	} {
		if unit, at := attest.UnitOf(path); unit != want || unit != "" && !strings.HasPrefix(path, at) {
			t.Errorf("%s: %q at %q, want %q", path, unit, at, want)
		}
	}
}

func TestContainerNames(t *testing.T) {
	for path, engine := range map[string]string{
		"/libpod_parent/libpod-" + id64:                                "podman",
		"/machine.slice/libpod-" + id64 + ".scope/container":           "podman",
		"/machine.slice/libpod-conmon-" + id64 + ".scope":              "",
		"/libpod_parent/conmon":                                        "",
		"/docker/" + id64:                                              "docker",
		"/system.slice/docker-" + id64 + ".scope/init":                 "docker",
		"/kubepods.slice/x/cri-containerd-" + id64 + ".scope":          "containerd",
		"/k8s.io/" + id64:                                              "containerd",
		"/kubepods.slice/crio-" + id64 + ".scope":                      "crio",
		"/kubepods.slice/crio-conmon-" + id64 + ".scope":               "",
		"/libpod_parent/libpod-" + strings.ToUpper(id64):               "",
		"/libpod_parent/libpod-" + id64[:63]:                           "",
		"/x/" + id64:                                                   "",
		"/docker/" + id64 + "/machine.slice/libpod-" + id64 + ".scope": "docker",
	} {
		got, id, at := attest.ContainerOf(path)
		if got != engine || engine != "" && (id != id64 || !strings.HasPrefix(path, at) || !strings.Contains(at, id64)) {
			t.Errorf("%s: %q, %q, %q, want %q", path, got, id, at, engine)
		}
	}
}

func TestMountinfo(t *testing.T) {
	points, err := attest.ParseMountinfo([]byte("41 31 0:38 / /a\\040b\\134 rw,ro shared:1 master:2 - cgroup2 x rw\n1 2 0:1 / / rw - ext4 /dev/x rw\n"))
	if diff := cmp.Diff([]string{`/a b\`, "/"}, points); diff != "" || err != nil {
		t.Error(diff, err)
	}
	for _, bad := range []string{"x\n", "1 2 3\n", "a 2 0:1 / / rw - ext4 x rw\n", "1 2 0:1 / / rw -\n"} {
		if _, err := attest.ParseMountinfo([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestPodmanAnswers(t *testing.T) {
	good := `[{"Id":"` + id64 + `","Image":"` + id64 + `","ImageName":"localhost/x:1","ImageDigest":"sha256:` + id64 +
		`","State":{"Pid":7,"CgroupPath":"machine.slice/libpod-x"},"Config":{"Labels":{"a":"b"}}}]`
	got, err := attest.ParsePodman([]byte(good))
	want := attest.Record{ID: id64, Cgroup: "/machine.slice/libpod-x", Image: "localhost/x:1", Digest: "sha256:" + id64, PID: 7, Labels: map[string]string{"a": "b"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
	for _, bad := range []string{
		"", "[]", "{}", "[{}]", "[" + strings.Repeat("[", 10000), strings.Replace(good, `"sha256:`, `"md5:`, 1),
		strings.Replace(good, `"Pid":7`, `"Pid":-7`, 1), strings.Replace(good, `{"a":"b"}`, `{"a":1}`, 1), strings.TrimSuffix(good, "]") + "," + good[1:],
	} {
		if _, err := attest.ParsePodman([]byte(bad)); err == nil {
			t.Errorf("%.80q was read", bad)
		}
	}
	if d, err := attest.ParsePodmanImage([]byte(`[{"Digest":"sha256:` + id64 + `"}]`)); err != nil || d != "sha256:"+id64 {
		t.Errorf("got %q, %v", d, err)
	}
	for _, bad := range []string{"", "[]", "[{}]", `[{"Digest":"sha256:x"}]`} {
		if _, err := attest.ParsePodmanImage([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestRuncStates(t *testing.T) {
	good := `{"id":"c1","init_process_pid":7,"init_process_start":9,"cgroup_paths":{"":"/sys/fs/cgroup/unified/c1","cpu":"/sys/fs/cgroup/cpu/c1"},"config":{"labels":["bundle=/b","k=v=w","bad"]}}`
	got, err := attest.ParseRunc([]byte(good), "/sys/fs/cgroup/unified")
	want := attest.Record{ID: "c1", Cgroup: "/c1", PID: 7, Start: 9, Labels: map[string]string{"bundle": "/b", "k": "v=w"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
	for _, outside := range []string{"/sys/fs/cgroup/unified/../x", "/elsewhere", "", "/sys/fs/cgroup/unifiedx/c1", "/sys/fs/cgroup/unified"} {
		got, err := attest.ParseRunc([]byte(strings.Replace(good, "/sys/fs/cgroup/unified/c1", outside, 1)), "/sys/fs/cgroup/unified")
		if err != nil || got.Cgroup != "" {
			t.Errorf("%q: %q, %v", outside, got.Cgroup, err)
		}
	}
	for _, bad := range []string{"", "{}", "[]", `{"id":"a/b","init_process_pid":7}`, `{"id":"a"}`, `{"id":"a","init_process_pid":-1}`} {
		if _, err := attest.ParseRunc([]byte(bad), "/"); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func FuzzStat(f *testing.F) {
	if data, err := os.ReadFile("/proc/self/stat"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("1 (a) R 1 (b) S 7 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 5 6"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, parent, _, _, err := attest.ParseStat(data); err == nil && parent < 0 {
			t.Error("a parent below zero")
		}
	})
}

func FuzzProcessStatus(f *testing.F) {
	if data, err := os.ReadFile("/proc/self/status"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("Uid:\t1\t1\t1\t1\nGid:\t1\t1\t1\t1\n"))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _, _ = attest.ParseStatus(data) })
}

func FuzzCgroup(f *testing.F) {
	if data, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("0::/system.slice/a.service/libpod-" + id64 + ".scope\n"))
	f.Add([]byte("0::/docker/" + id64 + "/x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		unified, _, err := attest.ParseCgroup(data)
		if err != nil {
			return
		}
		if !strings.HasPrefix(unified, "/") || strings.HasPrefix(unified, "/../") {
			t.Errorf("accepted %q", unified)
		}
		if unit, at := attest.UnitOf(unified); unit != "" && !strings.HasPrefix(unified, at) {
			t.Errorf("unit %q of %q is at %q", unit, unified, at)
		}
		if engine, id, at := attest.ContainerOf(unified); engine != "" && (!attest.IsContainerID(id) || !strings.HasPrefix(unified, at)) {
			t.Errorf("container %q of %q is at %q", id, unified, at)
		}
	})
}

func FuzzMountinfo(f *testing.F) {
	if data, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(data)
	}
	f.Add([]byte("1 2 0:1 / /a\\04 rw - ext4 x rw"))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = attest.ParseMountinfo(data); _ = attest.Unescape(string(data)) })
}

func FuzzRunc(f *testing.F) {
	f.Add([]byte(`{"id":"c1","init_process_pid":7,"cgroup_paths":{"":"/sys/fs/cgroup/c1"},"config":{"labels":["a=b"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := attest.ParseRunc(data, "/sys/fs/cgroup")
		if err == nil && (r.ID == "" || r.Cgroup != "" && (!strings.HasPrefix(r.Cgroup, "/") || strings.Contains(r.Cgroup, "/../"))) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func FuzzPodman(f *testing.F) {
	f.Add([]byte(`[{"Id":"` + id64 + `","ImageName":"x","State":{"Pid":7,"CgroupPath":"/x"},"Config":{"Labels":{"a":"b"}}}]`))
	f.Add([]byte(`[{"Digest":"sha256:` + id64 + `"}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := attest.ParsePodman(data); err == nil && !attest.IsContainerID(r.ID) {
			t.Errorf("accepted %+v", r)
		}
		if d, err := attest.ParsePodmanImage(data); err == nil && len(d) != len("sha256:")+64 {
			t.Errorf("accepted %q", d)
		}
	})
}
