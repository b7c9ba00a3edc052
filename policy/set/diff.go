package set

import (
	"cmp"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Op says how something differs between two sets.
type Op string

// The ways to differ.
const (
	Added   Op = "added"
	Removed Op = "removed"
	Changed Op = "changed"
)

// Diff is what differs between two sets of files, in order of file, then as it stands in the file.
//
// Zero value: no difference in policies and documents.
type Diff struct {
	Files   []FileChange `json:"files"`   // files that differ in any byte
	Changes []Change     `json:"changes"` // policies and documents that differ
}

// Empty reports whether the files are the same, byte for byte.
func (d Diff) Empty() bool { return len(d.Files) == 0 }

// FileChange is one file that differs.
type FileChange struct {
	Name string `json:"name"`
	Op   Op     `json:"op"`
}

// Change is one policy or document that differs: its text before and after, comments above it included.
type Change struct {
	Op     Op     `json:"op"`
	Kind   string `json:"kind"` // KindPolicy or a kind of document
	Name   string `json:"name"` // of a policy its @id, else file#n
	File   string `json:"file"` // where it is now, or was if it was removed
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// Difference compares two sets of files policy by policy and document by document: what only moved to another file is no
// change, nor is a change of blanks around it. It takes files that do not parse, as far as it can tell their parts.
func Difference(a, b []File) Diff {
	var d Diff
	before, after := byName(a), byName(b)
	for _, f := range fileNames(a, b) {
		x, had := before[f]
		y, has := after[f]
		switch {
		case !had:
			d.Files = append(d.Files, FileChange{f, Added})
		case !has:
			d.Files = append(d.Files, FileChange{f, Removed})
		case x != y:
			d.Files = append(d.Files, FileChange{f, Changed})
		}
	}
	if d.Empty() {
		return d
	}
	old, now := parts(a), parts(b)
	index := func(list []Change) map[[2]string]Change {
		m := make(map[[2]string]Change, len(list))
		for _, p := range list {
			m[[2]string{p.Kind, p.Name}] = p
		}
		return m
	}
	was, is := index(old), index(now)
	for _, p := range now {
		prior, had := was[[2]string{p.Kind, p.Name}]
		switch {
		case !had:
			d.Changes = append(d.Changes, Change{Op: Added, Kind: p.Kind, Name: p.Name, File: p.File, After: p.After})
		case prior.After != p.After:
			d.Changes = append(d.Changes, Change{Op: Changed, Kind: p.Kind, Name: p.Name, File: p.File, Before: prior.After, After: p.After})
		}
	}
	for _, p := range old {
		if _, has := is[[2]string{p.Kind, p.Name}]; !has {
			d.Changes = append(d.Changes, Change{Op: Removed, Kind: p.Kind, Name: p.Name, File: p.File, Before: p.After})
		}
	}
	slices.SortStableFunc(d.Changes, func(x, y Change) int { return cmp.Compare(x.File, y.File) })
	return d
}

func byName(files []File) map[string]string {
	m := make(map[string]string, len(files))
	for _, f := range files {
		m[f.Name] = f.Content
	}
	return m
}

func fileNames(a, b []File) []string {
	var names []string
	for _, f := range slices.Concat(a, b) {
		names = append(names, f.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// parts lists the policies and documents of files, each with its text as After.
func parts(files []File) []Change {
	var out []Change
	sorted := slices.SortedFunc(slices.Values(files), func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	for _, f := range sorted {
		if path.Ext(f.Name) == ".cedar" {
			for i, text := range statements(f.Content) {
				name := f.Name + "#" + strconv.Itoa(i+1)
				if m := policyID.FindStringSubmatch(uncommented(text)); m != nil {
					if id, err := strconv.Unquote(m[1]); err == nil {
						name = id
					}
				}
				out = append(out, Change{Kind: KindPolicy, Name: name, File: f.Name, After: text})
			}
			continue
		}
		for i, c := range chunks(f.Content) {
			r := &reader{found: &findings{}, place: place{file: f.Name}}
			p := Change{Kind: "document", Name: f.Name + "#" + strconv.Itoa(i+1), File: f.Name, After: strings.TrimSpace(c.text)}
			root := r.parse(c.text)
			if root == nil && len(r.found.list) == 0 {
				continue // comments only
			}
			if root != nil {
				if kind, name := peek(root, "kind"), peek(root, "name"); kind != "" && name != "" {
					p.Kind, p.Name = kind, name
				}
			}
			out = append(out, p)
		}
	}
	return out
}

var policyID = regexp.MustCompile(`^(?:\s*@[A-Za-z_][A-Za-z0-9_]*\s*(?:\(\s*"(?:[^"\\]|\\.)*"\s*\))?)*?\s*@id\s*\(\s*("(?:[^"\\]|\\.)*")\s*\)`)

// statements cuts Cedar text at the semicolons outside of strings and comments. It is for showing; policy/eval has its
// own reader, which decides what a policy is.
func statements(text string) []string {
	var out []string
	start, code := 0, false
	for i := 0; i < len(text); {
		next, kind := token(text, i)
		switch {
		case kind == tokenCode && text[i] == ';':
			out = append(out, strings.TrimSpace(text[start:next]))
			start, code = next, false
		case kind == tokenCode && text[i] > ' ', kind == tokenString:
			code = true
		}
		i = next
	}
	if code {
		out = append(out, strings.TrimSpace(text[start:]))
	}
	return out
}

// uncommented returns Cedar text with its comments as blanks.
func uncommented(text string) string {
	var b strings.Builder
	for i := 0; i < len(text); {
		next, kind := token(text, i)
		if kind == tokenComment {
			b.WriteByte(' ')
		} else {
			b.WriteString(text[i:next])
		}
		i = next
	}
	return b.String()
}

type tokenKind int

const (
	tokenCode tokenKind = iota // one byte
	tokenString
	tokenComment
)

// token returns the end of the token at i.
func token(text string, i int) (int, tokenKind) {
	switch {
	case text[i] == '"':
		for j := i + 1; j < len(text); j++ {
			switch text[j] {
			case '\\':
				j++
			case '"', '\n':
				return j + 1, tokenString
			}
		}
		return len(text), tokenString
	case strings.HasPrefix(text[i:], "//"):
		if n := strings.IndexByte(text[i:], '\n'); n >= 0 {
			return i + n + 1, tokenComment
		}
		return len(text), tokenComment
	case strings.HasPrefix(text[i:], "/*"):
		if n := strings.Index(text[i+2:], "*/"); n >= 0 {
			return i + 2 + n + 2, tokenComment
		}
		return len(text), tokenComment
	default:
		return i + 1, tokenCode
	}
}
