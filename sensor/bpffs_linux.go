package sensor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"
	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxPins bounds what Pins and Unpin look at: an agent pins some dozens of objects.
const maxPins = 10_000

// ErrTooManyPins is the code of the refusal of a directory with more objects than an agent ever pins.
var ErrTooManyPins = &refusal.Error{Code: "too-many-pins"}

// Mount makes sure that dir is on a bpffs: it makes the directory, and mounts a bpffs at it if there is none yet. One
// that is there already is left as it is, as is anything below it.
//
// Errors: matches [ErrUnsupported] if the kernel has no bpffs, or the caller may not mount; [ErrNotBPFFS] if dir is no
// directory, or is not empty, since mounting would hide what is there. Durability: until the next boot.
func Mount(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return notBPFFS("mount bpffs at", dir, "it cannot be made a directory", err)
	}
	on, err := onBPFFS(dir)
	if err != nil {
		return notBPFFS("mount bpffs at", dir, "it cannot be looked at", err)
	}
	if on {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return notBPFFS("mount bpffs at", dir, "it cannot be read", err)
	}
	if len(entries) > 0 {
		return notBPFFS("mount bpffs at", dir, "it is on another file system, and not empty", nil)
	}
	if err := unix.Mount("redoubt", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return &refusal.Error{
			Kind: refusal.Unsupported, Code: ErrUnsupported.Code, What: "mount bpffs at " + dir,
			Why: fmt.Sprintf("the kernel answers: %v", err),
			Do:  "run as root with CAP_SYS_ADMIN, on Linux 4.4 or newer with CONFIG_BPF_SYSCALL", Err: err,
		}
	}
	return nil
}

// Unmount ends the bpffs that is mounted at dir itself; pins on it are gone with it. A directory that is merely below a
// bpffs is refused. Errors: matches [ErrNotBPFFS]; else the kernel's.
func Unmount(dir string) error {
	on, err := onBPFFS(dir)
	if err != nil || !on {
		return notBPFFS("unmount bpffs at", dir, "it is not on a bpffs", err)
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount bpffs at %s: %w", dir, err)
	}
	return nil
}

// onBPFFS reports whether a path is on a bpffs.
func onBPFFS(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, err
	}
	return uint32(st.Type) == unix.BPF_FS_MAGIC, nil
}

// Pins lists what is pinned below dir, in order of path. An object that cannot be opened is listed with kind "unknown".
//
// Errors: matches [ErrNotBPFFS] or [ErrTooManyPins].
func Pins(dir string) ([]Pin, error) {
	var out []Pin
	err := walkPins("list pins below", dir, func(path string, d fs.DirEntry) {
		if !d.IsDir() {
			out = append(out, describe(path))
		}
	})
	return out, err
}

// walkPins calls visit for everything below dir, parents first, without following links out of it.
func walkPins(what, dir string, visit func(path string, d fs.DirEntry)) error {
	st, err := os.Lstat(dir)
	if err != nil || !st.IsDir() {
		return notBPFFS(what, dir, "it is no directory", err)
	}
	on, err := onBPFFS(dir)
	if err != nil || !on {
		return notBPFFS(what, dir, "it is not on a bpffs", err)
	}
	seen := 0
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", what, dir, err)
		}
		if path == dir || strings.Contains(d.Name(), ".") {
			return nil // the kernel keeps names with dots for itself: maps.debug and progs.debug, which nobody can remove
		}
		if d.IsDir() { // another file system may be mounted below
			if on, err := onBPFFS(path); err != nil || !on {
				return fs.SkipDir
			}
		}
		if seen++; seen > maxPins {
			return &refusal.Error{
				Kind: refusal.Exhausted, Code: ErrTooManyPins.Code, What: what + " " + dir,
				Why: fmt.Sprintf("there are more than %d objects", maxPins), Do: "name the directory that Redoubt pins to",
			}
		}
		visit(path, d)
		return nil
	})
}

// describe opens a pinned object to see what it is.
func describe(path string) Pin {
	p := Pin{Path: path, Kind: "unknown"}
	object, err := pin.Load(path, nil)
	if err != nil {
		return p
	}
	defer func() { _ = object.Close() }()
	switch o := object.(type) {
	case *ebpf.Map:
		p.Kind, p.Type = "map", o.Type().String()
		if info, err := o.Info(); err == nil {
			p.Name = info.Name
		}
	case *ebpf.Program:
		p.Kind, p.Type = "program", o.Type().String()
		if info, err := o.Info(); err == nil {
			p.Name = info.Name
		}
	case link.Link:
		p.Kind = "link"
		if info, err := o.Info(); err == nil {
			p.Type = linkType(info.Type)
		}
	}
	return p
}

// linkType names the links that Redoubt makes; others go by number.
func linkType(t link.Type) string {
	switch t {
	case link.RawTracepointType:
		return "RawTracepoint"
	case link.TracingType:
		return "Tracing"
	case link.CgroupType:
		return "Cgroup"
	case link.IterType:
		return "Iter"
	case link.NetNsType:
		return "NetNs"
	case link.XDPType:
		return "XDP"
	case link.PerfEventType:
		return "PerfEvent"
	case link.TCXType:
		return "TCX"
	case link.NetfilterType:
		return "Netfilter"
	default:
		return fmt.Sprintf("link type %d", t)
	}
}

// Unpin lifts and removes everything that is pinned below dir, and the directories below it; dir itself stays. A link is
// detached first, so that it enforces no more even if a process still holds it; where a kind of link cannot be detached
// (tracing and LSM ones), Unpin waits until its last holder has let go.
//
// It goes on after a failure, so that a break-glass lifts as much as can be lifted; removed has the paths of the objects
// (not directories) that are gone, in order, and err joins what failed. A link that a process keeps alive is such a
// failure: end that process. Errors: matches [ErrNotBPFFS] or [ErrTooManyPins], and then nothing was removed; or
// [ErrHeld]. Durability: what was lifted has no effect any more when it returns.
func Unpin(dir string) (removed []string, err error) {
	type entry struct {
		path string
		dir  bool
	}
	var found []entry
	if err := walkPins("unpin below", dir, func(path string, d fs.DirEntry) {
		found = append(found, entry{path, d.IsDir()})
	}); err != nil {
		return nil, err
	}
	var failed []error
	waiting := map[link.ID]string{}
	for _, e := range slices.Backward(found) { // children before their directories
		remove := unix.Rmdir
		if !e.dir {
			remove = unix.Unlink
			if id := detach(e.path); id != 0 {
				waiting[id] = e.path
			}
		}
		switch err := remove(e.path); {
		case err != nil && !errors.Is(err, unix.ENOENT):
			failed = append(failed, fmt.Errorf("unpin %s: %w", e.path, err))
		case !e.dir:
			removed = append(removed, e.path)
		}
	}
	slices.Sort(removed)
	return removed, errors.Join(append(failed, awaitGone(waiting)...)...)
}

// detach ends what a pinned link does. If this kind of link cannot be detached, it returns the link's id, else 0.
func detach(path string) link.ID {
	object, err := pin.Load(path, nil)
	if err != nil {
		return 0 // what cannot be opened cannot be detached; removing its pin is what is left
	}
	defer func() { _ = object.Close() }()
	l, ok := object.(link.Link)
	if !ok || l.Detach() == nil {
		return 0
	}
	info, err := l.Info()
	if err != nil {
		return 0
	}
	return info.ID
}

// heldPatience is how long the kernel may take to let go of a link whose last holder is gone: it does so after a grace
// period.
const heldPatience = time.Second

// ErrHeld is the code of the failure to lift a link that a process holds.
var ErrHeld = &refusal.Error{Code: "link-held"}

// awaitGone waits until these links are gone, and returns a failure for each that is not.
func awaitGone(links map[link.ID]string) (failed []error) {
	for end := time.Now().Add(heldPatience); ; time.Sleep(time.Millisecond) {
		for id := range links {
			l, err := link.NewFromID(id)
			if err != nil {
				delete(links, id)
				continue
			}
			_ = l.Close() // nothing was changed through it
		}
		if len(links) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, path := range links {
		failed = append(failed, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrHeld.Code, What: "lift " + path,
			Why: "its pin is removed, but a process still holds the link, and this kind cannot be detached", Do: "end the agent, or whatever process loaded it",
		})
	}
	return failed
}
