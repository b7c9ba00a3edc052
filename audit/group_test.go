package audit

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

func TestAGroupKnowsWhatItsMembersStarted(t *testing.T) {
	g := newGroup()
	var ended atomic.Bool
	stay := make(chan struct{})
	g.run(t.Context(), func(context.Context) {
		go func() {
			go func() { // a grandchild
				<-stay
				ended.Store(true)
			}()
		}()
	})
	if err := g.wait(50 * time.Millisecond); err == nil {
		t.Error("a goroutine is there, and nothing was waited for")
	}
	time.AfterFunc(50*time.Millisecond, func() { close(stay) })
	if err := g.wait(5 * time.Second); err != nil || !ended.Load() {
		t.Errorf("wait: %v, ended %v", err, ended.Load())
	}
	if err := newGroup().wait(0); err != nil {
		t.Errorf("an empty group: %v", err)
	}
}
