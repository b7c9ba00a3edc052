package redoubt_test

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/redoubtsec/redoubt"
)

func TestAnUnknownKeyRefusesAndNamesItself(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "server:\n  apy: 127.0.0.1:1\n", "line 2: field apy not found"},
		{"wrong type", "server:\n  authority:\n    svid_ttl: hunter2-secret\n", "line 3"},
		{"two documents", "log: {level: info}\n---\nlog: {level: info}\n", "more than one document"},
		{"no YAML", "server: [", "line 1"},
		{"trust domain", "trust_domain: Not/Good\n", "trust_domain"},
		{"level", "log: {level: loud}\n", "log.level"},
		{"OTLP in the clear", "telemetry: {otlp: 'http://collector.example:4318'}\n", "loopback only"},
		{"OTLP password", "telemetry: {otlp: 'https://u:hunter2-secret@c.example'}\n", "password"},
		{"probe interval", "agent: {probe_interval: 10ms}\n", "below 1s"},
		{"cgroups", "agent: {machine: {cgroups: a/../b}}\n", "agent.machine.cgroups"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := redoubt.ParseConfig("x.yaml", []byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want it to say %q", err, c.want)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the refusal repeats a value: %v", err)
			}
		})
	}
}

func TestTheZeroConfigWorks(t *testing.T) {
	c, err := redoubt.ParseConfig("empty", nil)
	if err != nil || c.TrustDomain == "" || c.Server.API == "" || c.Agent.ProbeInterval == 0 {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestReloadNamesWhatNeedsARestart(t *testing.T) {
	old, _ := redoubt.ParseConfig("a", nil)
	next, err := redoubt.ParseConfig("b", []byte("log: {level: debug}\nserver: {names: [a.example], api: '127.0.0.1:1', authority: {svid_ttl: 2h}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	got := redoubt.NeedsRestart(old, next)
	if !slices.Equal(got, []string{"server.api", "server.authority.svid_ttl"}) {
		t.Errorf("got %v", got)
	}
}

// Every key is documented, and every documented key exists.
func TestEveryKeyIsInTheDocumentation(t *testing.T) {
	page, err := os.ReadFile("docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	var walk func(prefix string, v reflect.Type)
	walk = func(prefix string, v reflect.Type) {
		for f := range v.Fields() {
			key := prefix + f.Tag.Get("yaml")
			if f.Type.Kind() == reflect.Struct {
				walk(key+".", f.Type)
			} else {
				keys = append(keys, key)
			}
		}
	}
	walk("", reflect.TypeFor[redoubt.Config]())
	for _, k := range keys {
		if !strings.Contains(string(page), "| `"+k+"` |") {
			t.Errorf("docs/configuration.md does not explain %s", k)
		}
	}
	if rows := strings.Count(string(page), "\n| `"); rows != len(keys) {
		t.Errorf("docs/configuration.md explains %d keys, there are %d", rows, len(keys))
	}
}

// Every configuration that the repository ships parses.
func TestShippedConfigurationsParse(t *testing.T) {
	files, err := filepath.Glob("examples/config/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if _, err := redoubt.LoadConfig(f); err != nil {
			t.Error(err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("trust_domain: example.org\nserver: {api: '127.0.0.1:1'}\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		_, _ = redoubt.ParseConfig("fuzz", data)
	})
}
