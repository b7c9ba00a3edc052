package eval

import (
	"fmt"
	"unicode/utf8"
)

// The bounds of one policy's text, checked before it is parsed: parser, validator and evaluator recurse, and what they
// cost grows with these. They also bound a predicate.
const (
	maxNesting = 64     // brackets open at once
	maxTokens  = 10_000 // words and marks of one policy; no recursion goes deeper
	maxWeight  = 40_000 // tokens after `x has a.b.c`, which repeats x and the chain for each link, is written out
	maxChain   = 64     // attributes in one chain a.b.c
	maxUnary   = 4      // unary operators in a row, as Cedar's reference implementation has it
)

// span is one policy's text within a file.
type span struct {
	text         []byte
	offset       int // bytes before it
	line, column int // of its first byte, from 1; column counts characters
	code, why    string
}

// split cuts text into policies at the semicolons outside of strings and comments (a semicolon is nothing else in
// Cedar), and checks each against the bounds; code and why say which one it broke. A last piece without a semicolon is
// returned too, if it holds any token.
//
// Trust: text is hostile. The parser sees each span on its own and must find exactly one policy in it, so that a
// difference between this scanner and the parser's refuses the text instead of slipping something past the bounds.
func split(text []byte, each func(span) bool) {
	s := splitter{text: text, line: 1, column: 1}
	s.begin()
	for s.pos < len(text) {
		c := text[s.pos]
		switch {
		case c == '"':
			s.token(c, nil)
			s.str()
		case c == '/' && s.at(1) == '/':
			for s.pos < len(text) && text[s.pos] != '\n' {
				s.next()
			}
		case c == '/' && s.at(1) == '*':
			s.next()
			s.next()
			for s.pos < len(text) && (text[s.pos] != '*' || s.at(1) != '/') {
				s.next()
			}
			s.next()
			s.next()
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			s.next()
		case wordByte(c):
			end := s.pos
			for end < len(text) && wordByte(text[end]) {
				end++
			}
			s.token('a', text[s.pos:end])
			for s.pos < end {
				s.next()
			}
		default:
			s.token(c, nil)
			s.next()
			if c == ';' {
				if !each(s.end()) {
					return
				}
				s.begin()
			}
		}
	}
	if s.tokens > 0 {
		each(s.end())
	}
}

type splitter struct {
	text         []byte
	pos          int
	line, column int
	cur          span
	tokens       int
	nesting      int
	chain, unary int
	last         byte    // first byte of the token before, 'a' for any word
	levels       []level // one a bracket that is open, and one below
}

// level is what stands between one pair of brackets: the weight of the operand that is being read, and of those before.
type level struct {
	operand, before int
	base            int  // weight of the operand when its `has` came
	has             bool // within the chain after `has`
}

func (s *splitter) begin() {
	s.cur = span{offset: s.pos, line: s.line, column: s.column}
	s.tokens, s.nesting, s.chain, s.unary, s.last = 0, 0, 0, 0, 0
	s.levels = append(s.levels[:0], level{})
}

func (s *splitter) end() span {
	s.cur.text = s.text[s.cur.offset:s.pos]
	return s.cur
}

func (s *splitter) at(n int) byte {
	if s.pos+n < len(s.text) {
		return s.text[s.pos+n]
	}
	return 0
}

// next moves over one byte and keeps line and column as the parser counts them.
func (s *splitter) next() {
	if s.pos >= len(s.text) {
		return
	}
	switch c := s.text[s.pos]; {
	case c == '\n':
		s.line, s.column = s.line+1, 1
	case utf8.RuneStart(c):
		s.column++
	}
	s.pos++
}

func (s *splitter) str() {
	s.next()
	for s.pos < len(s.text) && s.text[s.pos] != '"' && s.text[s.pos] != '\n' {
		if s.text[s.pos] == '\\' {
			s.next()
		}
		s.next()
	}
	if s.at(0) == '"' {
		s.next()
	}
}

// token counts one token that begins with c, 'a' for a word, against the bounds.
func (s *splitter) token(c byte, word []byte) {
	if s.tokens++; s.tokens == 1 {
		s.cur.offset, s.cur.line, s.cur.column = s.pos, s.line, s.column
	}
	switch c {
	case '(', '[', '{':
		s.nesting++
	case ')', ']', '}':
		s.nesting--
	}
	switch {
	case c == '.':
		s.chain++
	case c != 'a' || s.last != '.':
		s.chain = 0
	}
	if (c == '!' && s.at(1) != '=') || c == '-' {
		s.unary++
	} else {
		s.unary = 0
	}
	s.last = c
	if s.cur.code != "" {
		return
	}
	weight := s.weigh(c, word)
	switch {
	case s.nesting > maxNesting:
		s.cur.code, s.cur.why = codeTooDeep, fmt.Sprintf("its brackets are nested deeper than %d", maxNesting)
	case s.chain > maxChain:
		s.cur.code, s.cur.why = codeTooDeep, fmt.Sprintf("a chain of attributes is longer than %d", maxChain)
	case s.unary > maxUnary:
		s.cur.code, s.cur.why = codeTooDeep, fmt.Sprintf("there are more than %d unary operators in a row", maxUnary)
	case s.tokens > maxTokens:
		s.cur.code, s.cur.why = codeTooLarge, fmt.Sprintf("it has more than %d tokens", maxTokens)
	case weight > maxWeight:
		s.cur.code, s.cur.why = codeTooLarge, "its chains after `has` are too long when written out"
	}
}

// weigh keeps the weight of the expression when `x has a.b` is written out as `x has a && x.a has b`, as the parser does:
// nested, that doubles with each level. It returns the weight so far of the innermost bracket.
func (s *splitter) weigh(c byte, word []byte) int {
	top := &s.levels[len(s.levels)-1]
	switch {
	case c == '(' || c == '[' || c == '{':
		top.operand++
		if len(s.levels) <= maxNesting {
			s.levels = append(s.levels, level{})
		}
		return 0
	case c == ')' || c == ']' || c == '}':
		if n := len(s.levels) - 1; n > 0 {
			s.levels = s.levels[:n]
			s.levels[n-1].operand += top.before + top.operand
			top = &s.levels[n-1]
		}
		top.has = false
	case c == '&' || c == '|' || c == ',' || c == '=' || c == '<' || c == '>':
		top.before, top.operand, top.has = top.before+top.operand, 0, false
	case string(word) == "has":
		top.base, top.has = top.operand, true
	case c == '.' && top.has:
		top.operand += top.base + s.chain
	case c != 'a':
		top.has = false
	}
	top.operand++
	return top.before + top.operand
}

func wordByte(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= utf8.RuneSelf
}
