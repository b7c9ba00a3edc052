package redoubt_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/redoubtsec/redoubt"
	"github.com/redoubtsec/redoubt/refusal"
)

// A credential that nobody could use must not be taken for one: the operator would be locked out in silence.
func TestADamagedOperatorFileRefusesToStart(t *testing.T) {
	for _, text := range []string{`{}`, `{"credential":"ro1.short"}`, `not JSON`} {
		cfg, err := redoubt.DevConfig(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Data, redoubt.OperatorFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.Data, redoubt.KEKName), bytes.Repeat([]byte{7}, 32), 0o600); err != nil {
			t.Fatal(err)
		}
		var logs bytes.Buffer
		tel, err := redoubt.NewTelemetry(t.Context(), "server", cfg, &logs)
		if err != nil {
			t.Fatal(err)
		}
		_, err = redoubt.NewServer(t.Context(), cfg, tel)
		if r := refusal.As(err); r == nil || r.Code != "bad-operator" && r.Code != "no-operator" {
			t.Errorf("%s: got %v", text, err)
		}
	}
}
