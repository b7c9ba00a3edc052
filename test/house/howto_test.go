package house_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// verb is a command of the command line, as its page in docs/cli describes it.
type verb struct {
	flags map[string]bool // by how they are written, "--json" or "-f"; true if they take a value
	leaf  bool            // it has no verbs below it
}

// flagLine is a flag in a page of docs/cli: shorthand, name, and the type of its value if it takes one.
var flagLine = regexp.MustCompile(`^\s+(?:(-\w), )?(--[\w-]+)(?: (\w+))?(?:\s{2,}|$)`)

// verbs reads docs/cli, by the words of the command: "redoubt policy check".
func verbs(t *testing.T) map[string]verb {
	t.Helper()
	pages, err := filepath.Glob("../../docs/cli/redoubt*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("docs/cli: %d pages, %v", len(pages), err)
	}
	out := map[string]verb{}
	for _, page := range pages {
		raw, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		v := verb{flags: map[string]bool{}, leaf: true}
		for line := range strings.Lines(string(raw)) {
			if m := flagLine.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
				v.flags[m[2]] = m[3] != ""
				if m[1] != "" {
					v.flags[m[1]] = m[3] != ""
				}
			}
		}
		name := strings.TrimSuffix(filepath.Base(page), ".md")
		out[strings.ReplaceAll(name, "_", " ")] = v
	}
	for name := range out {
		if parent := name[:max(0, strings.LastIndex(name, " "))]; parent != "" {
			v := out[parent]
			v.leaf = false
			out[parent] = v
		}
	}
	return out
}

// commands returns the redoubt commands of a line: of pipelines and lists each, and those within $(…) and quotes.
func commands(line string) [][]string {
	var out [][]string
	for _, part := range regexp.MustCompile(`[|;&]+|\$\(|['"]`).Split(line, -1) {
		words := strings.Fields(part)
		for i, w := range words {
			if w != "redoubt" {
				continue
			}
			end := len(words)
			if j := slices.Index(words[i+1:], "redoubt"); j >= 0 { // redoubt run … -- redoubt identity fetch
				end = i + 1 + j
			}
			if args := words[i+1 : end]; len(args) > 0 {
				out = append(out, args)
			}
		}
	}
	return out
}

// complaint says what is wrong with the words after redoubt, or "".
func complaint(all map[string]verb, args []string) string {
	name := "redoubt"
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		if _, ok := all[name+" "+args[0]]; !ok {
			break
		}
		name, args = name+" "+args[0], args[1:]
	}
	v := all[name]
	if name == "redoubt" || !v.leaf && len(args) > 0 && !strings.HasPrefix(args[0], "-") && name != "redoubt demo" {
		return "there is no such verb below " + name
	}
	for i := 0; i < len(args); i++ {
		a := strings.Trim(args[i], "`.,:)")
		if a == "--" {
			break // what follows is the workload's
		}
		if !strings.HasPrefix(a, "-") || a == "-" {
			continue
		}
		flag, _, joined := strings.Cut(a, "=")
		value, ok := v.flags[flag]
		if !ok {
			return name + " has no flag " + flag
		}
		if value && !joined {
			i++
		}
	}
	return ""
}

// docs/howto-*.md and README.md show commands that exist: in console blocks after "$ ", and in text between backquotes.
func TestDocumentedCommandsExist(t *testing.T) {
	all := verbs(t)
	files, err := filepath.Glob("../../docs/howto-*.md")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d howtos, %v", len(files), err)
	}
	quoted := regexp.MustCompile("`(redoubt [^`]+)`")
	seen := 0
	for _, file := range append(files, "../../README.md") {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		block := "" // the language of the block we are in
		for n, line := range strings.Split(string(raw), "\n") {
			var shown []string
			switch fence, is := strings.CutPrefix(line, "```"); {
			case is && block == "":
				block = fence + " " // not empty, even of a block without language
				continue
			case is:
				block = ""
				continue
			case block == "":
				for _, m := range quoted.FindAllStringSubmatch(line, -1) {
					shown = append(shown, m[1])
				}
			case block == "console ":
				if command, ok := strings.CutPrefix(line, "$ "); ok {
					shown = append(shown, command)
				}
			}
			for _, s := range shown {
				for _, args := range commands(s) {
					seen++
					if why := complaint(all, args); why != "" {
						t.Errorf("%s:%d: redoubt %s: %s", filepath.Base(file), n+1, strings.Join(args, " "), why)
					}
				}
			}
		}
	}
	if seen < 80 {
		t.Errorf("only %d commands were found; does the test still read them?", seen)
	}
}

// The check finds what is wrong, so that its silence means something.
func TestUndocumentedCommandsAreFound(t *testing.T) {
	all := verbs(t)
	for line, wrong := range map[string]bool{
		"redoubt get workloads --json":                                  false,
		"redoubt run --service web -- redoubt identity fetch":           false,
		"redoubt run --service web -- ls --frob":                        false,
		"redoubt run --service web -- redoubt identity fetch --frob":    true,
		"redoubt release --reason drill && redoubt release --resume":    false,
		"redoubt release --reason drill && redoubt release --again":     true,
		"redoubt apply -f DIR --confirm-within 5m":                      false,
		"redoubt apply -g DIR":                                          true,
		"redoubt frob":                                                  true,
		"redoubt token list":                                            true,
		"redoubt why --local":                                           true,
		"sh -c 'd=$(mktemp -d) && redoubt identity fetch --write $d'":   false,
		"sh -c 'd=$(mktemp -d) && redoubt identity fetch --writes $d'":  true,
		`redoubt audit verify --key "$(cat key)" --since checkpoint`:    false,
		"redoubt enroll $(pidof -s legacy) --service legacy --label x":  false,
		"redoubt enroll $(redoubt frob) --service legacy --label tier=": true,
	} {
		found := false
		for _, args := range commands(line) {
			found = found || complaint(all, args) != ""
		}
		if found != wrong {
			t.Errorf("%s: found wrong %t, want %t", line, found, wrong)
		}
	}
}
