package local

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Prepare asks for room for a workload.
type Prepare struct {
	Service    string            `json:"service"`
	Labels     map[string]string `json:"labels,omitempty"`
	Listen     []fleet.Listen    `json:"listen,omitempty"`
	User       string            `json:"user,omitempty"` // "" is a dynamic one
	Privileged bool              `json:"privileged,omitempty"`
}

// Prepared is where and as whom to start it.
type Prepared struct {
	Workload machine.Workload `json:"workload"`
	Socket   string           `json:"workload_api"` // unix://…
}

// Started names the first process of a prepared workload.
type Started struct {
	PID int `json:"pid"`
}

// Enroll names what already runs.
type Enroll struct {
	Name   string            `json:"name"` // UNIT, PID or CGROUP
	Labels map[string]string `json:"labels,omitempty"`
	Listen []fleet.Listen    `json:"listen,omitempty"`
	// Service is required, as for Prepare.
	Service string `json:"service"`
	// Stay refuses to move processes into a cgroup of their own.
	Stay bool `json:"stay,omitempty"`
}

// Release pulls the break-glass, or, with Resume, puts it back.
type Release struct {
	Reason string `json:"reason,omitempty"`
	Resume bool   `json:"resume,omitempty"`
}

// Decision is an answer with whether the point lets the request through.
type Decision struct {
	Decision *policy.Decision `json:"decision"`
	Allowed  bool             `json:"allowed"`
}

type none struct{}

func (s *Server) routes() {
	m := s.cfg.Machine
	s.mux.Handle("GET /v1/status", handle(s, func(context.Context, *http.Request, none) (machine.Status, error) {
		return m.Status(), nil
	}))
	s.mux.Handle("GET /v1/workloads", handle(s, func(context.Context, *http.Request, none) ([]machine.Workload, error) {
		return m.Workloads(), nil
	}))
	s.mux.Handle("GET /v1/workloads/{instance}", handle(s, func(_ context.Context, r *http.Request, _ none) (machine.Workload, error) {
		return m.Workload(r.PathValue("instance"))
	}))
	s.mux.Handle("POST /v1/workloads", handle(s, s.prepare))
	s.mux.Handle("POST /v1/workloads/{instance}/started", handle(s, func(ctx context.Context, r *http.Request, in Started) (machine.Workload, error) {
		return m.Started(ctx, r.PathValue("instance"), in.PID)
	}))
	s.mux.Handle("POST /v1/workloads/{instance}/ended", handle(s, func(ctx context.Context, r *http.Request, _ none) (none, error) {
		return none{}, m.Ended(ctx, r.PathValue("instance"))
	}))
	s.mux.Handle("POST /v1/workloads/{instance}/forget", handle(s, func(ctx context.Context, r *http.Request, _ none) (none, error) {
		return none{}, m.Forget(ctx, r.PathValue("instance"))
	}))
	s.mux.Handle("POST /v1/enroll", handle(s, s.enroll))
	s.mux.Handle("GET /v1/explain", handle(s, func(ctx context.Context, r *http.Request, _ none) (json.RawMessage, error) {
		return s.cfg.Host.Explain(ctx, r.URL.Query().Get("name"))
	}))
	s.mux.Handle("POST /v1/decisions", handle(s, func(ctx context.Context, _ *http.Request, in policy.Request) (Decision, error) {
		in.Point = "agent"
		in.Context, in.Principal.Attrs, in.Resource.Attrs = restore(in.Context), restore(in.Principal.Attrs), restore(in.Resource.Attrs)
		d := m.Decide(ctx, &in)
		return Decision{Decision: d, Allowed: d.Allowed()}, nil
	}))
	s.mux.Handle("GET /v1/decisions/{id}", handle(s, func(_ context.Context, r *http.Request, _ none) (*policy.Decision, error) {
		return m.Decision(policy.ID(r.PathValue("id")))
	}))
	s.mux.Handle("POST /v1/release", handle(s, s.release))
	s.mux.Handle("GET /v1/protections", handle(s, func(context.Context, *http.Request, none) ([]policy.Protection, error) {
		return s.cfg.Host.Protections(), nil
	}))
	s.mux.Handle("GET /v1/doctor", handle(s, func(ctx context.Context, _ *http.Request, _ none) (json.RawMessage, error) {
		return s.cfg.Host.Doctor(ctx)
	}))
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, &refusal.Error{
			Kind: refusal.Unknown, Code: "no-such-path", What: r.Method + " " + r.URL.Path, Why: "the agent has no such operation",
			Do: "use the redoubt command of the agent's own version",
		})
	})
}

func (s *Server) prepare(ctx context.Context, _ *http.Request, in Prepare) (Prepared, error) {
	uid, gid, err := s.cfg.Host.User(ctx, in.User)
	if err != nil {
		return Prepared{}, err
	}
	w, err := s.cfg.Machine.Prepare(ctx, machine.Registration{
		Service: in.Service, Labels: in.Labels, Listen: in.Listen, Privileged: in.Privileged, UID: uid, GID: gid,
	})
	if err != nil {
		return Prepared{}, err
	}
	return Prepared{Workload: w, Socket: s.cfg.Socket}, nil
}

func (s *Server) enroll(ctx context.Context, _ *http.Request, in Enroll) (machine.Workload, error) {
	t, err := s.cfg.Host.Resolve(ctx, in.Name)
	if err != nil {
		return machine.Workload{}, err
	}
	e := machine.Enrollment{
		Registration: machine.Registration{Service: in.Service, Labels: in.Labels, Listen: in.Listen},
		Cgroup:       t.Cgroup, CgroupID: t.CgroupID, PIDs: t.PIDs,
	}
	if !t.Alone {
		if in.Stay {
			return machine.Workload{}, &refusal.Error{
				Kind: refusal.Conflict, Code: "shared-cgroup", What: "enroll " + in.Name,
				Why: "its cgroup " + t.Cgroup + " holds other programs too, and they would share its identity",
				Do:  "leave out --stay: its processes are then moved, running, into a cgroup of their own",
			}
		}
		e.Move = func() []int { return s.cfg.Host.Family(t) }
	}
	return s.cfg.Machine.Enroll(ctx, e)
}

func (s *Server) release(ctx context.Context, _ *http.Request, in Release) (*machine.Release, error) {
	const actor = `User::"root@machine"`
	if in.Resume {
		return nil, s.cfg.Machine.Resume(ctx, actor)
	}
	return s.cfg.Machine.Release(ctx, actor, in.Reason)
}

// restore gives values that came as JSON the types that policy.Record has: whole numbers, entities, records.
func restore(r policy.Record) policy.Record {
	for k, v := range r {
		r[k] = restored(v)
	}
	return r
}

func restored(v any) any {
	switch v := v.(type) {
	case float64:
		if v == float64(int64(v)) {
			return int64(v)
		}
	case []any:
		for i := range v {
			v[i] = restored(v[i])
		}
	case map[string]any:
		kind, isKind := v["type"].(string)
		id, isID := v["id"].(string)
		if isKind && isID && len(v) == 2 {
			return policy.UID{Type: kind, ID: id}
		}
		return restore(policy.Record(v))
	}
	return v
}
