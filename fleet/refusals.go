package fleet

import (
	"fmt"
	"time"

	"github.com/redoubtsec/redoubt/refusal"
)

// The codes of this room's refusals, to be matched with errors.Is.
var (
	// Of join tokens and joining.
	ErrTokenMalformed = &refusal.Error{Code: "join-token-malformed"}
	ErrTokenUnknown   = &refusal.Error{Code: "join-token-unknown"} // no such id, or not its secret: which is not said
	ErrTokenUsed      = &refusal.Error{Code: "join-token-used"}
	ErrTokenExpired   = &refusal.Error{Code: "join-token-expired"}
	ErrTokenMachine   = &refusal.Error{Code: "join-token-wrong-machine"}
	ErrTokens         = &refusal.Error{Code: "join-tokens-exhausted"}
	ErrTokenTTL       = &refusal.Error{Code: "join-token-lifetime"}
	ErrMachineExists  = &refusal.Error{Code: "machine-exists"}
	ErrMachines       = &refusal.Error{Code: "machines-exhausted"}
	ErrMachineID      = &refusal.Error{Code: "malformed-machine-id"}

	// Of a machine that speaks.
	ErrMachineUnknown = &refusal.Error{Code: "machine-unknown"}
	ErrMachineRevoked = &refusal.Error{Code: "machine-revoked"}
	ErrMachineKey     = &refusal.Error{Code: "machine-key-unknown"}
	ErrKeyRevoked     = &refusal.Error{Code: "key-revoked"}
	ErrRotation       = &refusal.Error{Code: "key-rotated-lately"}
	ErrRenewLate      = &refusal.Error{Code: "renewal-too-late"}

	// Of workloads.
	ErrReport          = &refusal.Error{Code: "malformed-report"}
	ErrWorkloads       = &refusal.Error{Code: "workloads-exhausted"}
	ErrWorkloadBytes   = &refusal.Error{Code: "workload-bytes-exhausted"}
	ErrWorkloadFacts   = &refusal.Error{Code: "workload-facts"}
	ErrWorkloadUnknown = &refusal.Error{Code: "workload-unknown"}
	ErrWorkloadForeign = &refusal.Error{Code: "workload-foreign"} // it is on another machine
	ErrWorkloadGone    = &refusal.Error{Code: "workload-gone"}
	ErrIdentityRevoked = &refusal.Error{Code: "identity-revoked"}
	ErrReserved        = &refusal.Error{Code: "reserved-identity"} // an issuance rule gave an ID that is not a workload's
	ErrIssuance        = &refusal.Error{Code: "issuance-failed"}

	// Of revocations, quarantines, queries, events.
	ErrWithdrawal  = &refusal.Error{Code: "malformed-withdrawal"}
	ErrWithdrawals = &refusal.Error{Code: "withdrawals-exhausted"}
	ErrUnknown     = &refusal.Error{Code: "unknown-id"}
	ErrEvents      = &refusal.Error{Code: "malformed-events"}
	ErrEventRate   = &refusal.Error{Code: "events-too-fast"}
	ErrDecision    = &refusal.Error{Code: "decision-unknown"}

	// ErrState: the store failed in a way that leaves open what was done; nothing is answered until it has been read again.
	ErrState = &refusal.Error{Code: "state-unavailable"}
)

// refuse makes the refusal with the code of sentinel.
func refuse(sentinel *refusal.Error, kind refusal.Kind, what, why, do string) *refusal.Error {
	return &refusal.Error{Kind: kind, Code: sentinel.Code, What: what, Why: why, Do: do}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func joinOf(machine string) string {
	if checkMachineID(machine) != nil {
		return "join"
	}
	return "join of machine " + machine
}

func workloadName(instance string) string {
	if checkInstance(instance) != nil {
		return "workload"
	}
	return "workload " + instance
}

func exhausted(sentinel *refusal.Error, what string, limit int, do string) *refusal.Error {
	return refuse(sentinel, refusal.Exhausted, what, fmt.Sprintf("there are %d already, which is the limit", limit), do)
}
