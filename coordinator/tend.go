package coordinator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"godwit/coordinator/rules"
	"godwit/wire"
)

var defaultPatience = rules.Patience{Probe: 5 * time.Second, Dead: 40 * time.Second, Orphan: 2 * time.Minute}

// signs asks both agents for a sign of life.
func signs(ctx context.Context, l *link, rec *wire.Record) (source, destination rules.Sign) {
	ask := func(host string) rules.Sign {
		is, known := alive(ctx, l.nc, host)
		switch {
		case !known:
			return rules.Unknown
		case is:
			return rules.Alive
		}
		return rules.Dead
	}
	var wg sync.WaitGroup
	wg.Go(func() { source = ask(rec.Source) })
	wg.Go(func() { destination = ask(rec.Destination) })
	wg.Wait()
	return source, destination
}

// tended is the result of one tend.
type tended struct {
	verdict rules.Verdict
	note    string // for people; empty if there is nothing to say
}

// tend looks after a migration that has been silent for a while and carries out
// the verdict. Of several coordinators that do it at once the record's
// compare-and-set lets one win; the others see its change.
func tend(ctx context.Context, l *link, rec *wire.Record, silent time.Duration, p rules.Patience) tended {
	source, destination := rules.Unknown, rules.Unknown
	if silent >= p.Probe {
		source, destination = signs(ctx, l, rec)
	}
	v := rules.Judge(rec.State, silent, source, destination, p)
	t := tended{verdict: v}
	gone := ""
	switch {
	case source == rules.Dead && destination == rules.Dead:
		gone = rec.Source + " and " + rec.Destination
	case source == rules.Dead:
		gone = rec.Source
	case destination == rules.Dead:
		gone = rec.Destination
	}
	switch v {
	case rules.Remind:
		if _, err := tellAbort(ctx, l, rec); err != nil {
			t.note = err.Error()
		}
	case rules.AskAbort:
		reason := fmt.Sprintf("no sign of life of %s for %s", gone, formatDuration(silent))
		if rec.State == wire.State_STATE_REQUESTED || rec.State == wire.State_STATE_PREFLIGHT {
			reason = fmt.Sprintf("it was not started within %s: whoever asked for it has gone", formatDuration(silent))
		}
		why := wire.Errorf(wire.Code_CODE_UNAVAILABLE, "%s", reason)
		t.note = reason + ": aborting"
		if _, err := askAbort(ctx, l, rec.Id, reason, why); err != nil {
			t.note += "; " + err.Error()
		}
	case rules.MarkStuck:
		t.note = fmt.Sprintf("%s has committed to run the tree and gives no sign of life", rec.Destination)
		if _, err := l.records.Change(ctx, rec.Id, func(r *wire.Record) error {
			if r.State != wire.State_STATE_HANDING_OFF {
				return nil
			}
			return r.Move(wire.State_STATE_STUCK, wire.RoleCoordinator, coordinatorName, time.Now())
		}); err != nil {
			t.note += "; " + err.Error()
		}
	case rules.Lost:
		t.note = fmt.Sprintf("no sign of life of %s for %s, and nobody else can end the migration", gone, formatDuration(silent))
	case rules.Wait:
		if gone != "" {
			t.note = "no sign of life of " + gone + ", waiting"
		}
	}
	return t
}
