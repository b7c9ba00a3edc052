package attest

// Parsers, for their tests and fuzz targets.
var (
	IsContainerID = isContainerID
	Unescape      = unescape
)

// ParseStat returns the parent and start time.
func ParseStat(data []byte) (state byte, parent int, flags, start uint64, err error) {
	s, err := parseStat(data)
	return s.state, s.parent, s.flags, s.start, err
}

// ParseStatus returns the ids.
func ParseStatus(data []byte) (uid, gid [4]uint32, err error) {
	i, err := parseStatus(data)
	return i.uid, i.gid, err
}

// ParseCgroup returns the two paths.
func ParseCgroup(data []byte) (unified, systemd string, err error) {
	p, err := parseCgroup(data)
	return p.unified, p.systemd, err
}

// ParseMountinfo returns the mount points.
func ParseMountinfo(data []byte) ([]string, error) {
	mounts, err := parseMountinfo(data)
	var points []string
	for _, m := range mounts {
		points = append(points, m.point)
	}
	return points, err
}

// UnitOf is the unit of a path.
func UnitOf(path string) (unit, at string) { return unitOf(path) }

// ContainerOf is the container of a path.
func ContainerOf(path string) (engine, id, at string) {
	c, _ := containerOf(path)
	return c.engine, c.id, c.at
}

// Record is what an engine says of a container.
type Record struct {
	ID, Cgroup, Image, Digest string
	PID                       int
	Start                     uint64
	Labels                    map[string]string
}

func exported(r record, err error) (Record, error) {
	return Record{ID: r.id, Cgroup: r.cgroup, Image: r.image, Digest: r.digest, PID: r.pid, Start: r.start, Labels: r.labels}, err
}

// ParsePodman reads podman's answer.
func ParsePodman(data []byte) (Record, error) { return exported(parsePodman(data)) }

// ParsePodmanImage reads podman's answer.
func ParsePodmanImage(data []byte) (string, error) { return parsePodmanImage(data) }

// ParseRunc reads runc's file.
func ParseRunc(data []byte, root string) (Record, error) { return exported(parseRunc(data, root)) }
