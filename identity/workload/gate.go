package workload

import (
	"bytes"
	"fmt"
	"sync"

	"golang.org/x/net/http2"

	"github.com/redoubtsec/redoubt/refusal"
)

// maxRefusing bounds the connections that are kept for a moment only to be told, by gRPC, why they are refused. Those
// beyond are told by an HTTP/2 GOAWAY with the same text, and closed at once.
const maxRefusing = 64

// ErrTooManyConnections is the code of the refusal of a connection beyond a bound.
var ErrTooManyConnections = &refusal.Error{Code: "too-many-connections"}

// gate counts the open connections.
type gate struct {
	max, maxUser, maxProcess, maxRefusing int

	mu       sync.Mutex
	total    int
	process  map[int]int    // by pid at connect; at most total entries
	user     map[uint32]int // by user id at connect; at most total entries
	refusing int
}

func newGate(c Config) *gate {
	return &gate{
		max: c.MaxConns, maxUser: c.MaxConnsPerUser, maxProcess: c.MaxConnsPerProcess,
		maxRefusing: min(maxRefusing, c.MaxConns), // a refused connection takes descriptors too
		process:     map[int]int{}, user: map[uint32]int{},
	}
}

// enter takes a place for a connection of a process, or says why there is none. bound names the limit that was reached.
func (g *gate) enter(pid int, uid uint32) (bound string, refused *refusal.Error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var why, do string
	switch {
	case g.process[pid] >= g.maxProcess:
		bound = "process-connections"
		why = fmt.Sprintf("this process has %d connections open, which is the limit of one process", g.maxProcess)
		do = "share one connection between all users of the process, and close those not needed"
	case g.user[uid] >= g.maxUser:
		bound = "user-connections"
		why = fmt.Sprintf("user %d has %d connections open, which is the limit of one user", uid, g.maxUser)
		do = "close connections of other processes of this user, or run the workload as a user of its own"
	case g.total >= g.max:
		bound = "connections"
		why = fmt.Sprintf("%d connections are open, which is the limit of this machine", g.max)
		do = "try again later, or raise the agent's limit"
	default:
		g.total++
		g.process[pid]++
		g.user[uid]++
		return "", nil
	}
	return bound, &refusal.Error{
		Kind: refusal.Exhausted, Code: ErrTooManyConnections.Code, What: "connection to the Workload API", Why: why, Do: do,
	}
}

// leave gives the place back.
func (g *gate) leave(pid int, uid uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.process[pid]--; g.process[pid] == 0 {
		delete(g.process, pid)
	}
	if g.user[uid]--; g.user[uid] == 0 {
		delete(g.user, uid)
	}
}

// refuse takes one of the few places of connections that are answered although refused.
func (g *gate) refuse() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refusing >= g.maxRefusing {
		return false
	}
	g.refusing++
	return true
}

func (g *gate) refused() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refusing--
}

// goAway renders a refusal for a client that will not be read from. Source: RFC 9113, sections 3.4 and 6.8.
func goAway(why *refusal.Error) []byte {
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	_ = f.WriteSettings() // writing to a buffer does not fail
	_ = f.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte(why.Error()))
	return b.Bytes()
}
