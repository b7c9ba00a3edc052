package agent

import (
	"crypto/x509"
	"encoding/json"
	"fmt"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The bounds of messages.
const (
	// maxRequestBytes bounds a message to the server: an agent is not trusted with its memory.
	maxRequestBytes = 2 << 20
	// maxResponseBytes bounds a message to the agent: a change of the largest payload must fit.
	maxResponseBytes = fleet.MaxPayloadBytes + 1<<20
	// partBytes is where reports, answers and changes are cut into messages; one that is larger goes alone.
	partBytes = 512 << 10
	// maxReportBytes bounds the JSON of facts in one report, over all of its parts.
	maxReportBytes = 32 << 20
	// maxSnapshotBytes bounds what a client collects of a snapshot.
	maxSnapshotBytes = 512 << 20
	maxChain         = 8
	maxKey           = 1 << 10
)

func malformed(what, why string) *refusal.Error {
	return refuse(ErrMessage, refusal.Invalid, what, why, "update whichever of agent and server is older")
}

func observedOf(list []*agentpb.Observed) ([]fleet.Observed, error) {
	out := make([]fleet.Observed, 0, len(list))
	for _, o := range list {
		x := fleet.Observed{Instance: o.GetInstance()}
		if err := unmarshal(o.GetFacts(), &x.Facts); err != nil {
			return nil, malformed("report", "the facts of a workload are malformed")
		}
		for _, l := range o.GetListen() {
			if l.GetPort() > 65535 {
				return nil, malformed("report", "a declared port is above 65535")
			}
			x.Listen = append(x.Listen, fleet.Listen{Port: uint16(l.GetPort()), Protocol: l.GetProtocol(), Address: l.GetAddress(), Netns: l.GetNetns()})
		}
		out = append(out, x)
	}
	return out, nil
}

func observedTo(o fleet.Observed) (*agentpb.Observed, error) {
	facts, err := json.Marshal(o.Facts)
	if err != nil {
		return nil, fmt.Errorf("render facts of %s: %w", o.Instance, err)
	}
	x := &agentpb.Observed{Instance: o.Instance, Facts: facts}
	for _, l := range o.Listen {
		x.Listen = append(x.Listen, &agentpb.Listen{Port: uint32(l.Port), Protocol: l.Protocol, Address: l.Address, Netns: l.Netns})
	}
	return x, nil
}

func assignedTo(a fleet.Assigned) (*agentpb.Assigned, error) {
	facts, err := json.Marshal(a.Facts)
	if err != nil {
		return nil, fmt.Errorf("render facts of %s: %w", a.Instance, err)
	}
	x := &agentpb.Assigned{Instance: a.Instance, Id: a.ID.String(), Issuance: a.Issuance, Facts: facts, Epoch: a.Epoch}
	if r := a.Refusal; r != nil {
		x.Refusal = &agentpb.Refusal{Kind: string(r.Kind), Code: r.Code, What: r.What, Why: r.Why, Do: r.Do, Decision: r.Decision}
	}
	return x, nil
}

func assignedOf(x *agentpb.Assigned) (fleet.Assigned, error) {
	a := fleet.Assigned{Instance: x.GetInstance(), Issuance: x.GetIssuance(), Epoch: x.GetEpoch()}
	if x.GetId() != "" {
		id, err := identity.ParseID(x.GetId())
		if err != nil {
			return fleet.Assigned{}, err
		}
		a.ID = id
	}
	if err := unmarshal(x.GetFacts(), &a.Facts); err != nil {
		return fleet.Assigned{}, malformed("answer of the server", "the facts of a workload are malformed")
	}
	if len(a.Issuance) > 0 && !json.Valid(a.Issuance) {
		return fleet.Assigned{}, malformed("answer of the server", "the explanation of an identity is malformed")
	}
	if r := x.GetRefusal(); r != nil {
		a.Refusal = &fleet.Refusal{Kind: refusal.Kind(r.GetKind()), Code: r.GetCode(), What: r.GetWhat(), Why: r.GetWhy(), Do: r.GetDo(), Decision: r.GetDecision()}
	}
	return a, nil
}

func unmarshal(raw []byte, into *identity.FactSet) error {
	if len(raw) == 0 {
		return nil
	}
	return json.Unmarshal(raw, into)
}

func changeTo(c fleet.Change) *agentpb.Change {
	return &agentpb.Change{Revision: c.Revision, Kind: string(c.Kind), Key: c.Key, Payload: c.Payload, Deleted: c.Deleted}
}

// changesOf reads the changes of one message. Changes of unknown kinds pass: whether to mind is the receiver's. Deltas
// must rise from after. Trust: m comes from the wire.
func changesOf(m *agentpb.SyncResponse, after uint64) ([]fleet.Change, error) {
	what := "changes from the server"
	out := make([]fleet.Change, 0, len(m.GetChanges()))
	last := after
	for _, c := range m.GetChanges() {
		x := fleet.Change{Revision: c.GetRevision(), Kind: fleet.ChangeKind(c.GetKind()), Key: c.GetKey(), Payload: c.GetPayload(), Deleted: c.GetDeleted()}
		switch {
		case x.Kind == "" || len(x.Kind) > 64 || x.Key == "" || len(x.Key) > maxKey:
			return nil, malformed(what, "a change has no kind or key, or one that is too long")
		case x.Deleted != (len(x.Payload) == 0):
			return nil, malformed(what, "a change is neither a payload nor a deletion")
		case !x.Deleted && !json.Valid(x.Payload):
			return nil, malformed(what, "the payload of a change is no JSON")
		case x.Revision == 0:
			return nil, malformed(what, "a change has no revision")
		case !m.GetSnapshot() && x.Revision <= last:
			return nil, malformed(what, "their revisions do not rise")
		case m.GetSnapshot() && x.Deleted:
			return nil, malformed(what, "a snapshot deletes")
		}
		last = x.Revision
		out = append(out, x)
	}
	if !m.GetSnapshot() && len(out) > 0 && m.GetRevision() < last {
		return nil, malformed(what, "their revision is below that of a change")
	}
	return out, nil
}

func eventTo(seq uint64, e event.Event) (*agentpb.Event, error) {
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("render event %d: %w", seq, err)
	}
	return &agentpb.Event{Seq: seq, Event: raw}, nil
}

// eventsOf reads a batch. An event that cannot be read is replaced by one that says so: its number must not block the
// queue for ever. It returns how many those were. Trust: list comes from the wire.
func eventsOf(list []*agentpb.Event) ([]fleet.Numbered, int) {
	out, bad := make([]fleet.Numbered, 0, len(list)), 0
	for _, x := range list {
		n := fleet.Numbered{Seq: x.GetSeq()}
		if err := json.Unmarshal(x.GetEvent(), &n.Event); err != nil {
			bad++
			n.Event = event.New(event.Control, "event.malformed")
			n.Event.Message = "an event of the agent could not be read"
		}
		out = append(out, n)
	}
	return out, bad
}

func chainTo(chain []*x509.Certificate) [][]byte {
	out := make([][]byte, len(chain))
	for i, c := range chain {
		out[i] = c.Raw
	}
	return out
}

func chainOf(raw [][]byte) ([]*x509.Certificate, error) {
	if len(raw) == 0 || len(raw) > maxChain {
		return nil, malformed("certificate from the server", "its chain is empty or too long")
	}
	out := make([]*x509.Certificate, len(raw))
	for i, der := range raw {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, malformed("certificate from the server", "it cannot be parsed")
		}
		out[i] = c
	}
	return out, nil
}
