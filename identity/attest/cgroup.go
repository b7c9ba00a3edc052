package attest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// deletedMark is what the kernel puts behind the path of a file or cgroup that has no name any more.
const deletedMark = " (deleted)"

var (
	errNoUnified = errors.New("it is in no cgroup of the unified hierarchy (cgroup2)")
	errOutside   = errors.New("its cgroup is outside the agent's cgroup namespace")
	errRemoved   = errors.New("its cgroup was removed")
)

// place is where a process is, by /proc/PID/cgroup.
//
// Shape: comparable.
type place struct {
	unified string // path in the unified hierarchy
	systemd string // path in systemd's own hierarchy of version 1, in hybrid set-ups; or empty
}

// parseCgroup reads /proc/PID/cgroup. Trust: names of cgroups are the choice of whoever may make them, which is a user in
// a delegated subtree; they hold no line ends. Source: cgroups(7).
func parseCgroup(data []byte) (place, error) {
	var p place
	for line := range bytes.Lines(data) {
		fields := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "/") {
			return place{}, fmt.Errorf("cgroup: %w", errForm)
		}
		switch {
		case fields[0] == "0" && fields[1] == "":
			if p.unified != "" {
				return place{}, fmt.Errorf("cgroup: %w", errForm)
			}
			p.unified = fields[2]
		case fields[1] == "name=systemd":
			p.systemd = fields[2]
		}
	}
	switch {
	case p.unified == "":
		return place{}, errNoUnified
	case p.unified == "/.." || strings.HasPrefix(p.unified, "/../"):
		return place{}, errOutside
	case strings.HasSuffix(p.unified, deletedMark):
		return place{}, errRemoved
	}
	return p, nil
}

// unitOf returns the systemd unit to which a cgroup path belongs, and the path of the unit's own cgroup: the first
// element that is no slice, if it is a unit. What lies below is the choice of the unit's owner (a user's manager runs
// units of its own) and is not looked at. Source: systemd, cg_path_get_unit.
func unitOf(path string) (unit, at string) {
	for element, end := range elements(path) {
		name := strings.TrimPrefix(element, "_") // cg_escape
		if !isUnit(name) {
			return "", ""
		}
		if strings.HasSuffix(name, ".slice") {
			continue
		}
		return name, path[:end]
	}
	return "", ""
}

// maxUnitName is UNIT_NAME_MAX of systemd.
const maxUnitName = 255

func isUnit(name string) bool {
	if len(name) > maxUnitName {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && strings.IndexByte(`:-_.\@`, c) < 0 {
			return false
		}
	}
	for _, suffix := range []string{".service", ".scope", ".slice", ".socket", ".mount", ".swap"} {
		if len(name) > len(suffix) && strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return false
}

// The container engines known by the names of their cgroups. Details are had of the first two.
const (
	podman     = "podman"
	runc       = "runc"
	docker     = "docker"
	containerd = "containerd"
	crio       = "crio"
)

// container is a container that the name of a cgroup speaks of.
type container struct {
	engine, id string
	at         string // path of the cgroup that bears the name
}

// scopes are the names that engines give with a prefix, with or without ".scope" behind.
var scopes = []struct{ prefix, engine string }{
	{"libpod-", podman}, {"docker-", docker}, {"cri-containerd-", containerd}, {"crio-", crio},
}

// parents are the cgroups in which an engine makes one that is named by the bare id.
var parents = map[string]string{"docker": docker, "k8s.io": containerd, "moby": docker, "default": containerd}

// containerOf returns the outermost container that a cgroup path speaks of: that one was made by an engine of this
// machine, those within by the container. Trust: a name is a claim of whoever may make cgroups there, so that the
// directories above must be root's before it is believed.
func containerOf(path string) (container, bool) {
	above := ""
	for element, end := range elements(path) {
		for _, s := range scopes {
			if id, ok := strings.CutPrefix(strings.TrimSuffix(element, ".scope"), s.prefix); ok && isContainerID(id) {
				return container{engine: s.engine, id: id, at: path[:end]}, true
			}
		}
		if engine := parents[above]; engine != "" && isContainerID(element) {
			return container{engine: engine, id: element, at: path[:end]}, true
		}
		above = element
	}
	return container{}, false
}

// isContainerID reports whether s has the form of an id that engines give: 64 lower-case hexadecimal digits.
func isContainerID(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if (s[i] < '0' || s[i] > '9') && (s[i] < 'a' || s[i] > 'f') {
			return false
		}
	}
	return true
}

// elements yields the elements of a path from the root down, each with the index at which it ends.
func elements(path string) func(yield func(string, int) bool) {
	return func(yield func(string, int) bool) {
		for i := 0; i < len(path); {
			if path[i] == '/' {
				i++
				continue
			}
			end := len(path)
			if n := strings.IndexByte(path[i:], '/'); n >= 0 {
				end = i + n
			}
			if !yield(path[i:end], end) {
				return
			}
			i = end
		}
	}
}

// within reports whether path is the cgroup or below it. The root holds nothing in this sense.
func within(path, cgroup string) bool {
	return len(cgroup) > 1 && (path == cgroup || strings.HasPrefix(path, cgroup+"/"))
}
