package redoubt

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/redoubtsec/redoubt/api"
	"github.com/redoubtsec/redoubt/api/agent"
	"github.com/redoubtsec/redoubt/audit"
	"github.com/redoubtsec/redoubt/fleet"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/identity/ca"
	"github.com/redoubtsec/redoubt/policy"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
	"github.com/redoubtsec/redoubt/store/sqlite"
)

// Server is the control plane: authority, policy, registry of machines, audit log, management API, agent API.
type Server struct {
	cfg       Config
	telemetry *Telemetry
	log       *slog.Logger

	lock     *sqlite.Lock
	store    *sqlite.Store
	ca       *ca.Authority
	audit    *audit.Log
	registry *set.Registry
	fleet    *fleet.Fleet
	cert     *serverCertificate
	api      http.Handler
	agents   *agent.Server

	apiListener, agentListener, metricsListener net.Listener
	operator                                    Operator
	draining                                    chan struct{} // closed when Run begins to end
}

// actingNamespaces are those in which a point of this build asks and acts; of the others `apply` says "not done yet".
var actingNamespaces = []string{policy.Access}

// DatabaseFile is the server's state within its data directory.
const DatabaseFile = "redoubt.db"

// AuditDir is the audit log within the server's data directory.
const AuditDir = "audit"

// NewServer opens everything that a server is made of, and its listeners. It starts nothing: Run does. Errors are refusals
// wherever an operator can do something about them.
func NewServer(ctx context.Context, cfg Config, t *Telemetry) (_ *Server, err error) {
	s := &Server{cfg: cfg, telemetry: t, log: t.Logger, draining: make(chan struct{})}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	td, err := identity.ParseTrustDomain(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	if err := makeDataDir(cfg.Data); err != nil {
		return nil, err
	}
	if s.lock, err = sqlite.LockDir(cfg.Data); err != nil {
		return nil, err
	}
	if s.store, err = sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(cfg.Data, DatabaseFile), Meter: t, Logger: s.log}); err != nil {
		return nil, err
	}
	kek, err := loadKEK(cfg)
	if err != nil {
		return nil, err
	}
	a := cfg.Server.Authority
	if s.ca, err = ca.Open(ctx, ca.Config{
		TrustDomain: td, Store: s.store.Keys(), KEK: kek, ServerID: fleet.ServerID(td), SVIDTTL: a.SVIDTTL, AgentTTL: a.AgentTTL,
		JWTTTL: a.JWTTTL, IssuingTTL: a.IssuingTTL, RootTTL: a.RootTTL, RefreshHint: a.RefreshHint, Meter: t, Logger: s.log,
	}); err != nil {
		return nil, err
	}
	if s.audit, err = audit.Open(ctx, audit.Config{
		Dir: filepath.Join(cfg.Data, AuditDir), Origin: string(td) + "/audit", Outbox: s.store.Outbox(), Meter: t, Logger: s.log,
	}); err != nil {
		return nil, err
	}
	s.store.OnRecord(s.audit.Notify)
	if s.registry, err = set.Open(ctx, set.Config{
		Store: s.store.Editions(), Overrides: s.store.Overrides(), Meter: t, Logger: s.log,
	}); err != nil {
		return nil, err
	}
	if s.fleet, err = fleet.Open(ctx, fleet.Config{
		TrustDomain: td, Store: s.store.Fleet(), Authority: s.ca, Rules: rules{s.registry}, AgentTTL: a.AgentTTL, Meter: t, Logger: s.log,
	}); err != nil {
		return nil, err
	}
	if err := s.doors(ctx, td); err != nil {
		return nil, err
	}
	return s, s.listen(ctx)
}

// doors makes the two APIs.
func (s *Server) doors(ctx context.Context, td identity.TrustDomain) (err error) {
	if s.cert, err = newServerCertificate(ctx, s.ca, fleet.ServerID(td), s.names()); err != nil {
		return err
	}
	credential, hash, err := loadCredential(s.cfg.Data)
	if err != nil {
		return err
	}
	verifier, err := api.NewCredentials(map[string]string{"operator": hash})
	if err != nil {
		return err
	}
	s.operator = Operator{Credential: credential}
	if s.api, err = api.New(api.Config{
		TrustDomain: td, Version: Version(), Operators: verifier, Engine: s.registry, Authority: s.ca, Rotation: s.ca,
		Machines: s.fleet, Tokens: s.fleet, Workloads: s.fleet, Withdrawals: s.fleet, Quarantines: s.fleet, Events: s.fleet,
		PolicySet: s.registry, Editions: s.registry, Overrides: s.registry, Audit: s.audit, Protections: protections{s.fleet},
		Sink: s.fleet, Meter: s.telemetry, Logger: s.log, Drain: s.draining, Enforced: actingNamespaces,
	}); err != nil {
		return err
	}
	s.agents, err = agent.NewServer(agent.ServerConfig{
		TrustDomain: td, Fleet: s.fleet, Bundle: s.ca.Bundle, GetCertificate: s.cert.get, Meter: s.telemetry, Logger: s.log,
	})
	return err
}

// names are what clients call the server by.
func (s *Server) names() []string {
	names := []string{"localhost", "127.0.0.1", "::1"}
	for _, addr := range []string{s.cfg.Server.API, s.cfg.Server.Agents} {
		if host, _, err := net.SplitHostPort(addr); err == nil && host != "" {
			if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() {
				names = append(names, host)
			}
		}
	}
	return append(names, s.cfg.Server.Names...)
}

func (s *Server) listen(ctx context.Context) (err error) {
	if s.apiListener, err = listenTCP(ctx, "server.api", s.cfg.Server.API); err != nil {
		return err
	}
	if s.agentListener, err = listenTCP(ctx, "server.agents", s.cfg.Server.Agents); err != nil {
		return err
	}
	if s.cfg.Server.Metrics != "off" {
		if s.metricsListener, err = listenTCP(ctx, "server.metrics", s.cfg.Server.Metrics); err != nil {
			return err
		}
	}
	s.operator.Server = "https://" + reachable(s.apiListener.Addr())
	s.operator.CA = pemOf(s.ca.Bundle().X509Authorities)
	return s.operator.save(s.cfg.Data)
}

// Ready is what a role says once it answers.
type Ready struct {
	API     string `json:"api,omitempty"`
	Agents  string `json:"agents,omitempty"`
	Metrics string `json:"metrics,omitempty"`
	Data    string `json:"data"`
}

// Ready returns where the server answers.
func (s *Server) Ready() Ready {
	r := Ready{API: s.operator.Server, Agents: reachable(s.agentListener.Addr()), Data: s.cfg.Data}
	if s.metricsListener != nil {
		r.Metrics = "http://" + reachable(s.metricsListener.Addr()) + "/metrics"
	}
	return r
}

// Run serves until ctx ends, then drains: calls in flight are given ten seconds, streams are told to come back.
func (s *Server) Run(ctx context.Context) error {
	defer s.close()
	defer context.AfterFunc(ctx, func() { close(s.draining) })()
	// The doors close first; what they rely on (audit log, store) goes on until they have.
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	engines, engineCtx := errgroup.WithContext(below)
	engines.Go(func() error { return s.ca.Run(engineCtx) })
	engines.Go(func() error { return s.audit.Run(engineCtx) })
	engines.Go(func() error { return s.registry.Run(engineCtx) })
	engines.Go(func() error { return s.fleet.Run(engineCtx) })
	engines.Go(func() error { return s.cert.run(engineCtx, s.log) })

	doors, doorCtx := errgroup.WithContext(ctx)
	doors.Go(func() error { return s.serveAPI(doorCtx) })
	doors.Go(func() error { return s.agents.Serve(doorCtx, s.agentListener) })
	if s.metricsListener != nil {
		doors.Go(func() error { return s.telemetry.serveMetrics(doorCtx, s.metricsListener) })
	}
	doors.Go(func() error {
		select {
		case <-doorCtx.Done():
			return nil
		case <-engineCtx.Done():
			return errors.New("a part of the server stopped") // its own error follows
		}
	})
	err := doors.Wait()
	stop()
	if engineErr := engines.Wait(); engineErr != nil && !errors.Is(engineErr, context.Canceled) {
		return engineErr
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (s *Server) serveAPI(ctx context.Context) error {
	server := &http.Server{
		Handler: s.telemetry.Trace(s.api), ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, CurvePreferences: curves, GetCertificate: s.cert.get, ClientAuth: tls.RequestClientCert,
		},
	}
	api.Bound(server)
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(bye); err != nil {
			_ = server.Close()
		}
	})
	err := server.ServeTLS(s.apiListener, "", "")
	if !stop() {
		<-drained
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *Server) close() {
	for _, l := range []net.Listener{s.apiListener, s.agentListener, s.metricsListener} {
		if l != nil {
			_ = l.Close()
		}
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("the store was not closed cleanly", "error", err)
		}
	}
	if s.lock != nil {
		_ = s.lock.Unlock()
	}
}

// Reload takes what can change while the server runs from a new configuration, and names what cannot.
func (s *Server) Reload(ctx context.Context, next Config) ([]string, error) {
	later := NeedsRestart(s.cfg, next)
	level, err := next.Log.level()
	if err != nil {
		return nil, err
	}
	s.cfg.Server.Names = next.Server.Names
	if err := s.cert.rename(ctx, s.names()); err != nil {
		return nil, err
	}
	s.telemetry.SetLevel(level)
	s.cfg.Log = next.Log
	return later, nil
}

// curves prefers the hybrid post-quantum exchange, and has a classical one for peers that lack it.
var curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519}

func listenTCP(ctx context.Context, key, addr string) (net.Listener, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // Go's default; sockmap and sk_lookup do not know it
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, &refusal.Error{
			Kind: refusal.Unavailable, Code: "listen", What: "listen on " + addr + " (" + key + ")", Why: err.Error(),
			Do: "free the port, or set " + key + " to another", Err: err,
		}
	}
	return l, nil
}

// reachable is an address to connect to: a listener on every address is reached on loopback.
func reachable(a net.Addr) string {
	host, port, err := net.SplitHostPort(a.String())
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("localhost", port)
	}
	return a.String()
}
