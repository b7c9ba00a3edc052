//go:build linux

package workload_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt/identity/workload"
)

func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := workload.Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v, %v; want that everybody may connect", info.Mode(), err)
	}
	if _, err := workload.Listen(t.Context(), path); !errors.Is(err, workload.ErrSocket) || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a socket that is served: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	_ = ln.Close()
	ln, err = workload.Listen(t.Context(), path)
	if err != nil {
		t.Fatalf("a socket that was left behind: %v", err)
	}
	_ = ln.Close()

	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := workload.Listen(t.Context(), path); !errors.Is(err, workload.ErrSocket) {
		t.Errorf("a file: %v", err)
	}
	if text, _ := os.ReadFile(path); string(text) != "mine" {
		t.Error("somebody's file was replaced")
	}
	if _, err := workload.Listen(t.Context(), filepath.Join(dir, strings.Repeat("x", 108))); !errors.Is(err, workload.ErrSocket) {
		t.Errorf("a long path: %v", err)
	}
}
