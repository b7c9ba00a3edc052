package sensor_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/sensor"
)

func ledger() *sensor.Ledger {
	return &sensor.Ledger{System: "linux", Kernel: "6.1.0", Entries: []sensor.Capability{
		{Name: "map.hash", Kind: sensor.KindMap, Works: true, Least: "3.19", Means: "policy tables"},
		{Name: "lsm.file_open", Kind: sensor.KindLSM, Error: "load: operation not permitted", Least: "5.7", Means: "refuses to open a file"},
	}}
}

func TestWhatIsMissingIsNamedWithTheLeastKernel(t *testing.T) {
	l := ledger()
	if err := l.Need("map.hash"); err != nil || !l.Works("map.hash") || !l.Works() {
		t.Errorf("what works is refused: %v", err)
	}
	err := l.Need("map.hash", "lsm.file_open")
	if !errors.Is(err, sensor.ErrUnsupported) || refusal.As(err).Kind != refusal.Unsupported || l.Works("map.hash", "lsm.file_open") {
		t.Fatalf("got %v, want an unsupported capability", err)
	}
	for _, part := range []string{"lsm.file_open", "6.1.0", "operation not permitted", "5.7"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if err := l.Need("lsm.teleport"); !errors.Is(err, sensor.ErrUnsupported) || l.Works("lsm.teleport") {
		t.Errorf("a capability that is not in the ledger: %v", err)
	}
}

func TestALedgerIsJSON(t *testing.T) {
	l := ledger()
	b, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{`"entries":[{"name":"map.hash","kind":"map","works":true,"least":"3.19","means":"policy tables"`, `"kernel":"6.1.0"`, `"root":false`} {
		if !strings.Contains(string(b), field) {
			t.Errorf("%s lacks %s", b, field)
		}
	}
	var back sensor.Ledger
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(l, &back); d != "" {
		t.Errorf("after JSON (-want +got):\n%s", d)
	}
	if got, want := l.Summary(), "1 of 2 kernel capabilities work on linux 6.1.0"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if c, ok := l.Get("lsm.file_open"); !ok || c.Works {
		t.Errorf("Get: %v, %v", c, ok)
	}
}
