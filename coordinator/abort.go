package coordinator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"godwit/coordinator/rules"
	"godwit/transport"
	"godwit/wire"
)

// coordinatorName is who makes the coordinator's steps in a record.
const coordinatorName = "coordinator"

// abortCallTimeout bounds an agent's answer to abort, which waits until the
// tree runs again.
const abortCallTimeout = 10 * time.Second

// askAbort ends a migration before its commit: the record first, for it decides
// between this and a commit in the same moment, then the agents. Before
// anything was frozen the record is Aborted at once; later it is Aborting, and
// the source makes it Aborted when the tree runs. why may be nil.
//
// It returns the record as it was last seen. An error with CODE_CONFLICT says
// that the migration is committed or has completed.
func askAbort(ctx context.Context, l *link, id, reason string, why error) (*wire.Record, error) {
	rec, err := l.records.Change(ctx, id, func(r *wire.Record) error {
		to, late := rules.Abort(r.State)
		switch {
		case late:
			return tooLate(r)
		case to == 0:
			return nil
		}
		if err := r.Move(to, wire.RoleCoordinator, coordinatorName, time.Now()); err != nil {
			return err
		}
		r.Reason = reason
		r.Error = wire.ErrorOf(why)
		return nil
	})
	if err != nil {
		return rec, err
	}
	return tellAbort(ctx, l, rec)
}

// tooLate says why a committed migration is not aborted.
func tooLate(r *wire.Record) error {
	where := fmt.Sprintf("the tree belongs to %s now", r.Destination)
	switch r.State {
	case wire.State_STATE_COMPLETED:
		where = fmt.Sprintf("the tree runs on %s", r.Destination)
		if r.LandedPid != 0 {
			where += fmt.Sprintf(" as pid %d", r.LandedPid)
		}
	case wire.State_STATE_RETURNING:
		where = fmt.Sprintf("%s gives the tree back to %s", r.Destination, r.Source)
	case wire.State_STATE_STUCK:
		where = fmt.Sprintf("%s has committed and does not answer", r.Destination)
	}
	return wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is %s and can no longer be aborted: %s", r.Id, r.State.Word(), where)
}

// tellAbort tells both agents that a migration is aborting or aborted. If the
// source says that it holds nothing of it, the record that waits for its word
// is made Aborted here.
func tellAbort(ctx context.Context, l *link, rec *wire.Record) (*wire.Record, error) {
	reason := rec.Reason
	if reason == "" {
		reason = "aborted"
	}
	var srcErr, dstErr error
	var wg sync.WaitGroup
	wg.Go(func() { srcErr = callAbort(ctx, l.nc, rec.Source, rec.Id, reason) })
	wg.Go(func() { dstErr = callAbort(ctx, l.nc, rec.Destination, rec.Id, reason) })
	wg.Wait()
	if holdsNothing(srcErr) {
		srcErr = nil
		var err error
		if rec, err = settleAborted(ctx, l, rec); err != nil {
			return rec, err
		}
	}
	if holdsNothing(dstErr) {
		dstErr = nil
	}
	if current, _, err := l.records.Get(ctx, rec.Id); err == nil {
		rec = current
	}
	if wire.Terminal(rec.State) {
		return rec, nil // who did not hear it reads it in the record
	}
	return rec, errors.Join(srcErr, dstErr)
}

// settleAborted makes an Aborting record Aborted.
//
// Preconditions: the source said that it holds nothing of the migration.
func settleAborted(ctx context.Context, l *link, rec *wire.Record) (*wire.Record, error) {
	return l.records.Change(ctx, rec.Id, func(r *wire.Record) error {
		if !rules.Settles(r.State, r.GetError().GetCode()) {
			return nil
		}
		return r.Move(wire.State_STATE_ABORTED, wire.RoleCoordinator, coordinatorName, time.Now())
	})
}

func callAbort(ctx context.Context, nc *nats.Conn, host, id, reason string) error {
	ctx, cancel := context.WithTimeout(ctx, abortCallTimeout)
	defer cancel()
	_, err := transport.Call[*wire.AbortRequest, *wire.AbortReply](ctx, nc, host, "abort", &wire.AbortRequest{Id: id, Reason: reason})
	return err
}

// holdsNothing: the agent answered that it knows nothing of the migration.
func holdsNothing(err error) bool { return wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND }
