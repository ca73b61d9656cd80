package handoff

// States of a source session.
const (
	Claiming   State = "claiming"   // the stream is opened, the record moved
	Freezing   State = "freezing"   // the tree runs, or is copied as it runs
	Copying    State = "copying"    // frozen
	Securing   State = "securing"   // all was read, but the end of the stream is not sent
	Offering   State = "offering"   // from here on the destination may have all of it
	Waiting    State = "waiting"    // it has
	Ending     State = "ending"     // it may have, and this side wants to end the migration
	Committed  State = "committed"  // the record was seen at or past the commit
	Retreating State = "retreating" // nobody else can have the tree
	Resuming   State = "resuming"   // the record says that nobody else has
	Concluding State = "concluding" // the tree runs here
	Troubled   State = "troubled"   // it could not be let go
	Bereaved   State = "bereaved"   // nothing of it is left
	Empty      State = "empty"      // the same, but it may run elsewhere
	Lamenting  State = "lamenting"  // the same, where memory of it is missed
	GivingUp   State = "giving up"  // it was never frozen
	Discarding State = "discarding" // the tree runs at the destination
	Reporting  State = "reporting"  // the frozen copy is gone
	Owing      State = "owing"      // it is not
)

// Events and actions of a source session.
const (
	Claimed    Event = "claimed"
	Frozen     Event = "frozen"
	Dumped     Event = "dumped"
	Secured    Event = "secured"
	Sent       Event = "sent"
	WorkEnded  Event = "work ended" // aborted, timed out, the agent told to stop
	Thawed     Event = "thawed"
	Unthawed   Event = "unthawed"
	Gone       Event = "gone"        // it died with its host, or by somebody's hand
	FoundTree  Event = "found tree"  // in the journal: the end of the stream may have been sent
	FoundGone  Event = "found gone"  // in the journal, but nothing of it is left
	FoundLoose Event = "found loose" // in the journal without its tree: it was not

	Claim    Action = "claim"    // open the stream, note it in the journal, move the record to Freezing
	Freeze   Action = "freeze"   // copy the running tree, and stop it
	Dump     Action = "dump"     // read it, and move the record to FinalCopying
	Secure   Action = "secure"   // note the tree in the journal, and have it stay frozen without the agent
	Offer    Action = "offer"    // send the end of the stream, and wait until all was applied
	Bide     Action = "bide"     // await news of the record, or the end of the work
	Abort    Action = "abort"    // move the record to Aborting
	Thaw     Action = "thaw"     // let the tree run
	Conclude Action = "conclude" // move the record to Aborted, unless it is
	GiveUp   Action = "give up"  // the same of a tree that was never frozen
	Report   Action = "report"   // note in the record how it went
)

// Source is the session of the host that a tree leaves. The tree is only let go when the
// destination cannot commit, because it has not all of it (Retreating) or the record says
// so (Resuming), and only killed when the record says that it runs there (Discarding).
var Source = &Machine{
	Name:  "source",
	First: Step{Claiming, Claim},
	Steps: map[State]map[Event]Step{
		Down: {
			FoundTree:  {Ending, Read},
			FoundLoose: {Retreating, Thaw},
			FoundGone:  {Empty, Read},
		},
		Claiming: {
			Claimed: {Freezing, Freeze},
			Refused: {Over, End},
			Failed:  {GivingUp, GiveUp},
		},
		Freezing: {
			Frozen: {Copying, Dump},
			Failed: {GivingUp, GiveUp},
		},
		GivingUp: {
			Told:   {Over, End},
			Untold: {Over, Keep},
		},
		Copying: {
			Dumped: {Securing, Secure},
			Failed: {Retreating, Thaw},
		},
		Securing: {
			Secured: {Offering, Offer},
			Failed:  {Retreating, Thaw},
		},
		Offering: {
			Sent:   {Waiting, Read},
			Failed: {Ending, Read},
		},
		Waiting: row(outcome, map[Event]Step{
			SawOpen:    {Waiting, Bide},
			Unreadable: {Waiting, Bide},
			News:       {Waiting, Read},
			WorkEnded:  {Ending, Read},
		}),
		Ending: row(outcome, map[Event]Step{
			SawOpen:    {Ending, Abort},
			Unreadable: {Ending, Await}, // without the record nobody knows who runs it
			News:       {Ending, Read},
			Told:       {Ending, Read},
			Refused:    {Ending, Await}, // somebody else was faster
		}),
		Committed: row(outcome, map[Event]Step{
			SawOpen:    {Committed, Await},
			Unreadable: {Committed, Await},
			News:       {Committed, Read},
		}),
		Empty: row(
			each(Step{Bereaved, Complain}, SawAborting, SawAborted, SawReturned),
			each(Step{Empty, Await}, SawHanding, SawGivenUp, Unreadable, Refused),
			each(Step{Empty, Read}, News, Told),
			map[Event]Step{
				SawOpen:     {Empty, Abort},
				SawPaging:   {Lamenting, Complain},
				SawComplete: {Over, End},
			}),
		Lamenting: each(Step{Empty, Await}, Told, Untold),
		Retreating: {
			Thawed:   {Concluding, Conclude},
			Unthawed: {Troubled, Complain},
			Gone:     {Bereaved, Complain},
		},
		Resuming: {
			Thawed:   {Concluding, Conclude},
			Unthawed: {Troubled, Complain},
			Gone:     {Bereaved, Complain},
		},
		Concluding: {
			Told:   {Over, End},
			Untold: {Over, Keep},
		},
		Bereaved: {
			Told:   {Over, End},
			Untold: {Over, Keep},
		},
		Troubled: each(Step{Over, Keep}, Told, Untold),
		Discarding: {
			Killed:   {Reporting, Report},
			Unkilled: {Owing, Report},
		},
		Reporting: each(Step{Over, End}, Told, Untold),
		Owing:     each(Step{Over, Keep}, Told, Untold),
	},
	Outcomes: map[Action][]Event{
		Claim:    {Claimed, Refused, Failed},
		Freeze:   {Frozen, Failed},
		Dump:     {Dumped, Failed},
		Secure:   {Secured, Failed},
		Offer:    {Sent, Failed},
		Read:     sights,
		Await:    {News},
		Bide:     {News, WorkEnded},
		Abort:    {Told, Refused},
		Thaw:     {Thawed, Unthawed, Gone},
		Conclude: {Told, Untold},
		GiveUp:   {Told, Untold},
		Complain: {Told, Untold},
		Kill:     {Killed, Unkilled},
		Report:   {Told, Untold},
	},
}

// outcome is what a source does about a record that decides who runs the tree.
var outcome = row(
	each(Step{Resuming, Thaw}, SawAborting, SawAborted, SawReturned),
	each(Step{Committed, Await}, SawHanding, SawPaging, SawGivenUp),
	each(Step{Discarding, Kill}, SawComplete),
)
