package refusal_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/redoubtsec/redoubt/refusal"
)

func TestRendersWhatWhyAndWhatToDo(t *testing.T) {
	e := &refusal.Error{Code: "join-token-used", What: "join of m1", Why: "the token was used", Do: "make a new one"}
	if got, want := e.Error(), "join of m1: the token was used; make a new one"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMatchesByCodeThroughWrapping(t *testing.T) {
	sentinel := &refusal.Error{Code: "join-token-used"}
	err := fmt.Errorf("outer: %w", &refusal.Error{Code: "join-token-used", What: "a", Why: "b"})
	if !errors.Is(err, sentinel) {
		t.Error("a refusal with the same code must match its sentinel")
	}
	if errors.Is(err, &refusal.Error{Code: "other"}) || errors.Is(err, &refusal.Error{}) {
		t.Error("a refusal must not match another code, nor an empty one")
	}
	if refusal.As(err) == nil || refusal.As(errors.New("x")) != nil {
		t.Error("As must find a refusal, and only a refusal")
	}
}
