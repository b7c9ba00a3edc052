package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/redoubtsec/redoubt/api/agent/agentpb"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/refusal"
)

func TestARefusalCrossesTheWireWhole(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000).UTC()
	for _, kind := range []refusal.Kind{
		refusal.Invalid, refusal.Unknown, refusal.Conflict, refusal.Unproven, refusal.Denied, refusal.Exhausted, refusal.Unavailable,
		refusal.Unsupported, refusal.Precondition,
	} {
		want := &refusal.Error{Kind: kind, Code: "code", What: "what: \"quoted\"", Why: "why; ünicode", Do: "do", Decision: "d-1", Err: errors.New("internal cause")}
		wire := toStatus(t.Context(), slog.New(slog.DiscardHandler), fmt.Errorf("wrapped: %w", want), now)
		if strings.Contains(wire.Error(), "internal cause") {
			t.Errorf("the cause is told: %v", wire)
		}
		got, at := fromStatus(wire)
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(refusal.Error{}, "Err")); diff != "" || !at.Equal(now) {
			t.Errorf("%s: at %s, (-want +got):\n%s", kind, at, diff)
		}
	}
}

func TestAnInternalErrorIsNotTold(t *testing.T) {
	var log bytes.Buffer
	wire := toStatus(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), errors.New("password is hunter2"), time.Now())
	got, _ := fromStatus(wire)
	if strings.Contains(wire.Error()+got.Error(), "hunter2") || got.Code != ErrInternal.Code {
		t.Errorf("told: %v", got)
	}
	_, id, _ := strings.Cut(got.Why, "(")
	if id, _, _ = strings.Cut(id, ")"); id == "" || !strings.Contains(log.String(), id) || !strings.Contains(log.String(), "hunter2") {
		t.Errorf("id %q is not in the log: %s", id, &log)
	}
}

func TestBackoff(t *testing.T) {
	for attempt := range 100 {
		for _, jitter := range []float64{0, 0.5, 0.999999} {
			if d := backoffOf(attempt, jitter); d < minBackoff || d > maxBackoff {
				t.Errorf("attempt %d waits %s", attempt, d)
			}
		}
	}
	if backoffOf(20, 0.999999) < 29*time.Second || backoffOf(0, 0.999999) > time.Second {
		t.Error("it does not grow from 0.5 to 30 s")
	}
}

func TestDueIsHalfOfALifeWithJitter(t *testing.T) {
	seen := map[time.Duration]bool{}
	from := time.Now()
	for range 100 {
		d := dueAt(from, time.Hour).Sub(from)
		if d < 24*time.Minute || d > 36*time.Minute {
			t.Errorf("due after %s", d)
		}
		seen[d] = true
	}
	if len(seen) < 50 {
		t.Error("no jitter")
	}
	if d := dueAt(from, -time.Hour).Sub(from); d < minRenewal {
		t.Errorf("due after %s", d)
	}
}

func TestAnonymousCallsAreBounded(t *testing.T) {
	s := &Server{cfg: ServerConfig{MaxAnonymous: 2, MaxCalls: 1}, meter: event.NoMeter, calls: map[string]int{}}
	var leave []func()
	for range 2 {
		l, err := s.admit("")
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, l)
	}
	if _, err := s.admit(""); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	l, err := s.admit("m1")
	if err != nil {
		t.Errorf("a machine must not wait for those who are nobody: %v", err)
	}
	if _, err := s.admit("m1"); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many of a machine: %v", err)
	}
	if _, err := s.admit("m2"); err != nil {
		t.Errorf("another machine: %v", err)
	}
	leave[0]()
	l()
	if _, err := s.admit(""); err != nil {
		t.Error(err)
	}
	if _, err := s.admit("m1"); err != nil {
		t.Error(err)
	}
}

func TestReportsOfOneMachineAreReceivedInTurn(t *testing.T) {
	s := &Server{turns: map[string]*turn{}}
	first, err := s.takeTurn(t.Context(), "m1")
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.takeTurn(t.Context(), "m2")
	if err != nil {
		t.Fatal("another machine must not wait")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.takeTurn(ctx, "m1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second one: %v", err)
	}
	first()
	second, err := s.takeTurn(t.Context(), "m1")
	if err != nil {
		t.Fatal(err)
	}
	second()
	other()
	if len(s.turns) != 0 {
		t.Errorf("left: %v", s.turns)
	}
}

func TestAPanicIsContained(t *testing.T) {
	s := &Server{cfg: ServerConfig{MaxAnonymous: 1, Now: time.Now}, meter: event.NoMeter, log: slog.New(slog.DiscardHandler), calls: map[string]int{}}
	_, err := s.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: agentpb.Agent_Time_FullMethodName}, func(context.Context, any) (any, error) { panic("boom") })
	if e, _ := fromStatus(err); e.Code != ErrInternal.Code || strings.Contains(err.Error(), "boom") {
		t.Errorf("panic became %v", err)
	}
	if s.anonymous != 0 {
		t.Error("its place was not given back")
	}
}

func TestAnEventThatCannotBeReadDoesNotBlockTheQueue(t *testing.T) {
	good, err := eventTo(2, event.New(event.Control, "test"))
	if err != nil {
		t.Fatal(err)
	}
	got, bad := eventsOf([]*agentpb.Event{{Seq: 1, Event: []byte(`{"id":`)}, good, {Seq: 3, Event: []byte(`{"identity":"nonsense"}`)}})
	if bad != 2 || len(got) != 3 || got[0].Event.Kind != "event.malformed" || got[0].Seq != 1 || got[1].Event.Kind != "test" || got[2].Seq != 3 {
		t.Errorf("%d bad of %+v", bad, got)
	}
}

func TestAcknowledgingWhatWasNotSentIsRefused(t *testing.T) {
	d := &downstream{seq: 5, acked: 2, flight: make([]time.Time, 3)}
	for _, seq := range []uint64{6, 1, 1 << 63} {
		if err := d.acknowledge(seq); !errors.Is(err, ErrMessage) {
			t.Errorf("%d: %v", seq, err)
		}
	}
	if err := d.acknowledge(4); err != nil || len(d.flight) != 1 {
		t.Errorf("%v, %d in flight", err, len(d.flight))
	}
}

func TestCutKeepsMessagesSmall(t *testing.T) {
	large := fleet.Change{Kind: fleet.KindPolicySet, Key: "k", Payload: make([]byte, 2*partBytes)}
	small := fleet.Change{Kind: fleet.KindIdentity, Key: "k", Payload: make([]byte, partBytes/3)}
	for _, c := range []struct {
		in   []fleet.Change
		want int
	}{{[]fleet.Change{large}, 1}, {[]fleet.Change{large, small}, 1}, {[]fleet.Change{small, small, small, small}, 2}, {[]fleet.Change{small, large}, 1}} {
		if got := cut(c.in); got != c.want {
			t.Errorf("cut = %d, want %d", got, c.want)
		}
	}
}

// FuzzChanges feeds the client what a server could send: it must take good changes as they are and refuse the rest.
func FuzzChanges(f *testing.F) {
	for _, m := range []*agentpb.SyncResponse{
		{},
		{Changes: []*agentpb.Change{{Revision: 6, Kind: "identity", Key: "w-1", Payload: []byte(`{"instance":"w-1"}`)}}, Revision: 6},
		{Changes: []*agentpb.Change{{Revision: 7, Kind: "identity", Key: "w-1", Deleted: true}, {Revision: 6, Kind: "x", Key: "y", Payload: []byte(`1`)}}, Revision: 7},
		{Changes: []*agentpb.Change{{Revision: 1, Kind: "bundle", Key: "td", Payload: []byte(`{"keys":[]}`)}}, Snapshot: true},
		{Changes: []*agentpb.Change{{Revision: 9, Kind: "k", Key: "k", Payload: []byte(`{`)}}, Revision: 9, Seq: 3},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, uint64(5))
	}
	f.Fuzz(func(t *testing.T, raw []byte, after uint64) {
		var m agentpb.SyncResponse
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		changes, err := changesOf(&m, after)
		if err != nil {
			if !errors.Is(err, ErrMessage) {
				t.Errorf("refused with %v", err)
			}
			return
		}
		last := after
		for i, c := range changes {
			if !m.GetSnapshot() {
				if c.Revision <= last || m.GetRevision() < c.Revision {
					t.Errorf("revision %d after %d in a message of %d", c.Revision, last, m.GetRevision())
				}
				last = c.Revision
			} else if c.Deleted {
				t.Error("a snapshot deletes")
			}
			if c.Deleted == json.Valid(c.Payload) || c.Key == "" || c.Kind == "" {
				t.Errorf("accepted %+v", c)
			}
			if diff := cmp.Diff(m.GetChanges()[i], changeTo(c), cmpopts.IgnoreUnexported(agentpb.Change{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("changed on the way:\n%s", diff)
			}
		}
	})
}

// FuzzReport feeds the server what an agent could send.
func FuzzReport(f *testing.F) {
	for _, m := range []*agentpb.ReportRequest{
		{},
		{Present: []*agentpb.Observed{{Instance: "w-1", Facts: []byte(`[{"name":"workload.service","value":"orders","source":"operator"}]`), Listen: []*agentpb.Listen{{Port: 8080, Protocol: "http"}}}}, Full: true},
		{Present: []*agentpb.Observed{{Instance: "w-1", Facts: []byte(`[{"name":"a b","value":1.5}]`)}}, Gone: []string{"w-2"}},
		{Present: []*agentpb.Observed{{Listen: []*agentpb.Listen{{Port: 70000}}}}},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m agentpb.ReportRequest
		if proto.Unmarshal(raw, &m) != nil {
			return
		}
		got, err := observedOf(m.GetPresent())
		if err != nil {
			if !errors.Is(err, ErrMessage) {
				t.Errorf("refused with %v", err)
			}
			return
		}
		if len(got) != len(m.GetPresent()) {
			t.Errorf("%d of %d", len(got), len(m.GetPresent()))
		}
		for _, o := range got {
			if _, err := observedTo(o); err != nil {
				t.Error(err)
			}
		}
	})
}

// FuzzCredentials feeds the parser of agent.pem what a disk could hold.
func FuzzCredentials(f *testing.F) {
	f.Add([]byte(""))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if c, err := parseCredentials(raw); err == nil && (c.Key == nil || len(c.Chain) > 0 && c.Bundle == nil) {
			t.Errorf("accepted %v", c)
		}
	})
}
