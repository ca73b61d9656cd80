package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/transport"
	"godwit/wire"
)

// Records is what sessions need of the records of migrations;
// *transport.Records has it.
type Records interface {
	Get(ctx context.Context, id string) (*wire.Record, uint64, error)
	Change(ctx context.Context, id string, fn func(*wire.Record) error) (*wire.Record, error)
	Watch(ctx context.Context, id string) (<-chan transport.RecordEvent, error)
}

const (
	// recordTry bounds one attempt at the record; the bus may be away for
	// longer, and the attempt is then made again.
	recordTry = 3 * time.Second
	// recordPause is the pause between two attempts, at most.
	recordPause = time.Second
	// recordPoll is how often the record is read although nothing was heard
	// of a change, in case that the watch is deaf.
	recordPoll = 2 * time.Second
)

// errUndecided is a change of the record of which nobody knows whether it was made.
var errUndecided = errors.New("it is not known whether the record was changed")

// ledger is one session's view of its migration's record. Its calls go on
// trying for as long as the context lives: the bus may be away for a while, and
// nothing that hangs on the record may be decided without it.
type ledger struct {
	records Records
	id      string
	host    string
	role    wire.Role
	log     hclog.Logger
}

// move takes the record to state to; edit, which may be nil, changes more of
// it in the same step. An error is a *wire.Failure if the record is in a state
// from which that cannot be done (CODE_ABORTED, CODE_CONFLICT) or is not there
// (CODE_NOT_FOUND); it comes with the record as it is. If ctx ended with the
// outcome of an attempt open, the error is an errUndecided.
func (l *ledger) move(ctx context.Context, to wire.State, edit func(*wire.Record)) (*wire.Record, error) {
	tried := false
	return l.change(ctx, "make it "+to.Word(), &tried, func(r *wire.Record) error {
		if tried && r.State == to && lastBy(r) == l.host {
			return nil // an attempt whose answer was lost had been made
		}
		if err := r.Move(to, l.role, l.host, time.Now()); err != nil {
			return err
		}
		if edit != nil {
			edit(r)
		}
		return nil
	})
}

// note changes the record without moving it. edit must be repeatable.
func (l *ledger) note(ctx context.Context, edit func(*wire.Record)) (*wire.Record, error) {
	tried := false
	return l.change(ctx, "add to it", &tried, func(r *wire.Record) error {
		edit(r)
		return nil
	})
}

// read returns the record as it is.
func (l *ledger) read(ctx context.Context) (*wire.Record, error) {
	tried := false
	return l.change(ctx, "read it", &tried, func(*wire.Record) error { return nil })
}

// change runs Records.Change until its outcome is known. *tried tells fn that
// an earlier attempt may have been made after all.
func (l *ledger) change(ctx context.Context, what string, tried *bool, fn func(*wire.Record) error) (*wire.Record, error) {
	pause := 20 * time.Millisecond
	for n := 0; ; n++ {
		try, cancel := context.WithTimeout(ctx, recordTry)
		rec, err := l.records.Change(try, l.id, fn)
		cancel()
		if err == nil {
			if n > 0 {
				l.log.Info("the record can be used again", "state", rec.State.Word())
			}
			return rec, nil
		}
		if f, ok := errors.AsType[*wire.Failure](err); ok && !errors.Is(err, transport.ErrDisconnected) && f.Code != wire.Code_CODE_UNAVAILABLE {
			return rec, f
		}
		*tried = true
		if n == 0 || n%30 == 0 {
			l.log.Warn("the migration's record cannot be used; trying again", "to", what, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("record of migration %s: %s: %w: %w", l.id, what, errUndecided, context.Cause(ctx))
		case <-time.After(pause):
		}
		pause = min(pause*2, recordPause)
	}
}

// lastBy is who entered the record's state.
func lastBy(r *wire.Record) string {
	if n := len(r.Steps); n > 0 {
		return r.Steps[n-1].By
	}
	return ""
}

// feed follows a record. It hears of changes by a watch, and by reading now
// and then.
type feed struct {
	latest  atomic.Pointer[wire.Record]
	changed chan struct{} // holds one token after a change
	heard   func(*wire.Record)
}

// follow starts a feed that lasts until ctx ends and calls heard with each
// newer record.
func (l *ledger) follow(ctx context.Context, heard func(*wire.Record)) *feed {
	f := &feed{changed: make(chan struct{}, 1), heard: heard}
	go func() {
		for ctx.Err() == nil {
			f.watch(ctx, l)
			select {
			case <-ctx.Done():
			case <-time.After(recordPause):
			}
		}
	}()
	return f
}

func (f *feed) watch(ctx context.Context, l *ledger) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := l.records.Watch(ctx, l.id)
	if err != nil {
		l.log.Debug("watch the record", "error", err)
	}
	poll := time.NewTicker(recordPoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case ev, ok := <-events: // blocks for good without a watch
			if !ok {
				return
			}
			f.see(ev.Record)
		case <-poll.C:
			try, cancel := context.WithTimeout(ctx, recordTry)
			rec, _, err := l.records.Get(try, l.id)
			cancel()
			if err == nil {
				f.see(rec)
			}
			if events == nil {
				return // and try to watch again
			}
		}
	}
}

// see takes rec over if it is newer than what is known.
func (f *feed) see(rec *wire.Record) {
	if rec == nil {
		return
	}
	if old := f.latest.Load(); old != nil && old.Epoch >= rec.Epoch {
		return
	}
	f.latest.Store(rec)
	f.heard(rec)
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// ended returns why a record says that its migration must not go on towards
// the commit, or nil.
func ended(rec *wire.Record) error {
	if rec == nil {
		return nil
	}
	if s := rec.State; s != wire.State_STATE_ABORTING && s != wire.State_STATE_ABORTED {
		return nil
	}
	reason := rec.Reason
	if reason == "" {
		reason = "without a reason given"
	}
	return &wire.Failure{Code: wire.Code_CODE_ABORTED, Message: "the migration was aborted by " + lastBy(rec) + ": " + reason}
}
