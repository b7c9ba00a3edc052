package apitest

import (
	"bytes"
	"strings"
	"sync"
)

// Meter counts, by name and labels. Concurrency: safe.
type Meter struct {
	mu     sync.Mutex
	counts map[string]int64 // guarded by mu
}

// Count implements event.Meter.
func (m *Meter) Count(name string, n int64, labels ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[name] += n
	if len(labels) > 0 {
		m.counts[name+"{"+strings.Join(labels, ",")+"}"] += n
	}
}

// Of returns a count: of a name, or of a name with labels as "name{key,value}".
func (m *Meter) Of(name string) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts[name]
}

// Log keeps what was logged. Concurrency: safe.
type Log struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String returns everything logged so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
