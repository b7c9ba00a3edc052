package spool

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"

	"github.com/redoubtsec/redoubt/event"
)

// A frame is one event on disk:
//
//	magic 4 bytes | length of payload 4 | sequence number 8 | CRC-32C of length, number and payload 4 | payload: JSON
//
// Numbers are big-endian. No JSON in UTF-8 holds the magic, as 0xF7 begins no character, so that after a damaged place
// the next magic is the next frame.
const (
	frameHeader = 20
	maxPayload  = event.MaxBytes
	maxFrame    = frameHeader + maxPayload
)

var (
	frameMagic = [4]byte{0xF7, 'R', 'D', 'S'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// frame is a frame within a buffer.
type frame struct {
	seq     uint64
	payload []byte // shares the buffer
}

// appendFrame appends a frame to b. The payload has at most maxPayload bytes.
func appendFrame(b []byte, seq uint64, payload []byte) []byte {
	start := len(b)
	b = append(b, frameMagic[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint64(b, seq)
	b = binary.BigEndian.AppendUint32(b, checksum(b[start+4:start+16], payload))
	return append(b, payload...)
}

func checksum(head, payload []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, head), castagnoli, payload)
}

// verdict says what was found at a place.
type verdict int

const (
	whole   verdict = iota // a frame
	short                  // perhaps the beginning of one: more bytes are needed to tell
	damaged                // no frame begins here
)

// parseFrame looks at the beginning of b. Trust: b comes from a disk and may be anything.
func parseFrame(b []byte) (frame, int, verdict) {
	if n := min(len(b), len(frameMagic)); !bytes.Equal(b[:n], frameMagic[:n]) {
		return frame{}, 0, damaged
	}
	if len(b) < frameHeader {
		return frame{}, 0, short
	}
	length := binary.BigEndian.Uint32(b[4:8])
	if length > maxPayload {
		return frame{}, 0, damaged
	}
	size := frameHeader + int(length)
	if len(b) < size {
		return frame{}, 0, short
	}
	f := frame{seq: binary.BigEndian.Uint64(b[8:16]), payload: b[frameHeader:size]}
	if f.seq == 0 || checksum(b[4:16], f.payload) != binary.BigEndian.Uint32(b[16:20]) {
		return frame{}, 0, damaged
	}
	return f, size, whole
}

// resync returns how many bytes of b to skip to come to the next place where a frame may begin, at least one; len(b) if
// there is none.
func resync(b []byte) int {
	if len(b) < 2 {
		return len(b)
	}
	if i := bytes.IndexByte(b[1:], frameMagic[0]); i >= 0 {
		return i + 1
	}
	return len(b)
}
