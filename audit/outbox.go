package audit

import "context"

// MaxLeafBytes bounds one leaf. Stores refuse a larger record within its transaction; C2SP tlog-tiles allows 65,535.
const MaxLeafBytes = 32 << 10

// Entry is one row of the outbox that is not in the log yet, as far as the outbox knows.
type Entry struct {
	Seq      int64  // rises with every row; rows of one transaction before those of a later one
	RecordID string // r-…, unique
	Leaf     []byte // event.Record.Leaf, at most [MaxLeafBytes]
}

// Placed says that the row of this sequence number is in the log at this index.
type Placed struct {
	Seq   int64
	Index uint64
}

// Tail is what an outbox knows of the log.
type Tail struct {
	Next    uint64 // one above the highest index marked; 0 if none is
	Pending int    // rows without an index
}

// Outbox is where leaves wait: rows that a store committed together with the changes they record.
//
// Concurrency: safe. Durability: what MarkLogged accepted is on disk when it returns, and rows that Pending returned
// were. Errors are plain; the sequencer tries again.
type Outbox interface {
	// Pending returns up to limit unmarked rows with a sequence number above after, in order.
	Pending(ctx context.Context, after int64, limit int) ([]Entry, error)
	// MarkLogged marks rows with their index, all or none. Marking a row again with the same index changes nothing;
	// another index is an error.
	MarkLogged(ctx context.Context, placed []Placed) error
	// Placed returns the index of a record, and false while it is unmarked or unknown.
	Placed(ctx context.Context, recordID string) (uint64, bool, error)
	// Tail returns the tail.
	Tail(ctx context.Context) (Tail, error)
}
