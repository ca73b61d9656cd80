// Package handoff owns what the agents decide in a migration: when a source lets its
// frozen tree run on or kills it, when a destination commits, lets the tree run, gives it
// back or ends it, and when a pager does. Each is one table, (state, event) → (state,
// action), without clocks, goroutines or input and output: the sessions of package agent
// carry the actions out, and testenv/explore walks every way in which that can go. It must
// not know how anything is done.
package handoff

import (
	"fmt"

	"godwit/wire"
)

type (
	// State is where a party stands between two actions.
	State string
	// Event is what came of an action.
	Event string
	// Action is what a party does next. It is the same one that is begun anew for as
	// long as nothing has come of it.
	Action string
)

// Step is what follows from an event.
type Step struct {
	To State
	Do Action
}

// Machine is the table of one party.
type Machine struct {
	Name  string
	First Step // of a new session
	Steps map[State]map[Event]Step
	// Outcomes are the events that each action may have.
	Outcomes map[Action][]Event
}

const (
	// Down is where a party is whose process has ended.
	Down State = "down"
	// Over is where nothing is left to do.
	Over State = "over"

	// End ends a session and takes it out of the journal.
	End Action = "end"
	// Keep ends a session and leaves its entry in the journal, for the next start of the
	// agent or for a person.
	Keep Action = "keep"
)

// On says what follows from an event.
func (m *Machine) On(s State, e Event) (Step, bool) {
	next, ok := m.Steps[s][e]
	return next, ok
}

// Run goes on from a step to the end, which it returns. do carries out the action of a
// step and says what came of it.
func (m *Machine) Run(at Step, do func(Step) Event) Step {
	for at.Do != End && at.Do != Keep {
		e := do(at)
		next, ok := m.On(at.To, e)
		if !ok {
			// The journal and the record are as they were, from which a restart goes on.
			panic(fmt.Sprintf("handoff: %s: no step from %q by %q after %q", m.Name, at.To, e, at.Do))
		}
		at = next
	}
	return at
}

// What a record says, as far as the agents decide by it.
const (
	SawOpen     Event = "saw open"      // not committed
	SawAborting Event = "saw aborting"  // nor will it be
	SawAborted  Event = "saw aborted"   //
	SawReturned Event = "saw returning" // the tree belongs to the source again
	SawHanding  Event = "saw handing"   // committed; stuck, too
	SawPaging   Event = "saw paging"
	SawGivenUp  Event = "saw given up" // paging, and an operator declared the source dead
	SawComplete Event = "saw completed"
	Unreadable  Event = "unreadable" // there is no record
)

// Saw classifies a record.
func Saw(r *wire.Record) Event { return Sight(r.GetState(), r.GetError().GetCode()) }

// Sight is Saw by the two facts that it looks at.
func Sight(s wire.State, code wire.Code) Event {
	switch s {
	case wire.State_STATE_ABORTING:
		return SawAborting
	case wire.State_STATE_ABORTED:
		return SawAborted
	case wire.State_STATE_RETURNING:
		return SawReturned
	case wire.State_STATE_HANDING_OFF, wire.State_STATE_STUCK:
		return SawHanding
	case wire.State_STATE_PAGING:
		if code == wire.Code_CODE_ABORTED {
			return SawGivenUp
		}
		return SawPaging
	case wire.State_STATE_COMPLETED:
		return SawComplete
	}
	return SawOpen
}

var sights = []Event{SawOpen, SawAborting, SawAborted, SawReturned, SawHanding, SawPaging, SawGivenUp, SawComplete, Unreadable}

// Events of more than one machine.
const (
	Failed   Event = "failed" // for the reason that the session knows
	Refused  Event = "refused"
	Told     Event = "told"   // the record says so
	Untold   Event = "untold" // it is not known whether it does
	News     Event = "news"   // of the record, or it is time to look
	Killed   Event = "killed"
	Unkilled Event = "unkilled"
)

// Actions of more than one machine.
const (
	Read     Action = "read"     // the record
	Await    Action = "await"    // news of it
	Complain Action = "complain" // note in the record that an operator must look
	Kill     Action = "kill"     // the tree here
)

// each maps several events to one step.
func each(to Step, events ...Event) map[Event]Step {
	m := map[Event]Step{}
	for _, e := range events {
		m[e] = to
	}
	return m
}

// row joins the parts of a state's row; what stands later replaces what stands before.
func row(parts ...map[Event]Step) map[Event]Step {
	m := map[Event]Step{}
	for _, p := range parts {
		for e, s := range p {
			m[e] = s
		}
	}
	return m
}
