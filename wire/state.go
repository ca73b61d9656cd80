package wire

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// States of a migration and who moves it on. The transitions are data, so that
// coordinator and agents cannot disagree about them:
//
//	Requested ─► Preflight ─► PreCopying ─► Freezing ─► FinalCopying ─► Restoring ─► Staged ══► HandingOff ─► [Paging ─►] Completed
//	    │            │  └───────────┼──────────▲│             │              │          │   ▲      │ │            │        ▲
//	    └────────────┴──────────────┴───────────┴──┬──────────┴──────────────┴──────────┘   │      │ └─► Stuck ───┼────────┤
//	                                               ▼                                  commit point ▼              ▼        ▼
//	                                           Aborting ─► Aborted ◄─────────────────────────── Returning ◄───────┴────────┘
//
// Paging is for post-copy: the tree runs at the destination while memory of it is still at the
// source, so that both are needed.
//
// Before the commit point the source owns the tree, and every party may end
// the migration: nothing has run at the destination yet. After it the
// destination owns the tree; only it can give it back (Returning), and only
// the source then ends the migration, when its copy runs again.

// Role is the part that somebody plays in one migration.
type Role uint8

const (
	// RoleCoordinator asks for the migration and may ask to abort it.
	RoleCoordinator Role = 1 + iota
	// RoleSource is the agent of the host that the tree leaves.
	RoleSource
	// RoleDestination is the agent of the host where the tree lands.
	RoleDestination
)

// String is the role's name in messages.
func (r Role) String() string {
	switch r {
	case RoleCoordinator:
		return "coordinator"
	case RoleSource:
		return "source"
	case RoleDestination:
		return "destination"
	}
	return fmt.Sprintf("role %d", uint8(r))
}

type roles []Role

var (
	coordinator = roles{RoleCoordinator}
	source      = roles{RoleSource}
	destination = roles{RoleDestination}
	anybody     = roles{RoleCoordinator, RoleSource, RoleDestination}
	agents      = roles{RoleSource, RoleDestination}
	waiting     = roles{RoleCoordinator, RoleSource}
)

// moves is the one table of transitions. Once Freezing was entered, the
// coordinator only asks (Aborting): Aborted promises that the tree runs at the
// source, and the agents are the ones to see to that. The coordinator may
// write Aborting→Aborted only after the source told that it holds nothing of
// that migration.
var moves = map[State]map[State]roles{
	State_STATE_REQUESTED: {
		State_STATE_PREFLIGHT: coordinator,
		State_STATE_ABORTING:  anybody,
		State_STATE_ABORTED:   anybody,
	},
	State_STATE_PREFLIGHT: {
		State_STATE_PRE_COPYING: source,
		State_STATE_FREEZING:    source,
		State_STATE_ABORTING:    anybody,
		State_STATE_ABORTED:     anybody,
	},
	State_STATE_PRE_COPYING: {
		State_STATE_FREEZING: source,
		State_STATE_ABORTING: anybody,
		State_STATE_ABORTED:  agents,
	},
	State_STATE_FREEZING: {
		State_STATE_FINAL_COPYING: source,
		State_STATE_ABORTING:      anybody,
		State_STATE_ABORTED:       agents,
	},
	State_STATE_FINAL_COPYING: {
		State_STATE_RESTORING: destination,
		State_STATE_ABORTING:  anybody,
		State_STATE_ABORTED:   agents,
	},
	State_STATE_RESTORING: {
		State_STATE_STAGED:   destination,
		State_STATE_ABORTING: anybody,
		State_STATE_ABORTED:  agents,
	},
	State_STATE_STAGED: {
		State_STATE_HANDING_OFF: destination, // the commit point
		State_STATE_ABORTING:    anybody,
		State_STATE_ABORTED:     agents,
	},
	State_STATE_HANDING_OFF: {
		State_STATE_COMPLETED: destination,
		State_STATE_PAGING:    destination,
		State_STATE_RETURNING: destination,
		State_STATE_STUCK:     waiting,
	},
	State_STATE_STUCK: {
		// The destination came back and knows what became of its copy, or an
		// operator gave the word that it was fenced.
		State_STATE_COMPLETED: destination,
		State_STATE_PAGING:    destination,
		State_STATE_RETURNING: {RoleDestination, RoleCoordinator},
	},
	State_STATE_PAGING: {
		State_STATE_COMPLETED: destination,
		State_STATE_RETURNING: coordinator, // the word of an operator: the destination is gone for good
	},
	State_STATE_RETURNING: {
		State_STATE_ABORTED: source,
	},
	State_STATE_ABORTING: {
		State_STATE_ABORTED: anybody,
	},
}

// CanMove reports whether a party in the role by may change a record from
// state from to state to. Staying is not a move.
func CanMove(from, to State, by Role) bool {
	return slices.Contains(moves[from][to], by)
}

// Terminal reports whether a migration in state s is over.
func Terminal(s State) bool {
	return s == State_STATE_COMPLETED || s == State_STATE_ABORTED
}

// Committed reports whether the destination owns the tree in state s, or did
// when the state was entered: the migration can no longer be aborted.
// Returning counts as committed, for it is the destination's own decision;
// Aborted, where it leads, does not.
func Committed(s State) bool {
	switch s {
	case State_STATE_HANDING_OFF, State_STATE_PAGING, State_STATE_COMPLETED, State_STATE_RETURNING, State_STATE_STUCK:
		return true
	}
	return false
}

// Word is s for people: "pre-copying", "final copying", "handing off". A state
// that this build does not know is "state 42".
func (s State) Word() string {
	if _, known := State_name[int32(s)]; !known {
		return fmt.Sprintf("state %d", int32(s))
	}
	if s == State_STATE_PRE_COPYING {
		return "pre-copying"
	}
	return strings.ToLower(strings.ReplaceAll(s.Phase(), "_", " "))
}

// Phase is the form of s that stands in Failure.Phase and Error.phase:
// "FREEZING".
func (s State) Phase() string { return strings.TrimPrefix(s.String(), "STATE_") }

// Move changes r to state to, if a party in the role by may do that, and
// notes the step with the name who (a host, or "coordinator"); now is the
// mover's clock. Owner follows the state. Otherwise r is unchanged and the
// error is a *Failure: CODE_ABORTED if the migration is aborting or aborted,
// CODE_CONFLICT in all other cases. The caller stores r by compare-and-set,
// which also sets epoch and time of the change.
func (r *Record) Move(to State, by Role, who string, now time.Time) error {
	from := r.GetState()
	if !CanMove(from, to, by) {
		code := Code_CODE_CONFLICT
		if from == State_STATE_ABORTING || from == State_STATE_ABORTED {
			code = Code_CODE_ABORTED
		}
		return Errorf(code, "migration %s is %s and the %s cannot make it %s", r.GetId(), from.Word(), by, to.Word())
	}
	r.enter(to, who, now)
	return nil
}

// Start puts a new record into Requested and notes that step.
//
// Preconditions: r is in no state yet.
func (r *Record) Start(who string, now time.Time) {
	r.Protocol = Version
	r.enter(State_STATE_REQUESTED, who, now)
}

func (r *Record) enter(s State, who string, now time.Time) {
	r.State = s
	r.Owner = Owner_OWNER_SOURCE
	switch s {
	case State_STATE_HANDING_OFF, State_STATE_PAGING, State_STATE_COMPLETED, State_STATE_STUCK:
		r.Owner = Owner_OWNER_DESTINATION
	}
	r.Steps = append(r.Steps, &Step{State: s, UnixMs: now.UnixMilli(), By: who})
}

// PrecopyWorth is the memory of a tree from which on it travels while the tree runs,
// unless somebody wants it otherwise, bytes: less takes no longer than all else.
const PrecopyWorth = 64 << 20
