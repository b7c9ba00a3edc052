package story_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// playing is the first argument by which this test program plays a workload; the next names what it does.
const playing = "play-a-part"

func play(part string, args []string) int {
	switch part {
	case "crowd":
		return playCrowd(args[0], args[1])
	default:
		fmt.Println("no such part: " + part)
		return 2
	}
}

// playCrowd opens many connections to the Workload API and holds them until its standard input ends.
func playCrowd(socket, many string) int {
	n, err := strconv.Atoi(many)
	if err != nil {
		return 2
	}
	var held []net.Conn
	refused := 0
	for range n {
		c, err := net.Dial("unix", socket)
		for tries := 0; errors.Is(err, syscall.EAGAIN) && tries < 1000; tries++ { // the listener's queue is full for now
			time.Sleep(time.Millisecond)
			c, err = net.Dial("unix", socket)
		}
		if err != nil {
			refused++
			continue
		}
		// The preface of HTTP/2, so that each is as good a connection as any.
		_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		held = append(held, c)
	}
	fmt.Printf("opened=%d refused=%d\n", len(held), refused)
	_, _ = os.Stdin.Read(make([]byte, 1))
	open := 0
	for _, c := range held {
		// One that was refused has been told so and closed: it can be read to its end.
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if !ends(c) {
			open++
		}
	}
	fmt.Printf("open=%d\n", open)
	return 0
}

func ends(c net.Conn) bool {
	buf := make([]byte, 4096)
	for {
		if _, err := c.Read(buf); err != nil {
			var ne net.Error
			ok := errors.As(err, &ne)
			return !ok || !ne.Timeout()
		}
	}
}
