package sandbox_test

import (
	"errors"
	"os"
	"testing"

	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sandbox"
)

func TestDynamicUser(t *testing.T) {
	first, err := sandbox.DynamicUser("orders", nil)
	if err != nil {
		t.Fatal(err)
	}
	if first < sandbox.DynamicUserFirst || first > sandbox.DynamicUserLast {
		t.Errorf("%d is out of range", first)
	}
	again, err := sandbox.DynamicUser("orders", nil)
	if err != nil || again != first {
		t.Errorf("a service gets its number back: %d, then %d, %v", first, again, err)
	}
	other, err := sandbox.DynamicUser("orders", map[uint32]bool{first: true})
	if err != nil || other == first {
		t.Errorf("got %d, which is taken; %v", other, err)
	}
}

func TestDynamicUserIsNotOneThatRuns(t *testing.T) {
	needRoot(t)
	first, err := sandbox.DynamicUser("running", nil)
	if err != nil {
		t.Fatal(err)
	}
	s := spec(t, "sleep")
	s.UID, s.GID = first, testUser
	started(t, s)
	if again, err := sandbox.DynamicUser("running", nil); err != nil || again == first {
		t.Errorf("got %d, whose processes run; %v", again, err)
	}
	group, err := sandbox.DynamicUser("group", nil)
	if err != nil {
		t.Fatal(err)
	}
	s = spec(t, "sleep")
	s.GID = group
	started(t, s)
	if again, err := sandbox.DynamicUser("group", nil); err != nil || again == group {
		t.Errorf("got %d, a group that a process has; %v", again, err)
	}
}

func TestDynamicUsersRunOut(t *testing.T) {
	taken := map[uint32]bool{}
	for id := uint32(sandbox.DynamicUserFirst); id <= sandbox.DynamicUserLast; id++ {
		taken[id] = true
	}
	_, err := sandbox.DynamicUser("x", taken)
	if !errors.Is(err, sandbox.ErrNoUser) || refusal.As(err).Kind != refusal.Exhausted {
		t.Errorf("got %v", err)
	}
}

func TestDynamicUserIsNoAccount(t *testing.T) {
	ids := sandbox.Accounts([]byte("root:x:0:0:root:/root:/bin/sh\nbroken\nsvc:x:61500:61501::/:/bin/false\ngrp:x:61502:\n"))
	for _, id := range []uint32{0, 61500, 61502} {
		if !ids[id] {
			t.Errorf("%d was not seen", id)
		}
	}
}

func TestLookupUser(t *testing.T) {
	if uid, gid, err := sandbox.LookupUser("nobody"); err != nil || uid == 0 || gid == 0 {
		t.Errorf("got %d, %d, %v", uid, gid, err)
	}
	if uid, gid, err := sandbox.LookupUser("61987"); err != nil || uid != 61987 || gid != 61987 {
		t.Errorf("got %d, %d, %v", uid, gid, err)
	}
	if uid, _, err := sandbox.LookupUser("0"); err != nil || uid != 0 {
		t.Errorf("got %d, %v", uid, err)
	}
	for _, name := range []string{"", "no-such-user", "-1", "99999999999"} {
		if _, _, err := sandbox.LookupUser(name); !errors.Is(err, sandbox.ErrNoUser) {
			t.Errorf("%q: got %v", name, err)
		}
	}
}

func FuzzStatus(f *testing.F) {
	for _, path := range []string{"/proc/self/status", "/proc/1/status", "/proc/2/status"} {
		if data, err := os.ReadFile(path); err == nil {
			f.Add(data)
		}
	}
	f.Add([]byte("Name:\tx\\nUid:\t0\t0\t0\t0\nUid:\t1\t1\t1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := sandbox.ParseStatus(data)
		if err != nil && (c.NoNewPrivs || c.Filters != 0 || c.Groups != nil) {
			t.Errorf("an error and %+v", c)
		}
	})
}

func FuzzCgroupMounts(f *testing.F) {
	if data, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(data)
	}
	f.Add([]byte(`41 31 0:38 / /a\040b\134 rw,ro shared:1 - cgroup2 x rw` + "\n"))
	f.Add([]byte("1 - - cgroup2"))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := sandbox.ParseCgroupMounts(data)
		if err != nil && n != 0 {
			t.Errorf("an error and %d mounts", n)
		}
	})
}
