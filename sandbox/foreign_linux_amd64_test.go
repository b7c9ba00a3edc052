package sandbox_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/sandbox"
)

// As int 0x80 does on a kernel without 32-bit calls: the attack goes on with the next call.
func TestACallThatFaultsIsSurvived(t *testing.T) {
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(page) }()
	if _, fault := sandbox.Faulting(func() int32 { return int32(page[0]) }); !fault {
		t.Error("no fault was seen")
	}
	if r, fault := sandbox.Faulting(func() int32 { return 7 }); fault || r != 7 {
		t.Errorf("got %d, %v", r, fault)
	}
}
