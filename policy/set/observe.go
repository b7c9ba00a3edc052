package set

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/identity"
	"github.com/redoubtsec/redoubt/refusal"
)

// The refusals of overrides, beside [ErrSelector] and [ErrUnknownOverride]; compare with errors.Is.
var (
	// ErrOverrideExpiry says that an override ends too late or has ended already.
	ErrOverrideExpiry = &refusal.Error{Code: "override-expiry"}
	// ErrTooManyOverrides says that [MaxOverrides] hold.
	ErrTooManyOverrides = &refusal.Error{Code: "too-many-overrides"}
)

// Observe puts the workloads that the override selects into observe until it expires: the panic switch. It fills in ID,
// Created and, if it is zero, Expires ([DefaultOverride] from now).
//
// Errors: match [ErrSelector], [ErrOverrideExpiry], [ErrTooManyOverrides] or [ErrApplyOptions] (author or note too long).
func (r *Registry) Observe(ctx context.Context, o Override, rec event.Record) (Override, error) {
	out, err := r.observe(ctx, o, rec)
	r.count("observe", false, err)
	return out, err
}

func (r *Registry) observe(ctx context.Context, o Override, rec event.Record) (Override, error) {
	if err := o.Check(); err != nil {
		return Override{}, err
	}
	if err := (ApplyOptions{Author: o.Author, Note: o.Note}).check(); err != nil {
		return Override{}, err
	}
	now := wallClock()
	o.ID, o.Created = identity.Unique("o"), now
	if o.Expires.IsZero() {
		o.Expires = now.Add(DefaultOverride)
	}
	o.Expires = o.Expires.UTC().Truncate(time.Microsecond)
	if !now.Before(o.Expires) || o.Expires.Sub(now) > MaxOverride {
		return Override{}, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrOverrideExpiry.Code, What: "override", Why: fmt.Sprintf("its end is not within %s from now", MaxOverride),
			Do: "give an earlier end; to observe for longer apply a Mode",
		}
	}
	r.writing.Lock()
	defer r.writing.Unlock()
	if len(r.Overrides()) >= MaxOverrides {
		return Override{}, &refusal.Error{
			Kind: refusal.Exhausted, Code: ErrTooManyOverrides.Code, What: "override", Why: fmt.Sprintf("%d overrides hold already", MaxOverrides),
			Do: "end some of them, or observe all with one",
		}
	}
	rec.Detail = with(rec.Detail, "override", o.ID, "selector", o.String(), "expires", o.Expires.Format(time.RFC3339))
	if o.Note != "" {
		rec.Detail = with(rec.Detail, "note", o.Note)
	}
	if err := r.overrides.PutOverride(ctx, o, rec); err != nil {
		r.resync(ctx)
		return Override{}, fmt.Errorf("put override: %w", err)
	}
	r.publish(func(st *state) { st.overrides = append(slices.Clone(st.overrides), o) })
	r.log.Warn("override in force", "override", o.ID, "selector", o.String(), "expires", o.Expires)
	return o, nil
}

// EndObserve ends an override before it expires. Errors: matches [ErrUnknownOverride].
func (r *Registry) EndObserve(ctx context.Context, id string, rec event.Record) error {
	err := r.endOverride(ctx, id, rec)
	r.count("end-observe", false, err)
	return err
}

func (r *Registry) endOverride(ctx context.Context, id string, rec event.Record) error {
	r.writing.Lock()
	defer r.writing.Unlock()
	rec.Detail = with(rec.Detail, "override", id)
	err := r.overrides.DeleteOverride(ctx, id, rec)
	if err != nil && !errors.Is(err, ErrUnknownOverride) {
		r.resync(ctx)
		return fmt.Errorf("delete override: %w", err)
	}
	had := slices.ContainsFunc(r.now().overrides, func(o Override) bool { return o.ID == id })
	if had {
		r.publish(func(st *state) {
			st.overrides = slices.DeleteFunc(slices.Clone(st.overrides), func(o Override) bool { return o.ID == id })
		})
	}
	return err
}

// with returns a copy of detail that also has these keys and values.
func with(detail map[string]string, pairs ...string) map[string]string {
	out := make(map[string]string, len(detail)+len(pairs)/2)
	maps.Copy(out, detail)
	for i := 0; i+1 < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

// byExpiry orders overrides by when they end.
func byExpiry(a, b Override) int {
	return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.ID, b.ID))
}
