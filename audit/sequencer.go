package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
)

// appender is Tessera's writer with what it takes to end it.
type appender struct {
	add    tessera.AddFn
	reader tessera.LogReader
	end    func() error
}

// Run sequences the outbox until ctx ends, then publishes a last checkpoint. It returns when every goroutine of the log
// has ended: nil after ctx ended, an error if the log could not be started, or if Tessera's goroutines outlive their
// bound. Disk and database errors do not end it: it tries again, with growing pauses, and [Log.Ready] refuses meanwhile.
func (l *Log) Run(ctx context.Context) error {
	if l.running.Swap(true) {
		return errors.New("audit log: run twice")
	}
	defer close(l.stopped)
	redirectTessera(l.cfg.Logger, l.cfg.Meter)
	pause := backoffLeast
	var app *appender
	for ctx.Err() == nil {
		n, err := 0, error(nil)
		if app == nil {
			app, err = l.start(ctx)
		}
		if err == nil {
			n, err = l.round(ctx, app)
		}
		if err != nil {
			l.failed(err)
			pause = sleep(ctx, pause)
			continue
		}
		l.worked()
		pause = backoffLeast
		if n == 0 {
			l.idle(ctx)
		}
	}
	if app == nil {
		return nil
	}
	return app.end()
}

func (l *Log) failed(err error) {
	reason := "error"
	if isFull(err) {
		reason = ErrDiskFull.Code
	}
	l.cfg.Meter.Count("audit_failures", 1, "reason", reason)
	if l.setFailing(err) { // once, not at every attempt
		l.cfg.Logger.Error("the audit log cannot go on; trying again", slog.String("reason", reason), slog.Any("error", err))
	}
}

func (l *Log) worked() {
	if l.setFailing(nil) {
		l.cfg.Logger.Info("the audit log goes on")
	}
}

// idle waits for a notice, or for the next look at the outbox.
func (l *Log) idle(ctx context.Context) {
	timer := time.NewTimer(pollEvery)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-l.wake:
	case <-timer.C:
	}
}

func sleep(ctx context.Context, d time.Duration) time.Duration {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
	return min(2*d, backoffMost)
}

// start starts Tessera. Its goroutines hold on to the context given until that ends, which is after ctx: what was added
// when ctx ended is still integrated and published.
func (l *Log) start(ctx context.Context) (_ *appender, err error) {
	driver, err := posix.New(ctx, posix.Config{Path: l.logDir})
	if err != nil {
		return nil, fmt.Errorf("start audit log: %w", err)
	}
	opts := tessera.NewAppendOptions().
		WithCheckpointSigner(l.key.signer).
		WithBatching(maxBatch, l.cfg.Batch).
		WithCheckpointInterval(l.cfg.Checkpoint).
		WithCheckpointRepublishInterval(0). // an unchanged log is not signed again
		WithShutdownTimeout(shutdownTimeout)
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	group := newGroup()
	var app appender
	var add *tessera.Appender
	var shutdown func(context.Context) error
	group.run(life, func(life context.Context) {
		defer func() {
			if r := recover(); r != nil { // Tessera panics when it cannot make its lock files, on a full disk for one
				err = fmt.Errorf("tessera gave up: %v", r)
			}
		}()
		add, shutdown, app.reader, err = tessera.NewAppender(life, driver, opts)
	})
	if err != nil {
		cancel()
		return nil, errors.Join(fmt.Errorf("start audit log: %w", err), group.wait(shutdownTimeout))
	}
	app.add = add.Add
	app.end = func() error {
		if err := shutdown(context.WithoutCancel(ctx)); err != nil {
			// Not fatal: the leaves are integrated; the next run publishes a checkpoint over them.
			l.cfg.Logger.Warn("the last audit checkpoint was not published", slog.Any("error", err))
		}
		cancel()
		return group.wait(shutdownTimeout)
	}
	return &app, nil
}

// round moves one batch from the outbox to the log, and says how many leaves it moved.
func (l *Log) round(ctx context.Context, app *appender) (int, error) {
	// A round that has begun is carried through: between adding and marking nobody knows how far it got.
	ctx = context.WithoutCancel(ctx)
	if l.unsure {
		if err := l.reconcile(ctx, app.reader); err != nil {
			return 0, err
		}
		l.unsure = false
	}
	entries, err := l.cfg.Outbox.Pending(ctx, 0, maxBatch)
	if err != nil {
		return 0, fmt.Errorf("read audit outbox: %w", err)
	}
	if len(entries) == 0 {
		l.setBacklog(0)
		return 0, nil
	}
	if len(entries) == maxBatch {
		tail, err := l.cfg.Outbox.Tail(ctx)
		if err != nil {
			return 0, fmt.Errorf("read audit outbox: %w", err)
		}
		l.setBacklog(tail.Pending)
	}
	l.unsure = true
	indexes, err := l.addAll(ctx, app, entries)
	if err != nil {
		return 0, err
	}
	entries = entries[:len(indexes)]
	l.placed(entries, indexes)
	placed := make([]Placed, len(entries))
	for i, e := range entries {
		placed[i] = Placed{Seq: e.Seq, Index: indexes[i]}
	}
	if err := l.cfg.Outbox.MarkLogged(ctx, placed); err != nil {
		return 0, fmt.Errorf("mark audit outbox: %w", err)
	}
	l.placed(entries, indexes)
	l.unsure = false
	l.cfg.Meter.Count("audit_leaves", int64(len(entries)))
	l.cfg.Meter.Count("audit_batches", 1)
	return len(entries), nil
}

// addAll adds the first of entries (all of them, unless time runs out) in order, waits until they are integrated, and
// returns their indexes. After an error some of them may be integrated, too.
func (l *Log) addAll(ctx context.Context, app *appender, entries []Entry) ([]uint64, error) {
	for _, e := range entries {
		if len(e.Leaf) > MaxLeafBytes {
			return nil, fmt.Errorf("audit outbox: leaf of %d bytes at %d, which the store should have refused", len(e.Leaf), e.Seq)
		}
	}
	futures := make([]tessera.IndexFuture, 0, len(entries))
	begun := time.Now()
	for _, e := range entries {
		// Tessera flushes Batch after the first add. Whatever would come after a flush waits for its outcome: else a
		// flush that fails and a later one that works would change the order.
		if time.Since(begun) > l.cfg.Batch/2 && len(futures) > 0 {
			break
		}
		futures = append(futures, app.add(ctx, tessera.NewEntry(e.Leaf)))
	}
	indexes := make([]uint64, 0, len(entries))
	var failed error
	for _, future := range futures { // all of them, whatever happens: none may be in flight when we return
		index, err := future()
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		indexes = append(indexes, index.Index)
	}
	if failed != nil {
		return nil, fmt.Errorf("write audit log: %w", failed)
	}
	return indexes, nil
}

// reconcile finds pending rows that are in the log already, by record id, and marks them. Rows go into the log in order
// and are marked in order, so they can only lie above the highest mark.
func (l *Log) reconcile(ctx context.Context, log tessera.LogReader) error {
	tail, err := l.cfg.Outbox.Tail(ctx)
	if err != nil {
		return fmt.Errorf("read audit outbox: %w", err)
	}
	size, err := log.IntegratedSize(ctx)
	if err != nil {
		return fmt.Errorf("read audit log: %w", err)
	}
	if tail.Next > size {
		return behind(fmt.Sprintf("the database remembers %d leaves, the log has %d", tail.Next, size))
	}
	l.setBacklog(tail.Pending)
	if tail.Pending == 0 || tail.Next == size {
		return nil
	}
	var after int64
	for {
		page, err := l.cfg.Outbox.Pending(ctx, after, reconcilePage)
		if err != nil {
			return fmt.Errorf("read audit outbox: %w", err)
		}
		if len(page) == 0 {
			return nil
		}
		found, err := find(ctx, log, page, tail.Next, size)
		if err != nil {
			return err
		}
		if len(found) > 0 {
			if err := l.cfg.Outbox.MarkLogged(ctx, found); err != nil {
				return fmt.Errorf("mark audit outbox: %w", err)
			}
			l.cfg.Meter.Count("audit_recovered", int64(len(found)))
			l.cfg.Logger.Info("found audit leaves in the log that were not marked", slog.Int("leaves", len(found)))
		}
		if len(found) < len(page) {
			return nil // the first that is not in the log: none after it is
		}
		after = page[len(page)-1].Seq
	}
}

// find looks for the record ids of page among the leaves from index next to size.
func find(ctx context.Context, log tessera.LogReader, page []Entry, next, size uint64) ([]Placed, error) {
	want := make(map[string]int64, len(page))
	for _, e := range page {
		want[e.RecordID] = e.Seq
	}
	var found []Placed
	for bundle := next / torchwood.TileWidth; bundle*torchwood.TileWidth < size && len(want) > 0; bundle++ {
		first := bundle * torchwood.TileWidth
		width := min(size-first, torchwood.TileWidth)
		raw, err := log.ReadEntryBundle(ctx, bundle, uint8(width%torchwood.TileWidth))
		if err != nil {
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		for i := range width {
			leaf, rest, err := torchwood.ReadTileEntry(raw)
			if err != nil {
				return nil, fmt.Errorf("read audit log: bundle %d: %w", bundle, err)
			}
			raw = rest
			var rec struct {
				ID string `json:"id"`
			}
			if first+i < next || json.Unmarshal(leaf, &rec) != nil {
				continue
			}
			if seq, ok := want[rec.ID]; ok {
				found = append(found, Placed{Seq: seq, Index: first + i})
				delete(want, rec.ID)
			}
		}
	}
	return found, nil
}
