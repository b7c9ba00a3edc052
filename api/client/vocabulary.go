package client

import (
	"encoding/json"
	"time"

	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
)

// Page is one page of a list. Next is the cursor of the page after it, or "" of the last one.
type Page[T any] struct {
	Items []T    `json:"items" nullable:"false" doc:"What the page has, in the order of the list."`
	Next  string `json:"next,omitempty" doc:"Opaque cursor of the next page; absent on the last one."`
}

// Status is the server in a few lines.
type Status struct {
	Version     string               `json:"version" doc:"Version of the server."`
	TrustDomain identity.TrustDomain `json:"trust_domain" doc:"Name of the trust domain."`
	Started     time.Time            `json:"started" doc:"When the server started."`
	Time        time.Time            `json:"time" doc:"The server's clock."`
	PolicySet   EditionSummary       `json:"policy_set" doc:"The edition of the policy set in force."`
	Overrides   int                  `json:"overrides" doc:"How many pulls of the panic switch are in force."`
	Audit       audit.Status         `json:"audit" doc:"How the audit log stands."`
	Problems    []string             `json:"problems" nullable:"false" doc:"What an operator should look at, in sentences."`
}

// EditionSummary names an edition of the policy set.
type EditionSummary struct {
	Version   uint64           `json:"version" doc:"Number of the edition; 0 is the built-in set."`
	Digest    string           `json:"digest" doc:"Digest of its files."`
	State     set.EditionState `json:"state,omitempty" doc:"active or pending."`
	ConfirmBy time.Time        `json:"confirm_by,omitzero" doc:"When it is returned unless confirmed."`
}

// Revoke asks to revoke a machine.
type Revoke struct {
	Reason string `json:"reason" minLength:"1" maxLength:"512" doc:"Why, for the record."`
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Machine   string   `json:"machine" minLength:"1" maxLength:"63" doc:"Id of the machine that may join with it."`
	ExpiresIn Duration `json:"expires_in,omitzero" doc:"How long it may be used; PT1H if absent."`
	Replace   bool     `json:"replace,omitempty" doc:"It may take the place of a machine of that id which has joined already."`
}

// Token is a new join token. Trust: Secret is shown in this answer only, and redacts itself when formatted.
type Token struct {
	fleet.JoinToken
	Secret string `json:"secret" doc:"What the agent joins with. Shown in this answer and never again."`
}

// String names the token without its secret.
func (t Token) String() string { return "join token " + t.ID + " for machine " + t.Machine }

// GoString is [Token.String].
func (t Token) GoString() string { return t.String() }

// ExplainRequest asks which identity something earns: a workload known, or facts as given.
type ExplainRequest struct {
	Instance string           `json:"instance,omitempty" maxLength:"128" doc:"Instance of a workload, w-…"`
	Name     string           `json:"name,omitempty" maxLength:"256" doc:"A service, a SPIFFE ID or an instance, of a workload that is present."`
	Facts    identity.FactSet `json:"facts,omitzero" doc:"Facts to try the rules on, of a workload that need not exist."`
}

// Explained says which identity facts earn, by which rule, and why no other rule gave it.
type Explained struct {
	Instance string           `json:"instance,omitempty" doc:"The workload, if one was asked about."`
	Machine  string           `json:"machine,omitempty" doc:"The machine it is on."`
	ID       identity.ID      `json:"identity,omitzero" doc:"The identity earned; absent if none is."`
	Refusal  *fleet.Refusal   `json:"refusal,omitempty" doc:"Why none is."`
	Issuance set.Issuance     `json:"issuance" doc:"Every issuance rule, and what became of it."`
	Facts    identity.FactSet `json:"facts" doc:"The facts that were looked at."`
	Edition  uint64           `json:"policy_set" doc:"The edition of the policy set whose rules these are."`
}

// ApplyRequest asks for a new edition of the policy set.
type ApplyRequest struct {
	Files         []set.File `json:"files" maxItems:"1024" nullable:"false" doc:"The whole set: *.cedar, *.yaml, *.yml."`
	ConfirmWithin Duration   `json:"confirm_within,omitzero" doc:"Return to the former edition unless this one is confirmed within this time; PT5M."`
	DryRun        bool       `json:"dry_run,omitempty" doc:"Check and compare only."`
	Note          string     `json:"note,omitempty" maxLength:"1024" doc:"For those who read the history."`
}

// Applied is what became of an [ApplyRequest] or [RollbackRequest].
type Applied struct {
	Edition set.Edition `json:"edition" doc:"The edition made; of a dry run, the one that would be, with the version it would get."`
	Diff    set.Diff    `json:"diff" doc:"How it differs from the one before."`
	Changed bool        `json:"changed" doc:"An edition was made; false of a dry run, and if the files are those in force already."`
	// Notices are what the files say and nothing acts on yet.
	Notices []set.Notice `json:"notices" nullable:"false" doc:"What the files say and nothing acts on yet."`
}

// ConfirmRequest confirms an edition that waits for it.
type ConfirmRequest struct {
	Version uint64 `json:"version" minimum:"1" doc:"The edition to confirm: the one you looked at."`
}

// RollbackRequest asks to put back the files of a former edition, as a new one.
type RollbackRequest struct {
	To            uint64   `json:"to" doc:"The edition whose files to put back; 0 is the built-in set."`
	ConfirmWithin Duration `json:"confirm_within,omitzero" doc:"Return to the present edition unless the new one is confirmed within this time."`
	DryRun        bool     `json:"dry_run,omitempty" doc:"Compare only."`
	Note          string   `json:"note,omitempty" maxLength:"1024" doc:"For those who read the history."`
}

// DiffRequest asks how files differ from the set in force.
type DiffRequest struct {
	Files []set.File `json:"files" maxItems:"1024" nullable:"false" doc:"The whole set to compare."`
}

// ObserveRequest pulls the panic switch: what it selects is observed, not enforced, until it ends.
type ObserveRequest struct {
	set.Selector
	ExpiresIn Duration `json:"expires_in,omitzero" doc:"How long; PT1H if absent, P7D at most."`
	Note      string   `json:"note,omitempty" maxLength:"1024" doc:"Why, for the record."`
}

// AskRequest asks for a decision.
//
// Shape: entities and values are in Cedar's JSON: {"uid":{"type","id"},"attrs","parents","tags"}; {"__entity":{…}} and
// {"__extn":{"fn":"ip"|"datetime","arg":"…"}} within attributes and context.
type AskRequest struct {
	Principal AskEntity                  `json:"principal" doc:"Who would act."`
	Action    policy.UID                 `json:"action" doc:"What it would do: {\"type\":\"Net::Action\",\"id\":\"connect\"}."`
	Resource  AskEntity                  `json:"resource" doc:"What it would do it to."`
	Context   map[string]json.RawMessage `json:"context,omitempty" doc:"The circumstances, by name, in Cedar's JSON."`
	Others    []AskEntity                `json:"others,omitempty" maxItems:"256" nullable:"false" doc:"Further entities that policies may speak of."`
	Instance  string                     `json:"instance,omitempty" maxLength:"128" doc:"A workload known to the server: its facts become those of the principal, which may then have just a uid."`
}

// AskEntity is an entity of an [AskRequest].
type AskEntity struct {
	UID     policy.UID                 `json:"uid" doc:"Type and id."`
	Parents []policy.UID               `json:"parents,omitempty" maxItems:"256" nullable:"false" doc:"Entities that it is in."`
	Attrs   map[string]json.RawMessage `json:"attrs,omitempty" doc:"Attributes, in Cedar's JSON."`
	Tags    map[string]string          `json:"tags,omitempty" doc:"Labels."`
}

// Known is what the server was told of one decision: by the machine that made it and, if it travelled, by others.
type Known struct {
	ID   policy.ID    `json:"id" doc:"The decision, d-…"`
	Told []fleet.Told `json:"told" nullable:"false" doc:"Who told what, oldest first."`
}

// RevocationRequest asks to withdraw trust from exactly one of an identity, a machine or a key.
type RevocationRequest struct {
	Identity  string   `json:"identity,omitempty" maxLength:"2048" doc:"A SPIFFE ID."`
	Machine   string   `json:"machine,omitempty" maxLength:"63" doc:"A machine id."`
	SPKI      string   `json:"spki,omitempty" pattern:"^[0-9a-f]{64}$" doc:"SHA-256 of a key's SubjectPublicKeyInfo, 64 hex digits."`
	Reason    string   `json:"reason" minLength:"1" maxLength:"512" doc:"Why, for the record."`
	ExpiresIn Duration `json:"expires_in,omitzero" doc:"How long; until it is lifted if absent."`
}

// QuarantineRequest asks to mark exactly one of an identity or an instance with the fact risk.quarantined.
type QuarantineRequest struct {
	Identity  string   `json:"identity,omitempty" maxLength:"2048" doc:"A SPIFFE ID."`
	Instance  string   `json:"instance,omitempty" maxLength:"128" doc:"One workload, w-…"`
	Reason    string   `json:"reason" minLength:"1" maxLength:"512" doc:"Why, for the record."`
	ExpiresIn Duration `json:"expires_in,omitzero" doc:"How long; until it is lifted if absent."`
}

// AuditLog is how the audit log stands, and what verifies it.
type AuditLog struct {
	audit.Status
	Verifier   string `json:"verifier" doc:"The log's verifier key (C2SP signed-note), for redoubt audit verify."`
	Checkpoint string `json:"checkpoint,omitempty" doc:"The published checkpoint, a signed note (C2SP tlog-checkpoint); keep one elsewhere."`
}
