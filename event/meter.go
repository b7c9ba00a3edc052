package event

// Meter counts what happens: refusals, drops, issues. Names are Prometheus names without the redoubt_ prefix and the
// _total suffix ("workloadapi_refused"); labels come in key, value pairs and have few values.
//
// Concurrency: safe. A room that takes a Meter treats nil as [NoMeter].
type Meter interface {
	// Count adds n to the counter of this name and labels.
	Count(name string, n int64, labels ...string)
}

// NoMeter counts nothing.
var NoMeter Meter = noMeter{}

type noMeter struct{}

func (noMeter) Count(string, int64, ...string) {}

// Sink takes events. Emit never blocks; what it cannot keep it counts.
//
// Concurrency: safe.
type Sink interface {
	Emit(Event)
}

// NoSink drops every event, for tests and for roles without a spool.
var NoSink Sink = noSink{}

type noSink struct{}

func (noSink) Emit(Event) {}
