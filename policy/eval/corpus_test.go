package eval_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/redoubtsec/redoubt/policy/eval"
)

// corpusCase is one case of Cedar's published corpus (cedar-policy/cedar-integration-tests), which cedar-go ships.
type corpusCase struct {
	Policies string `json:"policies"`
	Entities string `json:"entities"`
	Schema   string `json:"schema"`
	Requests []struct {
		Principal json.RawMessage `json:"principal"`
		Action    json.RawMessage `json:"action"`
		Resource  json.RawMessage `json:"resource"`
		Context   json.RawMessage `json:"context"`
		Decision  string          `json:"decision"`
		Reason    []string        `json:"reason"`
		Errors    []string        `json:"errors"`
	} `json:"requests"`
}

type outcome struct {
	Decision string   `json:"decision"`
	Reason   []string `json:"reason"`
	Errors   []string `json:"errors"`
}

// corpus reads the archive from cedar-go's module directory.
func corpus(t *testing.T) map[string][]byte {
	t.Helper()
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cedar-policy/cedar-go").Output()
	if err != nil {
		t.Skip("the go command does not say where cedar-go is: ", err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(dir)), "corpus-tests.tar.gz"))
	if err != nil {
		t.Skip("cedar-go's module directory holds no corpus: ", err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCedarCorpusAnswersAsPublished(t *testing.T) {
	t.Parallel()
	files := corpus(t)
	var names []string
	for name := range files {
		if strings.HasSuffix(name, ".json") && !strings.HasSuffix(name, ".entities.json") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	if racing { // a tenth will do to find races
		names = names[:len(names)/10]
	}
	var requests atomic.Int64
	work := make(chan string)
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			for name := range work {
				requests.Add(int64(corpusOne(t, files, name)))
			}
		})
	}
	for _, name := range names {
		work <- name
	}
	close(work)
	wait.Wait()
	t.Logf("%d requests of %d cases", requests.Load(), len(names))
	if requests.Load() < 60_000 && !racing {
		t.Errorf("the corpus holds only %d requests; is it whole?", requests.Load())
	}
}

func corpusOne(t *testing.T, files map[string][]byte, name string) int {
	t.Helper()
	var c corpusCase
	if err := json.Unmarshal(files[name], &c); err != nil {
		t.Errorf("%s: %v", name, err)
		return 0
	}
	var in, indexed, linear bytes.Buffer
	var want []outcome
	for _, r := range c.Requests {
		line, err := json.Marshal(map[string]json.RawMessage{
			"principal": r.Principal, "action": r.Action, "resource": r.Resource, "context": r.Context,
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return 0
		}
		in.Write(append(line, '\n'))
		want = append(want, outcome{r.Decision, r.Reason, r.Errors})
	}
	policies := []eval.File{{Name: "corpus.cedar", Text: files[c.Policies]}}
	err := eval.Evaluate(&indexed, files[c.Schema], policies, bytes.NewReader(files[c.Entities]), bytes.NewReader(in.Bytes()))
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return 0
	}
	err = eval.EvaluateLinear(&linear, files[c.Schema], policies, bytes.NewReader(files[c.Entities]), bytes.NewReader(in.Bytes()))
	if err != nil || !bytes.Equal(indexed.Bytes(), linear.Bytes()) {
		t.Errorf("%s: with the index and without it the answers differ (%v):\n%s\n%s", name, err, indexed.Bytes(), linear.Bytes())
	}
	var got []outcome
	for d := json.NewDecoder(&indexed); d.More(); {
		var o outcome
		if err := d.Decode(&o); err != nil {
			t.Errorf("%s: %v", name, err)
			return 0
		}
		got = append(got, o)
	}
	for i := range want { // the corpus has no order among policies
		slices.Sort(want[i].Reason)
		slices.Sort(want[i].Errors)
	}
	for i := range got {
		slices.Sort(got[i].Reason)
		slices.Sort(got[i].Errors)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: -published +ours\n%s", name, diff)
	}
	return len(got)
}
