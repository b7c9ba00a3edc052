package audit

import (
	"bytes"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
)

// openCheckpoint verifies a signed checkpoint by the log's own key, whose name must be its origin.
// Source: C2SP tlog-checkpoint v1. (tlog.ParseTree would not do: it knows the header of go.sum's log only.)
func openCheckpoint(raw []byte, v note.Verifier) (torchwood.Checkpoint, error) {
	policy := torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v))
	c, _, err := torchwood.VerifyCheckpoint(raw, policy)
	return c, err
}

// noteText returns the text of a signed note, without its signatures.
func noteText(raw []byte) string {
	if i := bytes.LastIndex(raw, []byte("\n\n")); i >= 0 {
		return string(raw[:i+1])
	}
	return string(raw)
}
