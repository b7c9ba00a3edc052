package sensor_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sensor"
)

// bpffs mounts one for a test.
func bpffs(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "bpf")
	if err := sensor.Mount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sensor.Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func pinMap(t *testing.T, path string) {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "redoubt_test", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Pin(path), m.Close()); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestUnpinLiftsWhatIsPinned pins a map, a program and a link that refuses connections, as an agent does that was
// then killed, and lifts them.
func TestUnpinLiftsWhatIsPinned(t *testing.T) {
	dir := bpffs(t)
	agent := mkdir(t, filepath.Join(dir, "agent"))
	mkdir(t, filepath.Join(agent, "empty"))
	pinMap(t, filepath.Join(agent, "verdicts"))
	pinMap(t, filepath.Join(dir, "others")) // beside the directory: not ours
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "redoubt_test", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	cgroup := mkdir(t, filepath.Join(needRoot(t), fmt.Sprintf("redoubt-test-unpin-%d", os.Getpid())))
	defer unix.Rmdir(cgroup)
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		program.Pin(filepath.Join(agent, "connect4")), program.Close(),
		l.Pin(filepath.Join(mkdir(t, filepath.Join(agent, "links")), "connect4")), l.Close(),
	); err != nil {
		t.Fatal(err)
	}
	attached := func() int {
		t.Helper()
		f, err := os.Open(cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
		if err != nil {
			t.Fatal(err)
		}
		return len(r.Programs)
	}
	if attached() != 1 {
		t.Fatal("the pinned link holds nothing: there is nothing to lift")
	}

	got, err := sensor.Pins(agent)
	if err != nil {
		t.Fatal(err)
	}
	want := []sensor.Pin{
		{Path: filepath.Join(agent, "connect4"), Kind: "program", Type: "CGroupSockAddr", Name: "redoubt_test"},
		{Path: filepath.Join(agent, "links/connect4"), Kind: "link", Type: "Cgroup"},
		{Path: filepath.Join(agent, "verdicts"), Kind: "map", Type: "Array", Name: "redoubt_test"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("pins (-want +got):\n%s", d)
	}

	removed, err := sensor.Unpin(agent)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{want[0].Path, want[1].Path, want[2].Path}, removed); d != "" {
		t.Errorf("removed (-want +got):\n%s", d)
	}
	if n := attached(); n != 0 {
		t.Errorf("%d programs are still attached", n)
	}
	if entries, err := os.ReadDir(agent); err != nil || len(entries) != 0 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
	if pins, err := sensor.Pins(dir); err != nil || len(pins) != 1 || pins[0].Path != filepath.Join(dir, "others") {
		t.Errorf("beside it: %v, %v", pins, err)
	}
	if removed, err := sensor.Unpin(agent); err != nil || len(removed) != 0 {
		t.Errorf("again: %v, %v", removed, err)
	}
}

// TestUnpinLiftsUnderALivingAgent: who loaded it still holds it.
func TestUnpinLiftsUnderALivingAgent(t *testing.T) {
	dir := bpffs(t)
	cgroup := mkdir(t, filepath.Join(needRoot(t), fmt.Sprintf("redoubt-test-held-%d", os.Getpid())))
	defer unix.Rmdir(cgroup)
	body := asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}
	load := func(spec ebpf.ProgramSpec) *ebpf.Program {
		t.Helper()
		spec.Name, spec.License, spec.Instructions = "redoubt_test", "Dual BSD/GPL", body
		p, err := ebpf.NewProgram(&spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	hook, err := link.AttachCgroup(link.CgroupOptions{
		Path: cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: load(ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect}),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer hook.Close()
	if err := hook.Pin(filepath.Join(dir, "connect4")); err != nil {
		t.Fatal(err)
	}
	if removed, err := sensor.Unpin(dir); err != nil || len(removed) != 1 {
		t.Errorf("%v, %v", removed, err)
	}
	f, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: ebpf.AttachCGroupInet4Connect}); err != nil || len(r.Programs) != 0 {
		t.Errorf("it still refuses: %v, %v", r, err)
	}

	trace := func() link.Link {
		t.Helper()
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exit", Program: load(ebpf.ProgramSpec{Type: ebpf.RawTracepoint})})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		if err := l.Pin(filepath.Join(dir, "exit")); err != nil {
			t.Fatal(err)
		}
		return l
	}
	trace()
	removed, err := sensor.Unpin(dir)
	if !errors.Is(err, sensor.ErrHeld) || len(removed) != 1 { // it cannot be detached, and that is said
		t.Errorf("%v, %v", removed, err)
	}
	if err := trace().Close(); err != nil {
		t.Fatal(err)
	}
	if removed, err := sensor.Unpin(dir); err != nil || len(removed) != 1 {
		t.Errorf("after its holder is gone: %v, %v", removed, err)
	}
}

func TestOnlyABPFFSIsTouched(t *testing.T) {
	needRoot(t)
	plain := t.TempDir()
	file := filepath.Join(plain, "precious")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := bpffs(t)
	pinMap(t, filepath.Join(dir, "map"))
	toBPF := filepath.Join(plain, "to-bpffs")
	if err := os.Symlink(dir, toBPF); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"a plain directory": plain, "a file": file, "nothing": filepath.Join(plain, "none"), "a link to a bpffs": toBPF, "a pinned map": filepath.Join(dir, "map"),
	} {
		removed, err := sensor.Unpin(path)
		if !errors.Is(err, sensor.ErrNotBPFFS) || removed != nil {
			t.Errorf("Unpin of %s: %v, %v", name, removed, err)
		}
		if _, err := sensor.Pins(path); !errors.Is(err, sensor.ErrNotBPFFS) {
			t.Errorf("Pins of %s: %v", name, err)
		}
		if e := refusal.As(err); e == nil || e.Why == "" || e.Do == "" {
			t.Errorf("Unpin of %s is refused without saying why: %v", name, err)
		}
	}
	if err := sensor.Unmount(plain); !errors.Is(err, sensor.ErrNotBPFFS) {
		t.Errorf("Unmount of a plain directory: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if pins, err := sensor.Pins(dir); err != nil || len(pins) != 1 {
		t.Errorf("%v, %v", pins, err)
	}
}

// TestAnotherFileSystemBelowIsLeftAlone mounts a tmpfs below the directory to unpin.
func TestAnotherFileSystemBelowIsLeftAlone(t *testing.T) {
	dir := bpffs(t)
	below := mkdir(t, filepath.Join(dir, "below"))
	if err := unix.Mount("redoubt-test", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(below, 0)
	if err := os.WriteFile(filepath.Join(below, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pinMap(t, filepath.Join(dir, "map"))
	removed, err := sensor.Unpin(dir)
	if err != nil || len(removed) != 1 {
		t.Errorf("%v, %v", removed, err)
	}
	if _, err := os.Stat(filepath.Join(below, "precious")); err != nil {
		t.Error(err)
	}
}

func TestMountIsDoneOnceAndHidesNothing(t *testing.T) {
	dir := bpffs(t)
	pinMap(t, filepath.Join(dir, "map"))
	for _, path := range []string{dir, filepath.Join(dir, "agent")} { // again, and below
		if err := sensor.Mount(path); err != nil {
			t.Error(err)
		}
	}
	if pins, err := sensor.Pins(dir); err != nil || len(pins) != 1 {
		t.Errorf("a second mount hides the first: %v, %v", pins, err)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"a directory with files": full, "a file": filepath.Join(full, "precious")} {
		if err := sensor.Mount(path); !errors.Is(err, sensor.ErrNotBPFFS) {
			t.Errorf("Mount at %s: %v", name, err)
		}
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the mount is open to others: %v, %v", st.Mode(), err)
	}
}

// TestTooManyPinsAreRefused reaches the bound, and sees that nothing was removed.
func TestTooManyPinsAreRefused(t *testing.T) {
	dir := bpffs(t)
	for i := range 10_001 {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if removed, err := sensor.Unpin(dir); !errors.Is(err, sensor.ErrTooManyPins) || removed != nil {
		t.Errorf("%v, %v", removed, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) < 10_001 {
		t.Errorf("%d are left: %v", len(entries), err)
	}
}
