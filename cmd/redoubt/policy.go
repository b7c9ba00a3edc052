package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/redoubtsec/redoubt/policy/eval"
	"github.com/redoubtsec/redoubt/policy/set"
	"github.com/redoubtsec/redoubt/refusal"
)

// maxSetFiles bounds what is read from a directory before the server's own bounds are met.
const maxSetFiles = 4096

// readSet reads what `apply -f` names: a directory with all below it, or one file. Policy tests are told apart; files of
// other kinds are left out and named, so that a misspelt ending is seen.
func readSet(path string) (files, tests []set.File, left []string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, nil, &refusal.Error{
			Kind: refusal.Invalid, Code: "no-files", What: "read " + path, Why: err.Error(), Do: "name a directory or file with -f", Err: err,
		}
	}
	root := path
	if !info.IsDir() {
		root = filepath.Dir(path)
	}
	err = filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if strings.HasPrefix(d.Name(), ".") && name != path {
				return filepath.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if !slices.Contains([]string{".cedar", ".yaml", ".yml"}, filepath.Ext(rel)) {
			left = append(left, rel)
			return nil
		}
		if len(files)+len(tests) >= maxSetFiles {
			return fmt.Errorf("%s holds more than %d files", path, maxSetFiles)
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f := set.File{Name: rel, Content: string(raw)}
		if set.IsTestFile(rel) {
			tests = append(tests, f)
		} else {
			files = append(files, f)
		}
		return nil
	})
	return files, tests, left, err
}

func (c *cli) policyVerb() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Check, try and test policies without a server"}
	cmd.AddCommand(c.policyCheck(), c.policyTest(), c.policyEval(), c.policySchema())
	return cmd
}

// checked is what `policy check` answers.
type checked struct {
	Valid    bool           `json:"valid"`
	Files    int            `json:"files"`
	Policies int            `json:"policies"`
	Digest   string         `json:"digest,omitempty"`
	Problems []problem      `json:"problems"`
	Notices  []set.Notice   `json:"notices"`
	LeftOut  []string       `json:"left_out,omitempty"`
	Rules    []string       `json:"issuance_rules"`
	Modes    []string       `json:"modes"`
	Kinds    map[string]int `json:"documents"`
}

type problem struct {
	Code string `json:"code"`
	What string `json:"what"`
	Why  string `json:"why"`
	Do   string `json:"do,omitempty"`
}

func (c *cli) policyCheck() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "check -f DIR",
		Short: "Validate policies and documents as apply would, naming every defect",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			files, _, left, err := readSet(dir)
			if err != nil {
				return err
			}
			got := checked{Files: len(files), Problems: []problem{}, Notices: []set.Notice{}, LeftOut: left, Rules: []string{}, Modes: []string{}, Kinds: map[string]int{}}
			s, err := set.Parse(files)
			var problems set.Problems
			switch {
			case errors.As(err, &problems):
				for _, p := range problems {
					got.Problems = append(got.Problems, problem{p.Code, p.What, p.Why, p.Do})
				}
			case err != nil:
				return err
			default:
				got.Valid, got.Digest, got.Policies = true, s.Digest(), len(s.Policies())
				got.Notices = append(got.Notices, set.Unenforced(s)...)
				for _, r := range s.Rules() {
					got.Rules = append(got.Rules, r.Name)
				}
				for _, m := range s.Modes() {
					got.Modes = append(got.Modes, m.Name)
				}
				got.Kinds = map[string]int{
					"Service": len(s.Services()), "Address": len(s.Addresses()), "Mode": len(s.Modes()), "Route": len(s.Routes()),
					"Issuer": len(s.Issuers()), "Response": len(s.Responses()),
				}
			}
			if err := c.show(got, got.print); err != nil {
				return err
			}
			if !got.Valid {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
	filesFlag(cmd, &dir)
	return cmd
}

func (k checked) print(w io.Writer) {
	for _, p := range k.Problems {
		_, _ = fmt.Fprintf(w, "%s: %s; %s\n", printable(p.What), printable(p.Why), printable(p.Do))
	}
	for _, n := range k.Notices {
		_, _ = fmt.Fprintln(w, printable(n.String()))
	}
	for _, l := range k.LeftOut {
		_, _ = fmt.Fprintf(w, "left out: %s (not .cedar, .yaml or .yml)\n", printable(l))
	}
	if k.Valid {
		_, _ = fmt.Fprintf(w, "valid: %d files, %d policies (the built-in ones included), digest %s\n", k.Files, k.Policies, k.Digest)
	}
}

func filesFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVarP(dir, "file", "f", "", "directory, or one file, with *.cedar and *.yaml (required)")
	_ = cmd.MarkFlagRequired("file")
}

func (c *cli) policyTest() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "test -f DIR",
		Short: "Run the *_test.yaml files of a directory against its policies",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			files, tests, _, err := readSet(dir)
			if err != nil {
				return err
			}
			if len(tests) == 0 {
				return &refusal.Error{
					Kind: refusal.Invalid, Code: "no-tests", What: "policy tests in " + dir, Why: "no file there is named *_test.yaml",
					Do: "write one (docs/howto-policies.md), or use redoubt policy check",
				}
			}
			s, err := set.Parse(files)
			if err != nil {
				return err
			}
			results, err := set.RunTests(cmd.Context(), s, tests)
			if err != nil {
				return err
			}
			passed := 0
			for _, r := range results {
				if r.Passed {
					passed++
				}
			}
			if err := c.show(results, func(w io.Writer) {
				for _, r := range results {
					if !r.Passed {
						_, _ = fmt.Fprintf(w, "FAIL %s:%d %s: %s\n", printable(r.File), r.Line, printable(r.Name), printable(r.Why))
					}
				}
				_, _ = fmt.Fprintf(w, "%d passed, %d failed\n", passed, len(results)-passed)
			}); err != nil {
				return err
			}
			if passed != len(results) {
				return exitStatus(exitFailed)
			}
			return nil
		},
	}
	filesFlag(cmd, &dir)
	return cmd
}

func (c *cli) policyEval() *cobra.Command {
	var schema, entities, requests string
	var policies []string
	cmd := &cobra.Command{
		Use:   "eval --policies FILE --entities FILE --requests FILE [--schema FILE]",
		Short: "Answer requests in Cedar's own JSON formats, one line each",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			var files []eval.File
			for _, name := range policies {
				raw, err := os.ReadFile(name)
				if err != nil {
					return err
				}
				files = append(files, eval.File{Name: filepath.Base(name), Text: raw})
			}
			var schemaText []byte
			if schema != "" {
				var err error
				if schemaText, err = os.ReadFile(schema); err != nil {
					return err
				}
			}
			e, err := os.Open(entities)
			if err != nil {
				return err
			}
			defer func() { _ = e.Close() }()
			r := c.in
			if requests != "-" {
				f, err := os.Open(requests)
				if err != nil {
					return err
				}
				defer func() { _ = f.Close() }()
				r = f
			}
			return eval.Evaluate(c.out, schemaText, files, e, r)
		},
	}
	cmd.Flags().StringVar(&schema, "schema", "", "Cedar schema to read entities by")
	cmd.Flags().StringArrayVar(&policies, "policies", nil, "file of Cedar policies; may be repeated (required)")
	cmd.Flags().StringVar(&entities, "entities", "", "file of entities, a JSON array (required)")
	cmd.Flags().StringVar(&requests, "requests", "", "file of requests, one JSON object a line, or - (required)")
	for _, f := range []string{"policies", "entities", "requests"} {
		_ = cmd.MarkFlagRequired(f)
	}
	return cmd
}

func (c *cli) policySchema() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the published Cedar schema: everything a policy may speak of",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := c.out.Write(eval.Schema())
			return err
		},
	}
}
