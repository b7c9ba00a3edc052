package fleet

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/redoubtsec/redoubt/refusal"
)

// stock is what there is of a machine's workloads, within one transaction.
type stock struct {
	count int
	bytes int  // never less than there are
	loose bool // there may be fewer bytes: some were freed
}

// freeAtOnce is how many workloads that are gone make room for bytes in one step.
const freeAtOnce = 64

func (f *Fleet) stockOf(ctx context.Context, u *unit, machine string) (*stock, error) {
	if u.stock != nil {
		return u.stock, nil
	}
	count, err := u.Workloads.CountWorkloads(ctx, machine)
	if err != nil {
		return nil, err
	}
	bytes, err := u.Workloads.WorkloadBytes(ctx, machine)
	u.stock = &stock{count: count, bytes: bytes}
	return u.stock, err
}

// free deletes at most n workloads of a machine that are gone, the longest gone first.
func (f *Fleet) free(ctx context.Context, u *unit, machine string, n int) (int, error) {
	freed, err := u.Workloads.DeleteGone(ctx, machine, f.now().Add(1), n)
	if err != nil {
		return 0, err
	}
	u.stock.count -= len(freed)
	u.stock.loose = u.stock.loose || len(freed) > 0
	return len(freed), f.forget(ctx, u, freed)
}

// room makes room for one more workload of a machine: those longest gone go first.
func (f *Fleet) room(ctx context.Context, u *unit, machine string) (*refusal.Error, error) {
	s, err := f.stockOf(ctx, u, machine)
	if err != nil || s.count < f.cfg.MaxWorkloads {
		return nil, err
	}
	if _, err := f.free(ctx, u, machine, s.count-f.cfg.MaxWorkloads+1); err != nil || s.count < f.cfg.MaxWorkloads {
		return nil, err
	}
	return exhausted(ErrWorkloads, "workload of machine "+machine, f.cfg.MaxWorkloads, "end some, or raise the server's limit of workloads per machine"), nil
}

// fits makes room for the bytes of w in place of old, as room does, and counts w in. All machines are told of every
// workload: what one of them may add to that is bounded.
func (f *Fleet) fits(ctx context.Context, u *unit, machine string, old, w Workload) (*refusal.Error, error) {
	known := old.Epoch > 0
	if known && w.Epoch == old.Epoch && len(w.Listen) <= len(old.Listen) {
		return nil, nil
	}
	s, err := f.stockOf(ctx, u, machine)
	if err != nil {
		return nil, err
	}
	grown, err := sizeOf(w)
	if err != nil {
		return nil, err
	}
	if known {
		before, err := sizeOf(old)
		if err != nil {
			return nil, err
		}
		if grown -= before; grown <= 0 {
			s.bytes += grown
			return nil, nil
		}
	}
	for s.bytes+grown > f.cfg.MaxBytes {
		freed := 0
		if !s.loose {
			if freed, err = f.free(ctx, u, machine, freeAtOnce); err != nil {
				return nil, err
			}
			if freed == 0 {
				return refuse(ErrWorkloadBytes, refusal.Exhausted, "workload "+w.Instance,
					fmt.Sprintf("the facts of the workloads of machine %s are longer than %d bytes together", machine, f.cfg.MaxBytes),
					"end some, give them fewer or shorter labels, or raise the server's limit of bytes per machine"), nil
			}
		}
		if s.bytes, err = u.Workloads.WorkloadBytes(ctx, machine); err != nil {
			return nil, err
		}
		s.loose = false
	}
	s.bytes += grown
	if !known {
		s.count++
	}
	return nil, nil
}

func sizeOf(w Workload) (int, error) {
	raw, err := json.Marshal(w)
	return len(raw), err
}
