//go:build !linux

package local

import (
	"errors"
	"net"
)

func peerUID(net.Conn) (int, error) { return 0, errors.New("the agent runs on Linux only") }
