package handoff

// States of a pager.
const (
	Filling   State = "filling"
	Filled    State = "filled"    // all memory is here
	Saying    State = "saying"    // which the record is to say
	Overrun   State = "overrun"   // the tree must not run here
	Bereft    State = "bereft"    // an operator declared the source dead, with memory of the tree
	Stranded  State = "stranded"  // memory cannot be had
	Confessed State = "confessed" // and the tree was killed
	Hung      State = "hung"      // it could not be
)

// Events and actions of a pager.
const (
	AllHere Event = "all here"

	Fill    Action = "fill"
	Release Action = "release" // tell the agent that it may let go of the memory, too
	Hang    Action = "hang"    // hold what is missing for good
)

// Pager fills the memory of a tree that runs at the destination, and says when all of it
// is there. It lets go of what is missing only after the tree was killed.
var Pager = &Machine{
	Name:  "pager",
	First: Step{Filling, Fill},
	Steps: map[State]map[Event]Step{
		Filling: {
			AllHere:    {Filled, Release},
			SawAborted: {Overrun, Kill},
			SawGivenUp: {Bereft, Kill},
			Failed:     {Stranded, Kill},
		},
		Filled: each(Step{Saying, Complete}, Told, Untold),
		Saying: {
			Told:       {Over, End},
			Unreadable: {Over, End},
			Refused:    {Saying, Await}, // the tree is yet to be let go, or the agent to say so
			News:       {Saying, Complete},
			SawAborted: {Overrun, Kill},
			SawGivenUp: {Bereft, Kill},
		},
		Overrun: {
			Killed:   {Over, End},
			Unkilled: {Hung, Hang},
		},
		Bereft: {
			Killed:   {Conceding, Concede},
			Unkilled: {Hung, Hang},
		},
		Stranded: {
			Killed:   {Confessed, Complain},
			Unkilled: {Hung, Hang},
		},
		Conceding: each(Step{Over, End}, Told, Refused),
		Confessed: each(Step{Over, End}, Told, Untold),
	},
	Outcomes: map[Action][]Event{
		Fill:     {AllHere, SawAborted, SawGivenUp, Failed},
		Release:  {Told, Untold},
		Complete: {Told, Unreadable, Refused, SawAborted, SawGivenUp},
		Await:    {News},
		Kill:     {Killed, Unkilled},
		Concede:  {Told, Refused},
		Complain: {Told, Untold},
		Hang:     nil,
	},
}

// PagingOver says whether what a record says ends the work of a pager, and how: by
// SawAborted, as the tree must not run here, or by SawGivenUp.
func PagingOver(sight Event) (Event, bool) {
	switch sight {
	case SawAborting, SawAborted, SawReturned:
		return SawAborted, true
	case SawGivenUp:
		return SawGivenUp, true
	}
	return "", false
}

// MayComplete says whether a pager may say that all memory is there. Before the record says
// Paging, the tree may not have been let go, and with that word the source kills its copy.
func MayComplete(sight Event) bool { return sight == SawPaging || sight == SawGivenUp }
