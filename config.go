package redoubt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// Config is the one file of a role. Its zero value, with a data directory, works. An unknown key refuses to start.
type Config struct {
	// TrustDomain names the domain in every SPIFFE ID. Format: lower-case letters, digits, dots, hyphens, underscores.
	// Default: "redoubt.local". It is fixed when the server first starts; another value later refuses to start.
	TrustDomain string `yaml:"trust_domain"`
	// Data is the role's data directory, 0700. Default: /var/lib/redoubt/<role>, or --data.
	Data string `yaml:"data"`
	// Log is what the role says on standard error.
	Log LogConfig `yaml:"log"`
	// Telemetry is where traces and logs are sent beside.
	Telemetry TelemetryConfig `yaml:"telemetry"`
	Server    ServerConfig    `yaml:"server"`
	Agent     AgentConfig     `yaml:"agent"`
}

// LogConfig is reloadable (SIGHUP).
type LogConfig struct {
	// Level is debug, info, warn or error. Default: info.
	Level string `yaml:"level"`
}

// TelemetryConfig says where OpenTelemetry data goes.
type TelemetryConfig struct {
	// OTLP is the base URL of an OTLP/HTTP collector ("http://127.0.0.1:4318"). Default: none; nothing is sent. Plain http
	// is accepted for loopback only, since spans name identities.
	OTLP string `yaml:"otlp"`
}

// ServerConfig is the control plane.
type ServerConfig struct {
	// API is the host:port of the management API, TLS 1.3. Default: 127.0.0.1:8440.
	API string `yaml:"api"`
	// Agents is the host:port of the agent API, TLS 1.3. Default: 127.0.0.1:8441.
	Agents string `yaml:"agents"`
	// Metrics is the host:port of /metrics, plain HTTP. Default: 127.0.0.1:8442; "off" serves none.
	Metrics string `yaml:"metrics"`
	// Names are further DNS names and IP addresses in the server's certificate, beside localhost and those of API and
	// Agents. Wrong ones make clients refuse the server. Reloadable.
	Names     []string        `yaml:"names"`
	Authority AuthorityConfig `yaml:"authority"`
}

// AuthorityConfig are the lifetimes and the sealing of the authority. A lifetime too short for those below it refuses to
// start. Format: Go durations ("1h30m").
type AuthorityConfig struct {
	// SVIDTTL is the life of a workload's X.509-SVID. Default: 1h.
	SVIDTTL time.Duration `yaml:"svid_ttl"`
	// AgentTTL is the life of an agent's own SVID. Default: 24h.
	AgentTTL time.Duration `yaml:"agent_ttl"`
	// JWTTTL is the life of a JWT-SVID. Default: 5m.
	JWTTTL time.Duration `yaml:"jwt_ttl"`
	// IssuingTTL is the life of the issuing key. Default: 720h.
	IssuingTTL time.Duration `yaml:"issuing_ttl"`
	// RootTTL is the life of the trust domain's root. Default: 87600h.
	RootTTL time.Duration `yaml:"root_ttl"`
	// RefreshHint is how often relying parties are told to fetch the bundle, and so the least wait between publishing a JWT key
	// and signing with it. Default: 5m; at least 1s. Too short a one lets tokens arrive before the key that proves them.
	RefreshHint time.Duration `yaml:"refresh_hint"`
	// KEKFile holds the key that seals the authority's keys: 32 bytes, raw or 64 hex digits. Default: <data>/kek, made at the
	// first start. A file elsewhere (a mounted secret) keeps it out of copies of the data directory. Losing it loses the authority.
	KEKFile string `yaml:"kek_file"`
}

// AgentConfig is the part on every machine.
type AgentConfig struct {
	// Server is the host:port of the server's agent API. Default: 127.0.0.1:8441.
	Server string `yaml:"server"`
	// Socket is the path of the Workload API. Default: /run/redoubt/<hash of data>/workload.sock, or <data>/workload.sock if
	// not root. At most 107 bytes, in directories that workloads may pass.
	Socket string `yaml:"socket"`
	// Metrics is the host:port of /metrics, plain HTTP. Default: 127.0.0.1:8443; "off" serves none.
	Metrics string        `yaml:"metrics"`
	Machine MachineConfig `yaml:"machine"`
	// ProbeInterval is how often protections are proved again. Default: 5m; at least 1s.
	ProbeInterval time.Duration `yaml:"probe_interval"`
}

// MachineConfig bounds what the agent looks at.
type MachineConfig struct {
	// Cgroups is the cgroup below which everything this agent sees and makes lies. Default: "/", the whole machine.
	Cgroups string `yaml:"cgroups"`
}

// ParseConfig reads a configuration strictly. Errors: a refusal that names the line and key, never the value.
func ParseConfig(name string, data []byte) (Config, error) {
	var c Config
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, badConfig(name, yamlReason(err))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return Config{}, badConfig(name, "there is more than one document in it")
	}
	if err := c.fill(); err != nil {
		return Config{}, badConfig(name, err.Error())
	}
	return c, nil
}

// LoadConfig reads a file, or the defaults when name is empty.
func LoadConfig(name string) (Config, error) {
	if name == "" {
		return ParseConfig("the defaults", nil)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		return Config{}, badConfig(name, err.Error())
	}
	return ParseConfig(name, raw)
}

func badConfig(name, why string) error {
	return &refusal.Error{
		Kind: refusal.Invalid, Code: "bad-config", What: "configuration " + name, Why: why,
		Do: "correct it; docs/configuration.md lists every key",
	}
}

// yamlReason keeps line and key of a YAML error and drops the value, which may be a secret.
func yamlReason(err error) string {
	var te *yaml.TypeError
	if !errors.As(err, &te) {
		return strings.TrimPrefix(err.Error(), "yaml: ")
	}
	reasons := make([]string, len(te.Errors))
	for i, e := range te.Errors {
		before, after, ok := strings.Cut(e, "cannot unmarshal ")
		if !ok {
			reasons[i] = strings.ReplaceAll(e, " in type redoubt.", " in ")
			continue
		}
		_, kind, _ := strings.Cut(after, " into ")
		reasons[i] = before + "a value is not a " + strings.TrimPrefix(kind, "redoubt.")
	}
	return strings.Join(reasons, "; ")
}

func (c *Config) fill() error {
	setDefault(&c.TrustDomain, "redoubt.local")
	if _, err := identity.ParseTrustDomain(c.TrustDomain); err != nil {
		return fmt.Errorf("trust_domain: %w", err)
	}
	setDefault(&c.Log.Level, "info")
	if _, err := c.Log.level(); err != nil {
		return err
	}
	setDefault(&c.Server.API, "127.0.0.1:8440")
	setDefault(&c.Server.Agents, "127.0.0.1:8441")
	setDefault(&c.Server.Metrics, "127.0.0.1:8442")
	setDefault(&c.Agent.Server, "127.0.0.1:8441")
	setDefault(&c.Agent.Metrics, "127.0.0.1:8443")
	setDefault(&c.Agent.Machine.Cgroups, "/")
	if c.Agent.ProbeInterval == 0 {
		c.Agent.ProbeInterval = 5 * time.Minute
	}
	if c.Agent.ProbeInterval < time.Second {
		return errors.New("agent.probe_interval: it is below 1s")
	}
	if p := c.Agent.Machine.Cgroups; !strings.HasPrefix(p, "/") || filepath.Clean(p) != p {
		return errors.New("agent.machine.cgroups: a cgroup path begins with a slash and has no dots or trailing slash")
	}
	return c.checkOTLP()
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

func (l LogConfig) level() (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return 0, errors.New("log.level: it is not debug, info, warn or error")
	}
	return level, nil
}

// NeedsRestart names the keys in which two configurations differ and that a reload cannot change.
func NeedsRestart(old, next Config) []string {
	old.Log, next.Log = LogConfig{}, LogConfig{}
	old.Server.Names, next.Server.Names = nil, nil
	var keys []string
	differ("", reflect.ValueOf(old), reflect.ValueOf(next), &keys)
	return keys
}

func differ(prefix string, a, b reflect.Value, keys *[]string) {
	if a.Kind() != reflect.Struct {
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			*keys = append(*keys, strings.TrimPrefix(prefix, "."))
		}
		return
	}
	for i := range a.NumField() {
		differ(prefix+"."+a.Type().Field(i).Tag.Get("yaml"), a.Field(i), b.Field(i), keys)
	}
}
