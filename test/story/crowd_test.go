package story_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Ten thousand connections of one process take nothing from the others: beyond its share each is refused and counted.
func TestTenThousandConnectionsOfOneProcess(t *testing.T) {
	t.Parallel()
	d := found(t)
	m1 := d.join(t, "m1")
	quiet := m1.shell(t, "quiet")
	quiet.fetch(t)
	argv := append([]string{program.redoubt}, m1.cli("run", "--service", "crowd", "--", program.self, playing, "crowd", m1.socket, "10000")...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.WaitDelay = 3 * time.Second
	if err := startOn(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })

	// While it opens them the other one is served.
	opened := make(chan [2]int, 1)
	go func() {
		var n, refused int
		_, _ = fmt.Fscanf(out, "opened=%d refused=%d\n", &n, &refused)
		opened <- [2]int{n, refused}
	}()
	served := 0
	var got [2]int
	for waiting := true; waiting; {
		select {
		case got = <-opened:
			waiting = false
		default:
			if f := quiet.fetch(t); f.ID != "spiffe://redoubt.local/service/quiet" {
				t.Fatalf("the quiet workload got %+v", f)
			}
			served++
		}
	}
	if got[0] < 9_000 {
		t.Fatalf("opened %d, %d failed: too few to prove anything (limit of files?)", got[0], got[1])
	}
	if served == 0 {
		t.Error("the quiet workload was never served meanwhile")
	}
	quiet.fetch(t) // and while it holds them
	if n := counter(t, m1.role, "workloadapi_refused", `reason="process-connections"`); n < 8_900 {
		t.Errorf("%v refusals were counted", n)
	}
	if !m1.role.running() {
		t.Fatal("the agent ended")
	}
	_, _ = in.Write([]byte("\n"))
	var open int
	if _, err := fmt.Fscanf(out, "open=%d\n", &open); err != nil {
		t.Fatal(err)
	}
	if open < 1 || open > 64+64 {
		t.Errorf("%d connections stayed open, want about the 64 of one process", open)
	}
	// Its share is free again once it is gone.
	_ = in.Close()
	_ = cmd.Wait()
	next := m1.shell(t, "crowd")
	next.fetch(t)
	if strings.Contains(m1.role.log.String(), "panic") {
		t.Error("the agent panicked")
	}
}
