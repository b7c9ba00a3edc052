package policy

import "time"

// State says how far a protection holds. These three words, everywhere.
type State string

// The protection states.
const (
	Enforced       State = "enforced"        // refused for real, and a probe proved it at Proved
	Observed       State = "observed"        // recorded, not refused
	NotEnforceable State = "not enforceable" // this machine cannot, for Reason; Change says what would change it
)

// Protection is the truth about one protection of one workload (or of a whole machine): what is claimed, and on what
// proof. Enforced is never said without a proof.
type Protection struct {
	Machine  string    `json:"machine"`
	Workload string    `json:"workload,omitempty"` // instance id; empty for the machine
	Name     string    `json:"name"`               // "run.confinement", "net.connect"
	State    State     `json:"state"`
	Proved   time.Time `json:"proved,omitzero"`
	Reason   string    `json:"reason,omitempty"`
	Change   string    `json:"change,omitempty"`
}
