package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/redoubtsec/redoubt/refusal"
)

// slotBytes is the room of one of the two copies of the state. They are written in turn and in place, so that there is a
// whole one whenever the machine stops, and so that a full disk does not matter.
const slotBytes = 1024

// state is what a spool remembers beside its segments.
type state struct {
	Generation uint64           `json:"generation"` // the higher one counts
	Acked      uint64           `json:"acked"`
	Examined   uint64           `json:"examined"` // up to here gaps have been counted
	Clean      bool             `json:"clean"`    // closed; nothing was in memory
	Losses     map[Reason]*loss `json:"losses,omitempty"`
}

// loss is what was lost for one reason since the reader was last told.
type loss struct {
	Count  uint64    `json:"count"`
	AtMost uint64    `json:"at_most,omitempty"` // where the number is not known
	Since  time.Time `json:"since"`
}

// openState opens the state file of dir and locks it: one process at a time. fresh says that there was none.
func openState(dir string) (f *os.File, st state, fresh bool, err error) {
	f, err = os.OpenFile(filepath.Join(dir, "state"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, state{}, false, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, state{}, false, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrInUse.Code, What: "event spool " + dir, Why: "another process has it open",
			Do: "stop the other agent, or give this one a data directory of its own", Err: err,
		}
	} else if err != nil {
		return nil, state{}, false, err
	}
	buf := make([]byte, 2*slotBytes)
	n, _ := f.ReadAt(buf, 0) // a short file has fewer slots
	if n == 0 {
		fresh = true
		if _, err := f.WriteAt(bytes.Repeat([]byte{' '}, 2*slotBytes), 0); err != nil {
			return nil, state{}, false, err // room for both slots is taken now
		}
	}
	a, okA := parseSlot(buf[:slotBytes])
	b, okB := parseSlot(buf[slotBytes:])
	if okB && (!okA || b.Generation > a.Generation) {
		a = b
	}
	if a.Losses == nil {
		a.Losses = map[Reason]*loss{}
	}
	return f, a, fresh, nil
}

// writeState replaces the older slot.
func writeState(f *os.File, st state) error {
	slot, err := renderSlot(st)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(slot, int64(st.Generation%2)*slotBytes)
	return err
}

// renderSlot renders eight hex digits of CRC-32C, a blank, JSON, and blanks to the end of the slot.
func renderSlot(st state) ([]byte, error) {
	text, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	slot := fmt.Appendf(nil, "%08x %s", crc32.Checksum(text, castagnoli), text)
	if len(slot) >= slotBytes {
		return nil, errors.New("spool state exceeds its slot")
	}
	slot = append(slot, bytes.Repeat([]byte{' '}, slotBytes-len(slot))...)
	slot[slotBytes-1] = '\n'
	return slot, nil
}

// parseSlot reads a slot. Trust: it comes from a disk and may be anything.
func parseSlot(slot []byte) (state, bool) {
	sum, text, ok := bytes.Cut(bytes.TrimSpace(slot), []byte(" "))
	if !ok || string(sum) != fmt.Sprintf("%08x", crc32.Checksum(text, castagnoli)) {
		return state{}, false
	}
	var st state
	if err := json.Unmarshal(text, &st); err != nil {
		return state{}, false
	}
	for reason, l := range st.Losses {
		if l == nil {
			delete(st.Losses, reason)
		}
	}
	return st, true
}
