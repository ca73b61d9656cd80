// Package rules owns what a coordinator decides about a migration by its record and by
// signs of life of its agents, without clocks, goroutines or input and output. Package
// coordinator carries that out, and testenv/explore walks every way in which it can go. It
// must not know how anything is done.
package rules

import (
	"time"

	"godwit/wire"
)

// Patience says how long a migration may be silent: no change of its record, no
// progress.
type Patience struct {
	// Probe: after it the agents are asked for a sign of life.
	Probe time.Duration
	// Dead: a party that has to do the next step and gave no sign of life for
	// so long counts as dead.
	Dead time.Duration
	// Orphan: a migration that was not started by then never will be; whoever
	// asked for it has gone. Longer than all calls before the start together.
	Orphan time.Duration
}

// Sign is what is known of an agent.
type Sign uint8

const (
	Unknown Sign = iota // not asked, or this side is cut off
	Alive
	Dead // the bus says that it is not there, or it gave no answer
)

// Verdict is what a coordinator does about a silent migration.
type Verdict uint8

const (
	Wait      Verdict = iota // nothing
	Remind                   // aborting: tell the agents again
	AskAbort                 // ask to abort
	MarkStuck                // the destination committed and is gone
	Lost                     // nobody is there who could go on
)

// Judge decides about a migration in state s that has been silent for the given
// time, with these signs of its agents. It never decides where a tree runs:
// before the commit that is the source's business, after it the destination's.
func Judge(s wire.State, silent time.Duration, source, destination Sign, p Patience) Verdict {
	deadlong := func(g Sign) bool { return g == Dead && silent >= p.Dead }
	switch s {
	case wire.State_STATE_REQUESTED, wire.State_STATE_PREFLIGHT:
		if silent >= p.Orphan {
			return AskAbort
		}
	case wire.State_STATE_PRE_COPYING, wire.State_STATE_FREEZING, wire.State_STATE_FINAL_COPYING, wire.State_STATE_RESTORING, wire.State_STATE_STAGED:
		switch {
		case deadlong(source) && deadlong(destination):
			return Lost
		case deadlong(source) || deadlong(destination):
			return AskAbort
		}
	case wire.State_STATE_ABORTING:
		switch {
		case deadlong(source):
			return Lost
		case source == Alive && silent >= p.Probe:
			return Remind
		}
	case wire.State_STATE_HANDING_OFF:
		if deadlong(destination) {
			return MarkStuck
		}
	case wire.State_STATE_RETURNING:
		if deadlong(source) {
			return Lost
		}
	}
	return Wait
}

// Abort is where asking to abort takes a record; the zero State: it stays. tooLate says
// that the migration is committed. Before anything was frozen the record is Aborted at
// once; later it is Aborting, and the source makes it Aborted when the tree runs.
func Abort(s wire.State) (to wire.State, tooLate bool) {
	switch {
	case s == wire.State_STATE_ABORTING || s == wire.State_STATE_ABORTED:
		return 0, false
	case wire.Committed(s):
		return 0, true
	case wire.CanMove(s, wire.State_STATE_ABORTED, wire.RoleCoordinator):
		return wire.State_STATE_ABORTED, false
	}
	return wire.State_STATE_ABORTING, false
}

// Settles says whether a record is Aborted by the word of its source that it holds nothing
// of the migration. A stuck one is not: its source holds nothing any more, for it failed to
// let the tree go.
func Settles(s wire.State, why wire.Code) bool {
	return s == wire.State_STATE_ABORTING && !Stuck(s, why)
}

// Stuck says whether only an operator can go on, by a record's state and the code of its
// error.
func Stuck(s wire.State, why wire.Code) bool {
	return s == wire.State_STATE_STUCK || !wire.Terminal(s) && why == wire.Code_CODE_UNKNOWN_STATE
}

// Word is what an operator's word that a host is dead does to a migration.
type Word uint8

const (
	Ended     Word = iota // nothing: it has ended
	TooEarly              // nothing: the destination has not committed
	Returns               // nothing: the source lets the tree run already
	NotNeeded             // nothing: the destination owns the tree, and does not need the source
	GivesBack             // the tree belongs to the source again
	Rewinds               // the same, from where it was frozen, of a tree that has run at the destination
	Ends                  // the destination ends the tree, and then the migration
	Aborts                // it is Aborted
)

// Pronounce says what the word that a host is dead does to a migration in state s.
func Pronounce(s wire.State, destinationDead bool) Word {
	switch {
	case wire.Terminal(s):
		return Ended
	case destinationDead && !wire.Committed(s):
		return TooEarly
	case destinationDead && s == wire.State_STATE_RETURNING:
		return Returns
	case destinationDead && s == wire.State_STATE_PAGING:
		return Rewinds
	case destinationDead:
		return GivesBack
	case s == wire.State_STATE_PAGING:
		return Ends
	case wire.Committed(s):
		return NotNeeded
	}
	return Aborts
}

// Steps are those that a record in state s takes by such a word. None: it stays where it
// is, with the word as its error, or the word does nothing.
func (w Word) Steps(s wire.State) []wire.State {
	var all []wire.State
	switch w {
	case GivesBack:
		if s != wire.State_STATE_STUCK {
			all = append(all, wire.State_STATE_STUCK)
		}
		all = append(all, wire.State_STATE_RETURNING)
	case Rewinds:
		all = []wire.State{wire.State_STATE_RETURNING}
	case Aborts:
		if !wire.CanMove(s, wire.State_STATE_ABORTED, wire.RoleCoordinator) {
			all = append(all, wire.State_STATE_ABORTING)
		}
		all = append(all, wire.State_STATE_ABORTED)
	}
	return all
}
