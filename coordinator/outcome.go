package coordinator

import (
	"fmt"
	"strings"
	"time"

	"godwit/coordinator/rules"
	"godwit/wire"
)

// route is a migration's way for people: "alpha → beta".
func route(r *wire.Record) string { return r.Source + " → " + r.Destination }

// subject is what moves, for people: "pid 412 (redis-server)".
func subject(r *wire.Record) string {
	s := fmt.Sprintf("pid %d", r.Pid)
	if r.Comm != "" {
		s += " (" + printable(r.Comm) + ")"
	}
	return s
}

// touched reports whether the tree was ever stopped or read from.
func touched(r *wire.Record) bool {
	for _, s := range r.Steps {
		switch s.State {
		case wire.State_STATE_PRE_COPYING, wire.State_STATE_FREEZING:
			return true
		}
	}
	return false
}

// lost reports whether the tree ended with a host that had memory of it which was yet to come.
func lost(r *wire.Record) bool {
	return r.State == wire.State_STATE_COMPLETED && r.GetError().GetCode() == wire.Code_CODE_ABORTED
}

// over reports whether nothing more will happen by itself: the migration has
// ended, or only an operator can go on.
func over(r *wire.Record) bool {
	return wire.Terminal(r.State) || stuck(r)
}

func stuck(r *wire.Record) bool {
	return rules.Stuck(r.State, r.GetError().GetCode())
}

// outcome is how a migration ended in one word: completed, aborted, refused,
// failed, stuck, lost; or "running". Refused and failed: before anything was touched.
func outcome(r *wire.Record) string {
	switch {
	case stuck(r):
		return "stuck"
	case lost(r):
		return "lost"
	case r.State == wire.State_STATE_COMPLETED:
		return "completed"
	case r.State != wire.State_STATE_ABORTED:
		return "running"
	case !touched(r) && r.GetError().GetCode() == wire.Code_CODE_REFUSED:
		return "refused"
	case !touched(r) && r.Error != nil && r.Error.Code != wire.Code_CODE_ABORTED:
		return "failed"
	}
	return "aborted"
}

// failureOf is a migration's outcome as an error: nil if it completed or still
// runs.
func failureOf(r *wire.Record) error {
	var why *wire.Failure
	if f := r.GetError().Failure(); f != nil {
		why = f
	}
	switch outcome(r) {
	case "completed", "running":
		return nil
	case "lost":
		return wire.Errorf(wire.Code_CODE_ABORTED, "%s is lost: it ran at %s when %s was given up, which still had memory of it (%s)", subject(r), r.Destination, r.Source, clause(r, why))
	case "stuck":
		f := &wire.Failure{Code: wire.Code_CODE_UNKNOWN_STATE}
		if r.State == wire.State_STATE_STUCK {
			f.Message = fmt.Sprintf("migration %s is stuck: %s has committed to run %s and does not answer; the copy at %s stays frozen until it does, so see whether %s runs there and whether its agent can be started; if %s is gone for good: godwit resolve %s --destination-is-dead",
				r.Id, r.Destination, subject(r), r.Source, subject(r), r.Destination, r.Id)
		} else {
			f.Message = fmt.Sprintf("migration %s stopped in state %s (%s); look at %s on %s", r.Id, r.State.Word(), clause(r, why), subject(r), r.Source)
		}
		return f
	case "refused", "failed":
		if why.Message == "" {
			why.Message = r.Reason
		}
		f := *why
		f.Message += tail(why.Message, fmt.Sprintf("the tree of %s on %s was not touched", subject(r), r.Source))
		return &f
	}
	f := &wire.Failure{Code: wire.Code_CODE_ABORTED}
	f.Message = fmt.Sprintf("migration %s to %s was aborted (%s); %s runs on at %s", r.Id, r.Destination, clause(r, why), subject(r), r.Source)
	if why != nil {
		f.Problems = why.Problems
	}
	return f
}

// tail is an addition to a sentence, unless that says so already.
func tail(sentence, addition string) string {
	if strings.Contains(sentence, "nothing was touched") {
		return ""
	}
	return "; " + addition
}

// clause says why a migration ended, with place and phase.
func clause(r *wire.Record, why *wire.Failure) string {
	if why == nil {
		if r.Reason == "" {
			return "no reason was given"
		}
		return r.Reason
	}
	bare := *why
	bare.Problems = nil
	return bare.Error()
}

// lasted is the time from the request to the last step, by the clocks of those
// who made the two.
func lasted(r *wire.Record) time.Duration {
	if len(r.Steps) == 0 {
		return 0
	}
	return max(0, time.Duration(r.Steps[len(r.Steps)-1].UnixMs-r.Steps[0].UnixMs)*time.Millisecond)
}
