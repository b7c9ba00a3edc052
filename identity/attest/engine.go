package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// The bounds of what an engine may say.
const (
	maxRecordBytes = 4 << 20
	maxLabels      = 128
)

// record is what an engine's own records say of one of its containers.
type record struct {
	id     string
	cgroup string // in the unified hierarchy, or empty if the record does not say
	pid    int    // of its first process, 0 if it does not run
	start  uint64 // start time of that process, 0 if the record does not say
	image  string // reference, as it was named when the container was made
	digest string // "sha256:…" of the image's manifest
	// imageID is the engine's own name of the image, for a second question about the digest.
	imageID string
	labels  map[string]string
}

// labelKeys returns the first maxLabels keys, in order.
func (r record) labelKeys() []string {
	keys := slices.Sorted(maps.Keys(r.labels))
	return keys[:min(len(keys), maxLabels)]
}

var (
	errRecord  = errors.New("the engine's record is not of a known form")
	errUnknown = errors.New("the engine knows no such container")
)

// parsePodman reads the answer to `podman inspect --type container`. Trust: labels were chosen by whoever made the
// image; they are strings and nothing more. Source: podman-inspect(1), podman-container-inspect(1).
func parsePodman(data []byte) (record, error) {
	var list []struct {
		ID    string `json:"Id"`
		State struct {
			Pid        int
			CgroupPath string
		}
		Image, ImageName, ImageDigest string
		Config                        struct{ Labels map[string]string }
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return record{}, fmt.Errorf("%w: %w", errRecord, err)
	}
	if len(list) == 0 {
		return record{}, errUnknown
	}
	c := list[0]
	if len(list) > 1 || !isContainerID(c.ID) || c.State.Pid < 0 || c.ImageDigest != "" && !isDigest(c.ImageDigest) {
		return record{}, errRecord
	}
	r := record{
		id: c.ID, pid: c.State.Pid, image: c.ImageName, digest: c.ImageDigest, labels: c.Config.Labels,
	}
	if c.State.CgroupPath != "" {
		r.cgroup = path.Clean("/" + c.State.CgroupPath)
	}
	if isContainerID(c.Image) {
		r.imageID = c.Image
	}
	return r, nil
}

// parsePodmanImage reads the digest out of the answer to `podman image inspect`. Source: podman-image-inspect(1).
func parsePodmanImage(data []byte) (string, error) {
	var list []struct{ Digest string }
	if err := json.Unmarshal(data, &list); err != nil {
		return "", fmt.Errorf("%w: %w", errRecord, err)
	}
	if len(list) != 1 || !isDigest(list[0].Digest) {
		return "", errRecord
	}
	return list[0].Digest, nil
}

// parseRunc reads runc's state.json of a container; root is where the unified hierarchy is mounted. Source: opencontainers
// runc, libcontainer.State; the file is runc's own and its form is not promised, so that what is missing is an error.
func parseRunc(data []byte, root string) (record, error) {
	var s struct {
		ID      string            `json:"id"`
		Pid     int               `json:"init_process_pid"`
		Start   uint64            `json:"init_process_start"`
		Cgroups map[string]string `json:"cgroup_paths"`
		Config  struct {
			Labels []string `json:"labels"`
		} `json:"config"`
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return record{}, fmt.Errorf("%w: %w", errRecord, err)
	}
	if s.ID == "" || len(s.ID) > 255 || strings.ContainsRune(s.ID, '/') || s.Pid <= 0 {
		return record{}, errRecord
	}
	r := record{id: s.ID, pid: s.Pid, start: s.Start, labels: map[string]string{}}
	if inside, ok := strings.CutPrefix(path.Clean(s.Cgroups[""]), strings.TrimSuffix(root, "/")+"/"); ok {
		r.cgroup = "/" + inside
	}
	for _, l := range s.Config.Labels {
		if key, value, ok := strings.Cut(l, "="); ok && key != "" {
			r.labels[key] = value
		}
	}
	return r, nil
}

func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && isContainerID(hex) // the same 64 digits
}
