package eval

import (
	"strings"
	"testing"
	"time"
)

func TestZZ(t *testing.T) {
	x := "context"
	for i := 0; i < 30; i++ {
		x = "(" + x + " has a.b)"
	}
	for _, src := range []string{
		"permit(principal,action,resource) when {" + x + "};",
		"permit(principal,action,resource) when {" + strings.Repeat("(", 60) + "true" + strings.Repeat(")", 60) + "};",
		"permit(principal,action,resource) when {" + strings.Repeat("true && ", 4000/2) + "true};",
		"permit(principal,action,resource) when {" + strings.Repeat("if true then true else ", 3000) + "true};",
		"permit(principal,action,resource) when {" + strings.Repeat("principal has uid && ", 500) + "true};",
		"permit(principal,action,resource) when {" + strings.Repeat("[", 60) + strings.Repeat("]", 60) + ".isEmpty()};",
		"permit(principal,action,resource) when {principal.a.b.c.d.e.f.g.h == 1};",
		"permit(principal,action,resource) when {" + strings.Repeat("(principal has a.b.c.d) && ", 700) + "true};",
		"permit(principal,action,resource) when {" + strings.Repeat("1 + ", 4000) + "1 == 2};",
		"permit(principal,action,resource) when {[" + strings.Repeat("1 ,", 4900) + "1].contains(2)};",
		"permit(principal,action,resource) when {[" + strings.Repeat("context has x, ", 2400) + "true].contains(true)};",
	} {
		start := time.Now()
		_, err := Compile([]File{{"a", []byte(src)}})
		s := "ok"
		if err != nil {
			s = err.Error()
		}
		if len(s) > 300 {
			s = s[:300]
		}
		t.Log(time.Since(start), s)
	}
}
