package attest_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/attest"
)

// engine writes a program that plays podman.
func engine(t *testing.T, script string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "podman")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return []string{path}
}

func answer(t *testing.T, id, cgroup string, labels map[string]string) string {
	t.Helper()
	data, err := json.Marshal([]map[string]any{{
		"Id": id, "Image": id64, "ImageName": "localhost/orders:1", "ImageDigest": "sha256:" + id64,
		"State": map[string]any{"Pid": 1, "CgroupPath": cgroup}, "Config": map[string]any{"Labels": labels},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return "cat <<'X'\n" + string(data) + "\nX\n"
}

// A process in a cgroup that bears a podman container's name; what podman says differs.
func TestPodmanMustVouchForACgroup(t *testing.T) {
	base := "/" + identity.Unique("redoubt-attest")
	at := base + "/libpod-" + id64
	many := map[string]string{"with blank": "x", "long" + strings.Repeat("x", 300): "x", "control": "a\x01b"}
	for i := range attest.MaxLabels {
		many[fmt.Sprintf("zz%03d", i)] = "v"
	}
	a := attestor(t, attest.Config{})
	cgroups(t, a, base, at, at+"/below")
	pid := playing(t, "sleep")
	enter(t, a, at+"/below", pid)
	t.Cleanup(func() { enter(t, a, "/", pid) })
	for _, c := range []struct {
		name, script, id, image, warning, counted string
	}{
		{"vouched for", answer(t, id64, at, map[string]string{"app": "orders"}), id64, "localhost/orders:1", "", "answered"},
		{"another cgroup", answer(t, id64, base+"/libpod-x", nil), "", "", "another cgroup", "answered"},
		{"a cgroup that begins alike", answer(t, id64, at[:len(at)-1], nil), "", "", "another cgroup", "answered"},
		{"no cgroup", answer(t, id64, "", nil), "", "", "another cgroup", "answered"},
		{"the root", answer(t, id64, "/", nil), "", "", "another cgroup", "answered"},
		{"another container", answer(t, strings.Repeat("f", 64), at, nil), "", "", "another cgroup", "answered"},
		{"unknown", "echo 'Error: no such container' >&2; exit 125", "", "", "knows no such container", "unknown"},
		{"none", "echo '[]'", "", "", "knows no such container", "answered"},
		{"failing", "exit 1", id64, "", "podman failed", "failed"},
		{"nonsense", "echo hello", id64, "", "not of a known form", "answered"},
		{"hanging", "sleep 60", id64, "", "did not answer", "timeout"},
		{"endless", "yes", id64, "", "podman", ""},
		{"many labels", answer(t, id64, at, many), id64, "localhost/orders:1", "container.label", "answered"},
	} {
		t.Run(c.name, func(t *testing.T) {
			meter := counts{}
			a := attestor(t, attest.Config{Podman: engine(t, c.script), EngineTimeout: time.Second, Meter: meter})
			s := facts(t, a, pid)
			wantText(t, s, identity.FactContainerID, c.id, identity.FromContainer)
			wantText(t, s, identity.FactImage, c.image, identity.FromContainer)
			if c.id != "" {
				wantText(t, s, identity.FactEngine, "podman", identity.FromContainer)
			}
			if c.warning != "" {
				wantWarning(t, s, c.warning)
			}
			if c.counted != "" && meter["attest_engine engine podman result "+c.counted] != 1 {
				t.Errorf("counted %v", meter)
			}
			switch c.name {
			case "vouched for":
				wantText(t, s, "container.label.app", "orders", identity.FromContainer)
				wantText(t, s, identity.FactImageDigest, "sha256:"+id64, identity.FromContainer)
				facts(t, a, pid)
				if meter["attest_engine engine podman result answered"] != 1 {
					t.Errorf("podman was asked again: %v", meter)
				}
			case "hanging":
				begin := time.Now()
				wantWarning(t, facts(t, a, pid), "left alone for now")
				if time.Since(begin) > 900*time.Millisecond {
					t.Error("a hung engine was waited for twice")
				}
			case "many labels":
				if meter["attest_labels_cut"] != 3 {
					t.Errorf("counted %v", meter)
				}
				wantWarning(t, s, "no name of a fact")
				wantText(t, s, "container.label.with blank", "", "")
			}
		})
	}
}

// A user to whom a cgroup was delegated can make one with any name below.
func TestNamesInDelegatedSubtreesAreNotBelieved(t *testing.T) {
	a := attestor(t, attest.Config{Podman: engine(t, "exit 1")})
	base := "/" + identity.Unique("redoubtattest") + ".slice"
	box, unit := base+"/docker-"+id64+".scope", base+"/nginx.service"
	cgroups(t, a, base, box, unit)
	pid := playing(t, "sleep")
	t.Cleanup(func() { enter(t, a, "/", pid) })

	enter(t, a, box, pid)
	wantText(t, facts(t, a, pid), identity.FactContainerID, id64, identity.FromContainer)
	wantText(t, facts(t, a, pid), identity.FactEngine, "docker", identity.FromContainer)
	enter(t, a, unit, pid)
	wantText(t, facts(t, a, pid), identity.FactUnit, "nginx.service", identity.FromKernel)

	dir := filepath.Join(a.CgroupRoot(), base)
	for name, delegate := range map[string]func() error{
		"owner": func() error { return os.Chown(dir, 1000, 1000) },
		"mode":  func() error { return os.Chown(dir, 0, 0) },
	} {
		if err := delegate(); err != nil {
			t.Fatal(err)
		}
		if name == "mode" {
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		enter(t, a, box, pid)
		s := facts(t, a, pid)
		wantText(t, s, identity.FactContainerID, "", "")
		wantText(t, s, identity.FactEngine, "", "")
		wantWarning(t, s, "delegated")
		enter(t, a, unit, pid)
		s = facts(t, a, pid)
		wantText(t, s, identity.FactUnit, "", "")
		wantWarning(t, s, "delegated")
		if _, err := a.Resolve(t.Context(), "nginx"); err == nil {
			t.Error("the unit of a user was found")
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRuncRecordsMustBeRoots(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	a := attestor(t, attest.Config{RuncRoots: []string{root}})
	base := "/" + identity.Unique("redoubt-attest")
	cgroups(t, a, base, base+"/c1")
	pid := playing(t, "sleep")
	t.Cleanup(func() { enter(t, a, "/", pid) })
	enter(t, a, base+"/c1", pid)
	file := filepath.Join(root, "c1", "state.json")
	state := fmt.Sprintf(`{"id":"c1","init_process_pid":%d,"cgroup_paths":{"":%q},"config":{"labels":["app=orders"]}}`, pid, filepath.Join(a.CgroupRoot(), base, "c1"))
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time from memory
		s := facts(t, a, pid)
		wantText(t, s, identity.FactContainerID, "c1", identity.FromContainer)
		wantText(t, s, identity.FactEngine, "runc", identity.FromContainer)
		wantText(t, s, "container.label.app", "orders", identity.FromContainer)
	}
	found, err := a.Containers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if i := indexOf(found, pid); i < 0 {
		t.Errorf("not among %d containers", len(found))
	}
	// A record of a container that is gone, whose cgroup a user could make anew.
	for uid, want := range map[int]string{1000: "", 0: "c1"} {
		if err := os.Chown(filepath.Join(a.CgroupRoot(), base), uid, uid); err != nil {
			t.Fatal(err)
		}
		wantText(t, facts(t, a, pid), identity.FactContainerID, want, identity.FromContainer)
	}
	if err := os.Chown(file, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	wantText(t, facts(t, a, pid), identity.FactContainerID, "", "")
	if err := os.Chown(file, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	wantText(t, facts(t, a, pid), identity.FactContainerID, "", "")
}

func indexOf(list []attest.Subject, pid int) int {
	for i, s := range list {
		if s.PID == pid {
			return i
		}
	}
	return -1
}

func TestResolve(t *testing.T) {
	a := attestor(t, attest.Config{})
	unit := strings.ToLower(identity.Unique("redoubtattest"))
	base := "/" + unit + ".slice"
	at := base + "/" + unit + ".service"
	cgroups(t, a, base, at, at+"/below")
	one, two := playing(t, "sleep"), playing(t, "sleep")
	enter(t, a, at, one)
	enter(t, a, at+"/below", two)
	t.Cleanup(func() { enter(t, a, "/", one); enter(t, a, "/", two) })
	id, err := attest.CgroupIDOf(filepath.Join(a.CgroupRoot(), at))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		kind attest.Kind
		n    int
	}{
		{unit, attest.KindUnit, 2},
		{unit + ".service", attest.KindUnit, 2},
		{at, attest.KindCgroup, 2},
		{strings.TrimPrefix(at, "/"), attest.KindCgroup, 2},
		{at + "/../" + unit + ".service/", attest.KindCgroup, 2},
		{filepath.Join(a.CgroupRoot(), at), attest.KindCgroup, 2},
		{strconv.Itoa(one), attest.KindPID, 1},
	} {
		got, err := a.Resolve(t.Context(), c.name)
		if err != nil || got.Kind != c.kind || got.Cgroup != at || got.CgroupID != id || len(got.PIDs) != c.n || got.Unit != unit+".service" {
			t.Errorf("%q: %+v, %v", c.name, got, err)
		}
	}
	for _, name := range []string{"", "no-such-unit", "/no/such/cgroup", "../../etc", "a b", "/etc", "x\x00y"} {
		_, err := a.Resolve(t.Context(), name)
		wantRefusal(t, err, attest.ErrName)
	}
	_, err = a.Resolve(t.Context(), "1073741824")
	wantRefusal(t, err, attest.ErrGone)
	other := "/" + unit + "-2.slice"
	cgroups(t, a, other, other+"/"+unit+".service")
	_, err = a.Resolve(t.Context(), unit)
	wantRefusal(t, err, attest.ErrAmbiguous)
}

// tool returns the path of a program, or skips.
func tool(t *testing.T, name string) string {
	t.Helper()
	needRoot(t)
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed (make test installs it)", name)
	}
	return path
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	return strings.TrimSpace(string(out))
}

// static builds a program that runs in an empty root and sleeps, and returns its SHA-256.
func static(t *testing.T, path string) string {
	t.Helper()
	source := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nimport \"time\"\n\nfunc main() { time.Sleep(time.Minute) }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), tool(t, "go"), "build", "-o", path, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GO111MODULE=off", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func TestRealPodmanContainer(t *testing.T) {
	path := tool(t, "podman")
	tool(t, "runc")
	podman := []string{"--runtime", "runc", "--cgroup-manager=cgroupfs"}
	args := func(more ...string) []string { return append(append([]string{}, podman...), more...) }
	dir := t.TempDir()
	sum := static(t, filepath.Join(dir, "app"))
	if err := os.WriteFile(filepath.Join(dir, "Containerfile"), []byte("FROM scratch\nCOPY app /app\nLABEL team=\"shop\"\nENTRYPOINT [\"/app\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	image := "localhost/" + strings.ToLower(identity.Unique("redoubt-attest")) + ":1"
	run(t, path, args("build", "-q", "-t", image, dir)...)
	t.Cleanup(func() { _ = exec.Command(path, args("rmi", "-f", image)...).Run() })
	id := run(t, path, args("run", "-d", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024",
		"--label", "app=orders", "--env", "CONTAINER_ID=fake", "--user", "1234:1235", image)...)
	t.Cleanup(func() { _ = exec.Command(path, args("rm", "-f", "-t", "0", id)...).Run() })
	digest := run(t, path, args("image", "inspect", "--format", "{{.Digest}}", image)...)

	a := attestor(t, attest.Config{Podman: append([]string{path}, podman...)})
	found, err := a.Containers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := -1
	for n, s := range found {
		if s.Facts.Text(identity.FactContainerID) == id {
			i = n
		}
	}
	if i < 0 {
		t.Fatalf("%s is not among %d containers", id, len(found))
	}
	s := found[i]
	wantText(t, s, identity.FactEngine, "podman", identity.FromContainer)
	wantText(t, s, identity.FactImage, image, identity.FromContainer)
	wantText(t, s, identity.FactImageDigest, digest, identity.FromContainer)
	wantText(t, s, "container.label.app", "orders", identity.FromContainer)
	wantText(t, s, "container.label.team", "shop", identity.FromContainer)
	wantText(t, s, identity.FactExePath, "/app", identity.FromContainer)
	wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)
	if f, _ := s.Facts.Get(identity.FactUID); f.Value != int64(1234) {
		t.Errorf("got %+v", f)
	}
	if len(s.Warnings) > 0 {
		t.Errorf("warned: %q", s.Warnings)
	}
	run(t, path, args("rm", "-f", "-t", "0", id)...)
	_, err = a.Process(t.Context(), s.PID)
	wantRefusal(t, err, attest.ErrGone)
}

func TestRealRuncContainer(t *testing.T) {
	path := tool(t, "runc")
	root, bundle := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(bundle, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	sum := static(t, filepath.Join(bundle, "rootfs", "app"))
	run(t, path, "spec", "-b", bundle)
	file := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	process, _ := config["process"].(map[string]any)
	process["args"], process["terminal"] = []string{"/app"}, false
	delete(process, "rlimits")
	config["annotations"] = map[string]string{"app": "orders"}
	if data, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	id := identity.Unique("redoubt-attest")
	cmd := exec.Command(path, "--root", root, "run", "-d", "-b", bundle, id)
	log, err := os.Create(filepath.Join(bundle, "log")) // a file: the container keeps what it is given
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(log.Name())
		t.Fatalf("runc: %v: %s", err, text)
	}
	t.Cleanup(func() { _ = exec.Command(path, "--root", root, "delete", "-f", id).Run() })
	a := attestor(t, attest.Config{RuncRoots: []string{root}})
	found, err := a.Containers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range found {
		if s.Facts.Text(identity.FactContainerID) != id {
			continue
		}
		wantText(t, s, identity.FactEngine, "runc", identity.FromContainer)
		wantText(t, s, "container.label.app", "orders", identity.FromContainer)
		// runc returns when its own program is about to execute the container's.
		for range 500 {
			if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.PID)); link == "/app" {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
		s = facts(t, a, s.PID)
		wantText(t, s, identity.FactExePath, "/app", identity.FromContainer)
		wantText(t, s, identity.FactExeSHA256, sum, identity.FromKernel)
		return
	}
	t.Errorf("%s is not among %d containers", id, len(found))
}
