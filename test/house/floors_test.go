package house_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/redoubtsec/redoubt"

// floors is docs/ARCHITECTURE.md's table: a room may import rooms of lower floors only. Words have an order of their own.
var floors = map[string]int{
	"refusal": 1, "identity": 2, "policy": 3, "event": 4,
	"identity/ca": 10, "policy/eval": 10, "audit": 10,
	"policy/set": 20, "fleet": 20,
	"store/sqlite": 30, "store/backup": 30, "event/spool": 30, "identity/workload": 30, "machine": 30, "api/client": 30,
	"api": 40, "api/agent": 40, "api/local": 40, "identity/attest": 40, "sandbox": 40, "sensor": 40,
	"":            50,
	"cmd/redoubt": 60,
}

// heavy says in which rooms (by production code) a heavy dependency may appear; "" is the roof.
var heavy = map[string][]string{
	"database/sql":                         {"store/sqlite"},
	"modernc.org/sqlite":                   {"store/sqlite"},
	"github.com/pressly/goose":             {"store/sqlite"},
	"github.com/cilium/ebpf":               {"sensor"},
	"github.com/transparency-dev":          {"audit"},
	"filippo.io/torchwood":                 {"audit"},
	"filippo.io/age":                       {"store/backup"},
	"github.com/cedar-policy":              {"policy/eval"},
	"google.golang.org/grpc":               {"api/agent", "identity/workload"},
	"github.com/danielgtaylor/huma":        {"api"},
	"go.yaml.in/yaml":                      {"policy/set", ""},
	"github.com/spf13/cobra":               {"cmd/redoubt"},
	"github.com/prometheus/client_golang":  {""},
	"go.opentelemetry.io":                  {""},
	"github.com/go-jose":                   {"identity", "identity/ca", "identity/workload"},
	"github.com/spiffe/go-spiffe":          {}, // tests only: an independent check
	"github.com/rogpeppe/go-internal":      {},
	"github.com/google/go-cmp":             {},
	"k8s.io/klog":                          {"audit"},
	"golang.org/x/mod/sumdb":               {"audit"},
	"google.golang.org/protobuf/types/any": {"api/agent"},
}

// room is a package of the house: the directory, and its production imports.
type room struct {
	name    string
	imports map[string]string // import path → file
	doc     bool
	pkg     string
}

func rooms(t *testing.T) map[string]*room {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*room{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() {
			if strings.HasPrefix(d.Name(), ".") && rel != "." || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		dir := filepath.ToSlash(filepath.Dir(rel))
		if dir == "." {
			dir = ""
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		r := found[dir]
		if r == nil {
			r = &room{name: dir, imports: map[string]string{}, pkg: file.Name.Name}
			found[dir] = r
		}
		r.doc = r.doc || hasDoc(file)
		for _, spec := range file.Imports {
			p, _ := strconv.Unquote(spec.Path.Value)
			r.imports[p] = rel
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 10 {
		t.Fatalf("found only %d packages below %s: the walk is broken", len(found), root)
	}
	return found
}

func hasDoc(f *ast.File) bool {
	return f.Doc != nil && strings.HasPrefix(strings.TrimSpace(f.Doc.Text()), "Package ") || f.Doc != nil && f.Name.Name == "main"
}

// isTestRoom reports whether a directory serves tests only: fakes of a room, conformance suites, whole-house tests.
func isTestRoom(dir string) bool {
	return strings.HasPrefix(dir, "test/") || strings.HasPrefix(dir, "examples/") ||
		slices.Contains([]string{"api/apitest", "fleet/fleettest", "policy/set/settest", "identity/ca/catest"}, dir)
}

// home is the room that a package belongs to: generated code lives in a `gen` directory of its room.
func home(dir string) string { return strings.TrimSuffix(strings.TrimSuffix(dir, "/gen"), "/agentpb") }

func TestEveryImportGoesDown(t *testing.T) {
	for dir, r := range rooms(t) {
		if isTestRoom(dir) {
			continue
		}
		mine, known := floors[home(dir)]
		if !known {
			t.Errorf("%s is on no floor: add it to docs/ARCHITECTURE.md and to floors", dir)
			continue
		}
		for path, file := range r.imports {
			target, ok := strings.CutPrefix(path, module)
			if !ok {
				continue
			}
			target = strings.TrimPrefix(target, "/")
			if isTestRoom(target) {
				t.Errorf("%s imports the test room %s", file, target)
				continue
			}
			if home(target) == home(dir) {
				continue // a room's own generated code
			}
			if theirs, ok := floors[home(target)]; !ok || theirs >= mine {
				t.Errorf("%s (floor %d) imports %s (floor %d): down only, never sideways or up", file, mine, target, theirs)
			}
		}
	}
}

func TestHeavyDependenciesStayInTheirRoom(t *testing.T) {
	for dir, r := range rooms(t) {
		if isTestRoom(dir) {
			continue
		}
		for path, file := range r.imports {
			for prefix, homes := range heavy {
				if (path == prefix || strings.HasPrefix(path, prefix+"/")) && !slices.Contains(homes, home(dir)) {
					t.Errorf("%s imports %s, which lives in %q only", file, path, homes)
				}
			}
		}
	}
}

func TestEveryRoomHasADocAndAnHonestName(t *testing.T) {
	banned := []string{"util", "utils", "common", "helper", "helpers", "misc", "base", "core", "types", "models", "manager", "impl"}
	for dir, r := range rooms(t) {
		if !r.doc && home(dir) == dir {
			t.Errorf("package in %q has no package comment that begins with \"Package\"", dir)
		}
		if slices.Contains(banned, filepath.Base(dir)) || slices.Contains(banned, r.pkg) {
			t.Errorf("package %q in %q: that name says nothing", r.pkg, dir)
		}
	}
}

func TestArchitectureNamesEveryRoom(t *testing.T) {
	plan, err := os.ReadFile("../../docs/ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range floors {
		if name != "" && !strings.Contains(string(plan), "`"+name+"`") {
			t.Errorf("docs/ARCHITECTURE.md does not name the room %s", name)
		}
	}
	if words := len(strings.Fields(string(plan))); words > 1300 {
		t.Errorf("docs/ARCHITECTURE.md has %d words: it stays within two pages", words)
	}
}
