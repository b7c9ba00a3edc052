package set

import (
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/redoubtsec/redoubt/refusal"
)

// This file reads YAML strictly: one document at a time into nodes, never into values, so that aliases cannot grow and
// every problem has a line. A reader collects problems and goes on, so that all are told at once.

// The bounds of YAML files.
const (
	maxDepth = 32     // of nesting in one document, the document itself being 1
	maxNodes = 50_000 // of keys and values in one document
	maxText  = 64 << 10
)

// chunk is the text of one document of a file. Source: YAML 1.2, section 9.1: a line that begins with --- or ... and a
// blank is a marker wherever it stands, so files can be cut before they are parsed.
type chunk struct {
	line int // of its first line, from 1
	text string
}

func chunks(content string) []chunk {
	var out []chunk
	content = strings.TrimPrefix(content, "\ufeff")
	var b strings.Builder
	line, first := 0, 1
	flush := func() {
		if strings.TrimSpace(b.String()) != "" {
			out = append(out, chunk{line: first, text: b.String()})
		}
		b.Reset()
	}
	for text := range strings.SplitAfterSeq(content, "\n") {
		line++
		bare := strings.TrimRight(text, "\r\n")
		switch {
		case bare == "---" || bare == "...":
			flush()
			first = line + 1
		case strings.HasPrefix(bare, "--- ") || strings.HasPrefix(bare, "---\t"):
			flush()
			first = line
			b.WriteString("   " + text[3:])
		default:
			b.WriteString(text)
		}
	}
	flush()
	return out
}

// reader reads one document and collects what is wrong with it.
type reader struct {
	place
	found  *findings
	offset int // added to a node's line
}

func (r *reader) fail(node *yaml.Node, code, path, why, do string) {
	line := r.offset + 1
	if node != nil {
		line = r.offset + node.Line
	}
	r.failLine(line, code, path, why, do)
}

func (r *reader) failLine(line int, code, path, why, do string) {
	r.found.add(r.file, line, &refusal.Error{Kind: refusal.Invalid, Code: code, What: r.what(line, path), Why: why, Do: do})
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?`)

// parse returns the root node of the document, or nil if it has none or is refused.
func (r *reader) parse(text string) *yaml.Node {
	var doc yaml.Node
	decoder := yaml.NewDecoder(strings.NewReader(text))
	err := decoder.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return nil // comments only
	}
	if err != nil {
		r.failSyntax(err)
		return nil
	}
	// YAML knows more line breaks than chunks does (a bare carriage return): what follows must not be lost silently.
	switch err := decoder.Decode(new(yaml.Node)); {
	case err == nil:
		r.failLine(r.offset+1, CodeSyntax, "", "another document follows on the same line", "separate documents by lines of --- that end in a line feed")
		return nil
	case !errors.Is(err, io.EOF):
		r.failSyntax(err)
		return nil
	case doc.Kind != yaml.DocumentNode || len(doc.Content) != 1:
		return nil
	}
	nodes := 0
	if !r.admit(doc.Content[0], 1, &nodes) {
		return nil
	}
	return doc.Content[0]
}

// failSyntax reports what the YAML parser found.
func (r *reader) failSyntax(err error) {
	m := yamlLine.FindStringSubmatch(err.Error())
	line, _ := strconv.Atoi(m[1])
	why := strings.TrimPrefix(err.Error(), m[0])
	if !safeYAMLError.MatchString(why) {
		why = "it is not well-formed" // the message may quote the input
	}
	r.failLine(r.offset+max(line, 1), CodeSyntax, "", "YAML: "+why, "correct the syntax")
}

// safeYAMLError is the form of the scanner's own sentences: no word of them comes from the input.
var safeYAMLError = regexp.MustCompile(`^(did not find|could not find|found|mapping|block|control|invalid|incomplete|exceeded)[A-Za-z0-9 ,.:;()'\[\]{}|<>%&*!?@#+-]*$`)

// admit walks the tree once, before anything reads it, and reports whether it is within bounds and plain: no alias,
// anchor, explicit tag or merge key.
func (r *reader) admit(n *yaml.Node, depth int, nodes *int) bool {
	*nodes++
	switch {
	case depth > maxDepth:
		r.fail(n, CodeBounds, "", fmt.Sprintf("nested more than %d deep", maxDepth), "make the document flatter")
		return false
	case *nodes > maxNodes:
		r.fail(n, CodeBounds, "", fmt.Sprintf("more than %d keys and values in one document", maxNodes), "split the document")
		return false
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		r.fail(n, CodeSyntax, "", "anchors and aliases are not taken", "write the value out where it is needed")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		r.fail(n, CodeSyntax, "", "explicit tags are not taken", "leave the ! tag out")
		return false
	case n.Kind == yaml.ScalarNode && n.Tag == "!!merge":
		r.fail(n, CodeSyntax, "", "merge keys are not taken", "write the keys out")
		return false
	case n.Kind == yaml.ScalarNode && len(n.Value) > maxText:
		r.fail(n, CodeBounds, "", fmt.Sprintf("a value is longer than %d bytes", maxText), "shorten it")
		return false
	}
	for _, c := range n.Content {
		if !r.admit(c, depth+1, nodes) {
			return false
		}
	}
	return true
}

// object is a mapping whose keys were checked: each known, each once.
type object struct {
	r      *reader
	path   string
	node   *yaml.Node
	fields map[string]*yaml.Node
}

// object reads a mapping with exactly these keys allowed; nil if n is none.
func (r *reader) object(n *yaml.Node, path string, allowed ...string) *object {
	o := r.mapping(n, path)
	if o == nil {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if !slices.Contains(allowed, key.Value) {
			do := "use only: " + strings.Join(allowed, ", ")
			if hint, ok := instead[key.Value]; ok {
				do = hint
			}
			r.fail(key, CodeKey, join(path, keyName(key.Value)), "there is no such key here", do)
		}
	}
	return o
}

// instead says what to do where a secret is put in plain, which the sets never take: they are stored and shown.
var instead = map[string]string{
	"client_secret": "put it in a file on the server and give client_secret_file",
	"secret":        "a policy set is stored and shown: put the secret in a file on the server",
	"password":      "a policy set is stored and shown: put the secret in a file on the server",
	"token":         "a policy set is stored and shown: put the secret in a file on the server",
}

// mapping reads a mapping with any keys, each once.
func (r *reader) mapping(n *yaml.Node, path string) *object {
	if n.Kind != yaml.MappingNode {
		r.fail(n, CodeType, path, "it is "+kindOf(n)+", not a mapping", "give key: value pairs")
		return nil
	}
	o := &object{r: r, path: path, node: n, fields: make(map[string]*yaml.Node, len(n.Content)/2)}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Tag != "!!str" {
			r.fail(key, CodeType, path, "a key is "+kindOf(key)+", not text", "quote the key")
			continue
		}
		if _, twice := o.fields[key.Value]; twice {
			r.fail(key, CodeDuplicate, join(path, keyName(key.Value)), "the key is there twice", "leave one of them out")
			continue
		}
		o.fields[key.Value] = value
	}
	return o
}

// keys returns the keys in their order in the file, each once.
func (o *object) keys() []string {
	out := make([]string, 0, len(o.fields))
	for i := 0; i+1 < len(o.node.Content); i += 2 {
		if key := o.node.Content[i].Value; o.fields[key] == o.node.Content[i+1] {
			out = append(out, key)
		}
	}
	return out
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Tag == "!!str":
		return "text"
	case n.Tag == "!!int":
		return "a whole number"
	case n.Tag == "!!float":
		return "a number"
	case n.Tag == "!!bool":
		return "a truth value"
	case n.Tag == "!!null":
		return "empty"
	case n.Tag == "!!timestamp":
		return "a date"
	default:
		return "something else"
	}
}

func (o *object) at(key string) string { return join(o.path, key) }

// bad reports a value of this object.
func (o *object) bad(key, why, do string) {
	n := o.fields[key]
	if n == nil {
		n = o.node
	}
	o.r.fail(n, CodeValue, o.at(key), why, do)
}

func (o *object) has(key string) bool { return o.fields[key] != nil }

// need reports a key that is missing.
func (o *object) need(key, do string) bool {
	if o.has(key) {
		return true
	}
	o.r.fail(o.node, CodeKey, o.at(key), "the key is missing", do)
	return false
}

// text reads a text of 1 to limit bytes; "" if it is absent or refused.
func (o *object) text(key string, limit int) string {
	n := o.fields[key]
	if n == nil {
		return ""
	}
	return o.r.text(n, o.at(key), limit)
}

func (r *reader) text(n *yaml.Node, path string, limit int) string {
	switch {
	case n.Kind != yaml.ScalarNode || n.Tag != "!!str":
		do := "give text"
		if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
			do = "put it in quotes"
		}
		r.fail(n, CodeType, path, "it is "+kindOf(n)+", not text", do)
		return ""
	case n.Value == "" || len(n.Value) > limit:
		r.fail(n, CodeValue, path, fmt.Sprintf("it does not have 1 to %d bytes", limit), "give a text of that length or leave the key out")
		return ""
	}
	return n.Value
}

// choice reads one of these words.
func (o *object) choice(key string, of ...string) string {
	s := o.text(key, maxName)
	if s != "" && !slices.Contains(of, s) {
		o.bad(key, "it is not one of the words known here", "use one of: "+strings.Join(of, ", "))
		return ""
	}
	return s
}

// name reads a plain name.
func (o *object) name(key string) string {
	s := o.text(key, maxName)
	if s != "" && !isName(s) {
		o.bad(key, "it is no plain name", "use letters, digits, dots, hyphens, underscores and slashes; begin and end with a letter or digit")
		return ""
	}
	return s
}

// integer reads a whole number between low and high; fallback if it is absent or refused.
func (o *object) integer(key string, low, high, fallback int64) int64 {
	n := o.fields[key]
	if n == nil {
		return fallback
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" {
		o.r.fail(n, CodeType, o.at(key), "it is "+kindOf(n)+", not a whole number", "give a whole number, without quotes")
		return fallback
	}
	v, err := strconv.ParseInt(n.Value, 10, 64)
	if err != nil || v < low || v > high {
		o.bad(key, fmt.Sprintf("it is not a decimal number from %d to %d", low, high), "give a number in that range")
		return fallback
	}
	return v
}

func (o *object) boolean(key string) bool {
	n := o.fields[key]
	if n == nil {
		return false
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" || n.Value != "true" && n.Value != "false" {
		o.r.fail(n, CodeType, o.at(key), "it is "+kindOf(n)+", not true or false", "give true or false")
		return false
	}
	return n.Value == "true"
}

// duration reads a span as Go writes it ("90s", "1h30m"), between low and high; 0 if it is absent or refused.
func (o *object) duration(key string, low, high time.Duration) time.Duration {
	s := o.text(key, maxName)
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < low || d > high {
		o.bad(key, fmt.Sprintf("it is not a span from %s to %s", low, high), "write it like 30s, 5m or 1h30m")
		return 0
	}
	return d
}

// list reads a list of 1 to limit items.
func (o *object) list(key string, limit int) []*yaml.Node {
	n := o.fields[key]
	if n == nil {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		o.r.fail(n, CodeType, o.at(key), "it is "+kindOf(n)+", not a list", "give a list")
		return nil
	}
	if len(n.Content) == 0 || len(n.Content) > limit {
		o.bad(key, fmt.Sprintf("it does not have 1 to %d items", limit), "give a list of that length or leave the key out")
		return nil
	}
	return n.Content
}

// texts reads a list of different texts, each of which check accepts ("" is accepted, else the reason).
func (o *object) texts(key string, limit, each int, do string, check func(string) string) []string {
	var out []string
	for i, n := range o.list(key, limit) {
		path := o.at(key) + "[" + strconv.Itoa(i) + "]"
		s := o.r.text(n, path, each)
		if s == "" {
			continue
		}
		if why := check(s); why != "" {
			o.r.fail(n, CodeValue, path, why, do)
			continue
		}
		if slices.Contains(out, s) {
			o.r.fail(n, CodeDuplicate, path, "the item is there twice", "leave one of them out")
			continue
		}
		out = append(out, s)
	}
	return out
}

// names reads a list of plain names.
func (o *object) names(key string, limit int) []string {
	return o.texts(key, limit, maxName, "use letters, digits, dots, hyphens, underscores and slashes", func(s string) string {
		if !isName(s) {
			return "it is no plain name"
		}
		return ""
	})
}

// choices reads a list of words out of these.
func (o *object) choices(key string, of ...string) []string {
	return o.texts(key, len(of), maxName, "use only: "+strings.Join(of, ", "), func(s string) string {
		if !slices.Contains(of, s) {
			return "it is not one of the words known here"
		}
		return ""
	})
}

// plain turns a node into plain JSON values, with the reader's strictness about keys.
func (r *reader) plain(n *yaml.Node, path string) any {
	switch n.Kind {
	case yaml.MappingNode:
		o := r.mapping(n, path)
		out := make(map[string]any, len(o.fields))
		for key, value := range o.fields {
			out[key] = r.plain(value, join(path, keyName(key)))
		}
		return out
	case yaml.SequenceNode:
		out := make([]any, len(n.Content))
		for i, c := range n.Content {
			out[i] = r.plain(c, path+"["+strconv.Itoa(i)+"]")
		}
		return out
	default:
		return r.scalar(n, path)
	}
}

func (r *reader) scalar(n *yaml.Node, path string) any {
	switch n.Tag {
	case "!!null":
		return nil
	case "!!bool":
		if n.Value == "true" || n.Value == "false" {
			return n.Value == "true"
		}
	case "!!int":
		if v, err := strconv.ParseInt(n.Value, 10, 64); err == nil {
			return v
		}
	case "!!float":
		if v, err := strconv.ParseFloat(n.Value, 64); err == nil && !math.IsInf(v, 0) && !math.IsNaN(v) {
			return v
		}
	case "!!str", "!!timestamp":
		return n.Value
	}
	r.fail(n, CodeType, path, "it is no JSON value", "write true, false, null or a decimal number, or put it in quotes")
	return nil
}
