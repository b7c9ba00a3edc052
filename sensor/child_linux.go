package sensor

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
)

// The probe's child is a program of two system calls, made here byte by byte, so that the ledger needs no file of the
// machine and no second copy of Redoubt: it makes a TCP socket, connects it to 127.0.0.1:1, and exits with the error
// number that this came to.

// errNoChild says that there is no such program for this machine.
var errNoChild = errors.New("there is no probe program for " + runtime.GOARCH)

// childProgram returns the child as an ELF file.
func childProgram() ([]byte, error) {
	switch runtime.GOARCH {
	case "amd64":
		return elfFile(elf.EM_X86_64, childAMD64())
	case "arm64":
		return elfFile(elf.EM_AARCH64, childARM64())
	default:
		return nil, errNoChild
	}
}

// childAddress is struct sockaddr_in: AF_INET in the machine's order, port 1 and 127.0.0.1 in the network's, padding.
var childAddress = []byte{2, 0, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}

func childAMD64() []byte {
	code := []byte{
		0xb8, 41, 0, 0, 0, // mov eax, socket
		0xbf, 2, 0, 0, 0, // mov edi, AF_INET
		0xbe, 1, 0, 0, 0, // mov esi, SOCK_STREAM
		0x31, 0xd2, // xor edx, edx
		0x0f, 0x05, // syscall
		0x89, 0xc7, // mov edi, eax
		0x48, 0x8d, 0x35, 23, 0, 0, 0, // lea rsi, [rip+23]: the address, behind the code
		0xba, 16, 0, 0, 0, // mov edx, 16
		0xb8, 42, 0, 0, 0, // mov eax, connect
		0x0f, 0x05, // syscall
		0xf7, 0xd8, // neg eax
		0x89, 0xc7, // mov edi, eax
		0xb8, 231, 0, 0, 0, // mov eax, exit_group
		0x0f, 0x05, // syscall
	}
	return append(code, childAddress...)
}

func childARM64() []byte {
	movz := func(reg, n uint32) uint32 { return 0xd2800000 | n<<5 | reg }
	const svc, negW0, adrX1 = 0xd4000001, 0x4b0003e0, 0x10000001
	code := []uint32{
		movz(8, 198), movz(0, 2), movz(1, 1), movz(2, 0), svc, // socket(AF_INET, SOCK_STREAM, 0)
		adrX1 | 7<<5, movz(2, 16), movz(8, 203), svc, // connect(x0, the address 7 words on, 16)
		negW0, movz(8, 94), svc, // exit_group(-w0)
	}
	var out []byte
	for _, word := range code {
		out = binary.LittleEndian.AppendUint32(out, word)
	}
	return append(out, childAddress...)
}

// elfFile wraps code in the smallest file that Linux executes: two headers, and one segment that is the whole file.
func elfFile(machine elf.Machine, code []byte) ([]byte, error) {
	const base, header, segment = 0x400000, 64, 56
	size := uint64(header + segment + len(code))
	var out bytes.Buffer
	err := errors.Join(
		binary.Write(&out, binary.LittleEndian, elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
			Entry: base + header + segment, Phoff: header, Ehsize: header, Phentsize: segment, Phnum: 1,
		}),
		binary.Write(&out, binary.LittleEndian, elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x10000,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("make the probe's program: %w", err)
	}
	return append(out.Bytes(), code...), nil
}
