package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/redoubtsec/redoubt/api/client"
	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/machine"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/refusal"
)

// Target is what the name of something that runs (a unit, a pid, a cgroup) stands for.
type Target struct {
	Cgroup   string `json:"cgroup"`
	CgroupID uint64 `json:"cgroup_id"`
	PIDs     []int  `json:"pids"`
	Unit     string `json:"unit,omitempty"`
	Kind     string `json:"kind"` // unit, pid, cgroup
	// Alone reports whether the cgroup holds nothing but PIDs and their descendants; else enrolling moves them.
	Alone bool `json:"alone"`
}

// Host is what the door needs of the machine beside the registry.
type Host interface {
	// Resolve finds what runs under this name: a systemd unit, a pid, or a cgroup.
	Resolve(ctx context.Context, name string) (Target, error)
	// Family returns the processes of a target, and what they started, that are still in its cgroup.
	Family(t Target) []int
	// User returns the uid and gid of a user name or number; "" is a dynamic one that nobody uses.
	User(ctx context.Context, name string) (uid, gid uint32, err error)
	// Explain tells what a process would be attested as, and the identity rules that apply.
	Explain(ctx context.Context, name string) (json.RawMessage, error)
	// Doctor returns the capability ledger and the state of the agent.
	Doctor(ctx context.Context) (json.RawMessage, error)
	// Protections returns the truth about every protection here.
	Protections() []policy.Protection
}

// Config is what the door is made of.
type Config struct {
	Machine *machine.Machine
	Host    Host
	Socket  string // path of the Workload API, told to `redoubt run`
	Meter   event.Meter
	Logger  *slog.Logger
}

// The bounds of the door.
const (
	maxBody     = 1 << 20
	maxInFlight = 64
	readTimeout = 10 * time.Second
)

// Server answers on the agent's socket. Concurrency: safe.
type Server struct {
	cfg      Config
	mux      *http.ServeMux
	inFlight chan struct{}
}

// New returns a server. It starts nothing.
func New(cfg Config) *Server {
	if cfg.Meter == nil {
		cfg.Meter = event.NoMeter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, mux: http.NewServeMux(), inFlight: make(chan struct{}, maxInFlight)}
	s.routes()
	return s
}

type callerKey struct{}

// Listen makes the socket, 0600, in place of one that an earlier agent left.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path); err == nil {
		_ = c.Close()
		return nil, &refusal.Error{
			Kind: refusal.Conflict, Code: "agent-running", What: "listen on " + path, Why: "another agent answers there",
			Do: "stop it first, or give this one a data directory of its own",
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("protect %s: %w", path, err)
	}
	return l, nil
}

// Serve answers until ctx ends; calls in flight are given five seconds.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler: s, ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			uid, err := peerUID(c)
			if err != nil {
				uid = -1
			}
			return context.WithValue(ctx, callerKey{}, uid)
		},
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		<-ctx.Done()
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(bye)
	})
	err := server.Serve(l)
	wg.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// ServeHTTP implements http.Handler: who calls is checked before anything else.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			s.cfg.Logger.Error("a call on the agent's socket panicked", "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
			s.fail(w, errors.New("internal failure"))
		}
	}()
	uid, _ := r.Context().Value(callerKey{}).(int)
	if uid != 0 && uid != os.Geteuid() {
		s.cfg.Meter.Count("local_refused", 1, "reason", "not-root")
		s.fail(w, &refusal.Error{
			Kind: refusal.Denied, Code: "not-root", What: "use the agent's socket", Why: "it answers root of this machine only",
			Do: "run the command as root",
		})
		return
	}
	if r.URL.Path == "/v1/release" {
		s.mux.ServeHTTP(w, r) // break-glass waits for nobody
		return
	}
	select {
	case s.inFlight <- struct{}{}:
		defer func() { <-s.inFlight }()
	default:
		s.cfg.Meter.Count("local_refused", 1, "reason", "busy")
		s.fail(w, &refusal.Error{
			Kind: refusal.Exhausted, Code: "agent-busy", What: "call the agent",
			Why: strconv.Itoa(maxInFlight) + " calls are being answered, its limit", Do: "try again",
		})
		return
	}
	s.mux.ServeHTTP(w, r)
}

// statuses is how kinds of refusal are rendered here; the member `kind` carries the exact one.
var statuses = map[refusal.Kind]int{
	refusal.Invalid: http.StatusUnprocessableEntity, refusal.Unknown: http.StatusNotFound, refusal.Conflict: http.StatusConflict,
	refusal.Unproven: http.StatusUnauthorized, refusal.Denied: http.StatusForbidden, refusal.Exhausted: http.StatusTooManyRequests,
	refusal.Unavailable: http.StatusServiceUnavailable, refusal.Unsupported: http.StatusNotImplemented,
	refusal.Precondition: http.StatusPreconditionRequired,
}

func (s *Server) fail(w http.ResponseWriter, err error) {
	p := client.Problem{
		Type: client.ProblemInternal, Title: "Internal failure", Status: http.StatusInternalServerError,
		Detail: "the agent failed; its log says why", Code: "internal",
	}
	if r := refusal.As(err); r != nil {
		p = client.Problem{
			Type: client.ProblemBase + string(r.Kind), Title: "Refused", Status: statuses[r.Kind], Detail: r.What + ": " + r.Why,
			Code: r.Code, What: r.What, Why: r.Why, Do: r.Do, Decision: r.Decision,
		}
	} else {
		s.cfg.Logger.Error("a call on the agent's socket failed", "error", err)
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

// handle makes a handler of a function from a body to an answer.
func handle[In, Out any](s *Server, fn func(ctx context.Context, r *http.Request, in In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		if r.Method != http.MethodGet {
			d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
			d.DisallowUnknownFields()
			if err := d.Decode(&in); err != nil && !errors.Is(err, io.EOF) {
				s.fail(w, &refusal.Error{
					Kind: refusal.Invalid, Code: "malformed-request", What: "the body of " + r.URL.Path,
					Why: "it is not the JSON expected, or larger than 1 MiB", Do: "use the redoubt command of the agent's own version",
				})
				return
			}
		}
		out, err := fn(r.Context(), r, in)
		if err != nil {
			s.fail(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(out)
	}
}
