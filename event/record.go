package event

import (
	"encoding/json"
	"time"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
)

// Record is one leaf of the audit log: who changed what, by which decision. A store writes it in the same transaction
// as the change; the log proves later that it was not altered.
//
// Shape: canonical JSON, keys in the order below, Detail by key. No secret is ever put into a record.
type Record struct {
	ID       string            `json:"id"` // r-…, unique: a leaf that was logged twice after a crash is known by it
	Time     time.Time         `json:"time"`
	Actor    string            `json:"actor"`  // Cedar UID of the principal: User::"operator", Machine::"m1"
	Action   string            `json:"action"` // "policy-set.apply", "machine.join"
	Object   string            `json:"object"` // what was changed
	Decision policy.ID         `json:"decision,omitempty"`
	Detail   map[string]string `json:"detail,omitempty"`
}

// NewRecord returns a record with a fresh id and the time now.
func NewRecord(actor, action, object string) Record {
	return Record{ID: identity.Unique("r"), Time: time.Now().UTC(), Actor: actor, Action: action, Object: object}
}

// Leaf renders the record as the bytes that are logged.
func (r Record) Leaf() ([]byte, error) { return json.Marshal(r) }
