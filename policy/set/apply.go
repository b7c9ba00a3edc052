package set

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/redoubtsec/redoubt/event"
	"github.com/redoubtsec/redoubt/refusal"
)

// ApplyOptions says how to apply.
type ApplyOptions struct {
	// Expect is the version that the caller saw in force; 0 is the built-in set. Another one in force is a conflict.
	Expect uint64
	// ConfirmWithin, if not 0, makes the edition pending: the former one returns unless it is confirmed in this time.
	ConfirmWithin time.Duration
	Author, Note  string
	// DryRun checks and compares, and changes nothing.
	DryRun bool
}

// The bounds of a change.
const (
	MinConfirm = time.Second
	MaxConfirm = 7 * 24 * time.Hour
	maxAuthor  = 256
	maxNote    = 1024
)

// The refusals of changes, beside [ErrConflict] and [ErrUnknownEdition]; compare with errors.Is.
var (
	// ErrPending says that an edition waits to be confirmed.
	ErrPending = &refusal.Error{Code: "edition-pending"}
	// ErrNotPending says that there is nothing to confirm.
	ErrNotPending = &refusal.Error{Code: "edition-not-pending"}
	// ErrEmptySet says that there are no files to apply.
	ErrEmptySet = &refusal.Error{Code: "empty-set"}
	// ErrApplyOptions says that an option is out of bounds.
	ErrApplyOptions = &refusal.Error{Code: "apply-options"}
)

func (o ApplyOptions) check() error {
	switch {
	case o.ConfirmWithin != 0 && (o.ConfirmWithin < MinConfirm || o.ConfirmWithin > MaxConfirm):
		return &refusal.Error{
			Kind: refusal.Invalid, Code: ErrApplyOptions.Code, What: "time to confirm", Do: "give a span in that range, like 5m",
			Why: fmt.Sprintf("it is not from %s to %s", MinConfirm, MaxConfirm),
		}
	case len(o.Author) > maxAuthor || len(o.Note) > maxNote:
		return &refusal.Error{
			Kind: refusal.Invalid, Code: ErrApplyOptions.Code, What: "author or note", Do: "shorten it",
			Why: fmt.Sprintf("it is longer than %d or %d bytes", maxAuthor, maxNote),
		}
	}
	return nil
}

// Apply parses files and puts them in force as the next edition, at once and as a whole. Files that are those in force
// already change nothing: the current edition is returned, with an empty difference.
//
// Errors: [Problems] of the files; [ErrConflict] if opts.Expect is not in force; [ErrPending] while an edition waits to
// be confirmed (so that what returns is always something that somebody confirmed); [ErrEmptySet]; [ErrApplyOptions].
func (r *Registry) Apply(ctx context.Context, files []File, opts ApplyOptions, rec event.Record) (Edition, Diff, error) {
	edition, diff, err := r.apply(ctx, files, opts, rec)
	r.count("apply", opts.DryRun, err)
	return edition, diff, err
}

func (r *Registry) apply(ctx context.Context, files []File, opts ApplyOptions, rec event.Record) (Edition, Diff, error) {
	if err := opts.check(); err != nil {
		return Edition{}, Diff{}, err
	}
	if len(files) == 0 {
		return Edition{}, Diff{}, &refusal.Error{
			Kind: refusal.Invalid, Code: ErrEmptySet.Code, What: "policy set", Why: "there are no files in it",
			Do: "give the directory of your policies; to go back to the built-in set use redoubt rollback 0",
		}
	}
	s, err := Parse(files)
	if err != nil {
		return Edition{}, Diff{}, err
	}
	return r.change(ctx, s, Edition{Cause: CauseApply}, opts, rec)
}

// Rollback puts the files of an older edition in force again, as a new edition that restores it; version 0 is the
// built-in set. It also ends the wait of a pending edition, which is then returned.
//
// Errors: as [Registry.Apply], and [ErrUnknownEdition], [ErrCorruptEdition]. With an edition pending, ConfirmWithin is
// refused with [ErrPending]. Files that are those in force already change nothing, unless an edition is pending.
func (r *Registry) Rollback(ctx context.Context, to uint64, opts ApplyOptions, rec event.Record) (Edition, Diff, error) {
	edition, diff, err := r.rollback(ctx, to, opts, rec)
	r.count("rollback", opts.DryRun, err)
	return edition, diff, err
}

func (r *Registry) rollback(ctx context.Context, to uint64, opts ApplyOptions, rec event.Record) (Edition, Diff, error) {
	if err := opts.check(); err != nil {
		return Edition{}, Diff{}, err
	}
	former, err := r.Edition(ctx, to)
	if err != nil {
		return Edition{}, Diff{}, err
	}
	s, err := load(former)
	if err != nil {
		return Edition{}, Diff{}, err
	}
	return r.change(ctx, s, Edition{Cause: CauseRollback, Restores: to}, opts, rec)
}

// change activates next with the files of s.
func (r *Registry) change(ctx context.Context, s *Set, next Edition, opts ApplyOptions, rec event.Record) (Edition, Diff, error) {
	r.writing.Lock()
	defer r.writing.Unlock()
	current := r.now()
	if current.edition.Version != opts.Expect {
		return Edition{}, Diff{}, conflict(opts.Expect, current.edition.Version)
	}
	if current.edition.State == EditionPending && (next.Cause == CauseApply || opts.ConfirmWithin != 0) {
		return Edition{}, Diff{}, &refusal.Error{
			Kind: refusal.Conflict, Code: ErrPending.Code, What: "policy set",
			Why: fmt.Sprintf("edition %d waits to be confirmed until %s", current.edition.Version, current.edition.ConfirmBy.Format(time.RFC3339)),
			Do:  "confirm it with redoubt confirm, or return with redoubt rollback, and then apply",
		}
	}
	diff := Difference(current.set.Files(), s.Files())
	if diff.Empty() && current.edition.State != EditionPending {
		e := current.edition
		e.Files = nil
		return e, diff, nil
	}
	now := wallClock()
	next.Version, next.Digest, next.Files = current.edition.Version+1, s.Digest(), s.Files()
	next.Author, next.Note, next.Created, next.State = opts.Author, opts.Note, now, EditionActive
	if opts.ConfirmWithin != 0 {
		next.State, next.ConfirmBy = EditionPending, now.Add(opts.ConfirmWithin)
	}
	if !opts.DryRun {
		if err := r.activate(ctx, s, next, current.edition.Version, rec); err != nil {
			return Edition{}, Diff{}, err
		}
	}
	next.Files = nil
	return next, diff, nil
}

func (r *Registry) activate(ctx context.Context, s *Set, next Edition, expect uint64, rec event.Record) error {
	detail := map[string]string{"version": strconv.FormatUint(next.Version, 10), "digest": next.Digest, "cause": string(next.Cause)}
	if next.Cause != CauseApply {
		detail["restores"] = strconv.FormatUint(next.Restores, 10)
	}
	if !next.ConfirmBy.IsZero() {
		detail["confirm_by"] = next.ConfirmBy.Format(time.RFC3339)
	}
	if next.Note != "" {
		detail["note"] = next.Note
	}
	for key, value := range rec.Detail {
		if _, ours := detail[key]; !ours {
			detail[key] = value
		}
	}
	rec.Detail = detail
	if err := r.store.Activate(ctx, next, expect, rec); err != nil {
		r.resync(ctx)
		return fmt.Errorf("activate edition %d: %w", next.Version, err)
	}
	r.publish(func(st *state) { st.set, st.edition = s, next })
	r.log.Info("policy set in force", "version", next.Version, "cause", string(next.Cause), "state", string(next.State))
	return nil
}

func conflict(expect, current uint64) error {
	e := *ErrConflict
	e.Why = fmt.Sprintf("edition %d is in force, not %d", current, expect)
	return &e
}

// Confirm makes the pending edition stay. Errors: [ErrConflict] if version is not in force, [ErrNotPending] if it is not
// pending or its time has run out.
func (r *Registry) Confirm(ctx context.Context, version uint64, rec event.Record) (Edition, error) {
	edition, err := r.confirm(ctx, version, rec)
	r.count("confirm", false, err)
	return edition, err
}

func (r *Registry) confirm(ctx context.Context, version uint64, rec event.Record) (Edition, error) {
	r.writing.Lock()
	defer r.writing.Unlock()
	e := r.now().edition
	switch {
	case e.Version != version:
		return Edition{}, conflict(version, e.Version)
	case e.State != EditionPending:
		return Edition{}, notPending(version, "it is confirmed already", "there is nothing to do")
	case !time.Now().Before(e.ConfirmBy):
		return Edition{}, notPending(version, "its time ran out at "+e.ConfirmBy.Format(time.RFC3339)+" and the former edition returns", "apply it again")
	}
	if err := r.store.Confirm(ctx, version, rec); err != nil {
		r.resync(ctx)
		return Edition{}, fmt.Errorf("confirm edition %d: %w", version, err)
	}
	e.State, e.ConfirmBy = EditionActive, time.Time{}
	r.publish(func(st *state) { st.edition = e })
	e.Files = nil
	return e, nil
}

func notPending(version uint64, why, do string) error {
	return &refusal.Error{
		Kind: refusal.Conflict, Code: ErrNotPending.Code, What: fmt.Sprintf("confirmation of edition %d", version), Why: why, Do: do,
	}
}

// count counts a change and how it ended.
func (r *Registry) count(verb string, dry bool, err error) {
	outcome := "done"
	switch e := refusal.As(err); {
	case err != nil && e == nil:
		outcome = "failed"
	case err != nil:
		outcome = "refused"
	case dry:
		outcome = "dry-run"
	}
	r.meter.Count("policyset_changes", 1, "verb", verb, "outcome", outcome)
}
