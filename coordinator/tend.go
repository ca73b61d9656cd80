package coordinator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"godwit/wire"
)

// patience says how long a migration may be silent: no change of its record, no
// progress.
type patience struct {
	// probe: after it the agents are asked for a sign of life.
	probe time.Duration
	// dead: a party that has to do the next step and gave no sign of life for
	// so long counts as dead.
	dead time.Duration
	// orphan: a migration that was not started by then never will be; whoever
	// asked for it has gone. Longer than all calls before the start together.
	orphan time.Duration
}

var defaultPatience = patience{probe: 5 * time.Second, dead: 40 * time.Second, orphan: 2 * time.Minute}

// sign is what is known of an agent.
type sign uint8

const (
	signUnknown sign = iota // not asked, or this side is cut off
	signAlive
	signDead // the bus says that it is not there, or it gave no answer
)

// verdict is what a coordinator does about a silent migration.
type verdict uint8

const (
	verdictWait   verdict = iota // nothing
	verdictRemind                // aborting: tell the agents again
	verdictAbort                 // ask to abort
	verdictStuck                 // the destination committed and is gone
	verdictLost                  // nobody is there who could go on
)

// judge decides about a migration in state s that has been silent for the given
// time, with these signs of its agents. It never decides where a tree runs:
// before the commit that is the source's business, after it the destination's.
func judge(s wire.State, silent time.Duration, source, destination sign, p patience) verdict {
	deadlong := func(g sign) bool { return g == signDead && silent >= p.dead }
	switch s {
	case wire.State_STATE_REQUESTED, wire.State_STATE_PREFLIGHT:
		if silent >= p.orphan {
			return verdictAbort
		}
	case wire.State_STATE_PRE_COPYING, wire.State_STATE_FREEZING, wire.State_STATE_FINAL_COPYING, wire.State_STATE_RESTORING, wire.State_STATE_STAGED:
		switch {
		case deadlong(source) && deadlong(destination):
			return verdictLost
		case deadlong(source) || deadlong(destination):
			return verdictAbort
		}
	case wire.State_STATE_ABORTING:
		switch {
		case deadlong(source):
			return verdictLost
		case source == signAlive && silent >= p.probe:
			return verdictRemind
		}
	case wire.State_STATE_HANDING_OFF:
		if deadlong(destination) {
			return verdictStuck
		}
	case wire.State_STATE_RETURNING:
		if deadlong(source) {
			return verdictLost
		}
	}
	return verdictWait
}

// signs asks both agents for a sign of life.
func signs(ctx context.Context, l *link, rec *wire.Record) (source, destination sign) {
	ask := func(host string) sign {
		is, known := alive(ctx, l.nc, host)
		switch {
		case !known:
			return signUnknown
		case is:
			return signAlive
		}
		return signDead
	}
	var wg sync.WaitGroup
	wg.Go(func() { source = ask(rec.Source) })
	wg.Go(func() { destination = ask(rec.Destination) })
	wg.Wait()
	return source, destination
}

// tended is the result of one tend.
type tended struct {
	verdict verdict
	note    string // for people; empty if there is nothing to say
}

// tend looks after a migration that has been silent for a while and carries out
// the verdict. Of several coordinators that do it at once the record's
// compare-and-set lets one win; the others see its change.
func tend(ctx context.Context, l *link, rec *wire.Record, silent time.Duration, p patience) tended {
	source, destination := signUnknown, signUnknown
	if silent >= p.probe {
		source, destination = signs(ctx, l, rec)
	}
	v := judge(rec.State, silent, source, destination, p)
	t := tended{verdict: v}
	gone := ""
	switch {
	case source == signDead && destination == signDead:
		gone = rec.Source + " and " + rec.Destination
	case source == signDead:
		gone = rec.Source
	case destination == signDead:
		gone = rec.Destination
	}
	switch v {
	case verdictRemind:
		if _, err := tellAbort(ctx, l, rec); err != nil {
			t.note = err.Error()
		}
	case verdictAbort:
		reason := fmt.Sprintf("no sign of life of %s for %s", gone, formatDuration(silent))
		if rec.State == wire.State_STATE_REQUESTED || rec.State == wire.State_STATE_PREFLIGHT {
			reason = fmt.Sprintf("it was not started within %s: whoever asked for it has gone", formatDuration(silent))
		}
		why := wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%s", reason)
		t.note = reason + ": aborting"
		if _, err := askAbort(ctx, l, rec.Id, reason, why); err != nil {
			t.note += "; " + err.Error()
		}
	case verdictStuck:
		t.note = fmt.Sprintf("%s has committed to run the tree and gives no sign of life", rec.Destination)
		if _, err := l.records.Change(ctx, rec.Id, func(r *wire.Record) error {
			if r.State != wire.State_STATE_HANDING_OFF {
				return nil
			}
			return r.Move(wire.State_STATE_STUCK, wire.RoleCoordinator, coordinatorName, time.Now())
		}); err != nil {
			t.note += "; " + err.Error()
		}
	case verdictLost:
		t.note = fmt.Sprintf("no sign of life of %s for %s, and nobody else can end the migration", gone, formatDuration(silent))
	case verdictWait:
		if gone != "" {
			t.note = "no sign of life of " + gone + ", waiting"
		}
	}
	return t
}
