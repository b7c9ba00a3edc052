package policy

import (
	"time"

	"github.com/redoubtsec/redoubt/identity"
)

// ID names a decision: d- and 26 characters, time-ordered.
type ID string

// NewID returns a fresh decision id.
func NewID() ID { return ID(identity.Unique("d")) }

// Verdict is what policy says of a request.
type Verdict string

// The verdicts.
const (
	Permit Verdict = "permit"
	Deny   Verdict = "deny"
)

// Mode says whether a point acts on verdicts or only records them.
type Mode string

// The modes. In Observe a denied request goes through and its decision says that it would have been refused.
const (
	Enforce Mode = "enforce"
	Observe Mode = "observe"
)

// Effect is what one policy does when it applies.
type Effect string

// The effects.
const (
	EffectPermit Effect = "permit"
	EffectForbid Effect = "forbid"
)

// Ref names one policy: by its @id annotation, else file#n.
type Ref struct {
	ID     string `json:"id"`
	File   string `json:"file"`
	Effect Effect `json:"effect"`
}

// Miss is a policy that nearly applied, and what kept it from applying, each in a sentence.
type Miss struct {
	Policy Ref      `json:"policy"`
	Why    []string `json:"why"`
}

// Failure is a policy that could not be evaluated for this request (a missing attribute, a wrong type). It counts as
// not applying; a forbid that fails is therefore reported loudly.
type Failure struct {
	Policy Ref    `json:"policy"`
	Error  string `json:"error"`
}

// Reason is why a verdict came out as it did; a stable code.
type Reason string

// The reasons.
const (
	ReasonPermit     Reason = "permitted"   // a permit applied and no forbid did
	ReasonForbid     Reason = "forbidden"   // a forbid applied
	ReasonDefault    Reason = "no-permit"   // nothing applied: default deny
	ReasonNeverTouch Reason = "never-touch" // the never-touch list protects this, and no policy names it
	ReasonReleased   Reason = "released"    // redoubt release lifted everything on this machine
	ReasonError      Reason = "error"       // the engine could not decide
)

// Explanation says why, for people and programs.
type Explanation struct {
	Reason   Reason    `json:"reason"`
	Summary  string    `json:"summary"` // one sentence
	Deciding []Ref     `json:"deciding,omitempty"`
	Nearest  []Miss    `json:"nearest,omitempty"` // of a default deny: at most three, nearest first
	Failures []Failure `json:"failures,omitempty"`
}

// Decision is one answer, with everything needed to explain it later.
//
// Concurrency: immutable once returned.
type Decision struct {
	ID          ID          `json:"id"`
	Time        time.Time   `json:"time"`
	Verdict     Verdict     `json:"verdict"`
	Mode        Mode        `json:"mode"`
	Request     Request     `json:"request"`
	Explanation Explanation `json:"explanation"`
	// Edition is the version of the policy set that answered; 0 is the built-in set of a fresh server.
	Edition uint64 `json:"policy_set"`
	// Machine is where it was decided: a machine id, or "server".
	Machine string `json:"machine"`
}

// Allowed reports whether the point lets the request through: it was permitted, or the mode only observes.
func (d *Decision) Allowed() bool { return d.Verdict == Permit || d.Mode == Observe }

// WouldDeny reports whether the request went through only because the mode observes.
func (d *Decision) WouldDeny() bool { return d.Verdict == Deny && d.Mode == Observe }
