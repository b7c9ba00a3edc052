package backup_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/redoubtsec/redoubt/store/backup"
)

func TestAFullDiskIsSaid(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs takes root")
	}
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=65536"); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(disk, 0) })
	s, archive := made(t)
	dir := filepath.Join(disk, "x")
	if _, err := backup.Restore(t.Context(), bytes.NewReader(archive), dir, passphrase, nil); !errors.Is(err, backup.ErrDiskFull) {
		t.Errorf("restore: got %v, want code %s", err, backup.ErrDiskFull.Code)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a failed restore left its directory")
	}
	out, err := os.Create(filepath.Join(disk, "archive"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := backup.Backup(t.Context(), s.source(t), out, passphrase); !errors.Is(err, backup.ErrDiskFull) {
		t.Errorf("back-up: got %v, want code %s", err, backup.ErrDiskFull.Code)
	}
}
