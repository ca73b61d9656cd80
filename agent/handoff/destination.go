package handoff

// States of a destination session.
const (
	Preparing  State = "preparing"   // it is checked, files are held
	Receiving  State = "receiving"   // the tree is built
	Staging    State = "staging"     // it stands
	Committing State = "committing"  // the record may say so from now on
	Landing    State = "landing"     // it belongs to this host
	Landed     State = "landed"      // it runs
	Telling    State = "telling"     // which the record is to say
	Paging     State = "paging"      // while memory of it is yet to come
	Abandoning State = "abandoning"  // it was not committed, nor will it be
	Dropping   State = "dropping"    // the record says so
	DroppingIt State = "dropping it" // the record is yet to say so
	Withdrawn  State = "withdrawn"   // and is told once more
	GivingBack State = "giving back" // it could not be started
	Returning  State = "returning"   // nothing of it is left here
	Baffled    State = "baffled"     // and parts of it may run
	Fencing    State = "fencing"     // it runs, or is about to, at the source
	Losing     State = "losing"      // its pager died
	Lost       State = "lost"        // and it with that
	Conceding  State = "conceding"   // with no other copy
	Answering  State = "answering"   // after a restart of the agent
	Looking    State = "looking"     // it was committed
	Sweeping   State = "sweeping"    // a part of it may run
	Aborting   State = "aborting"    // nothing of it has run
)

// Events and actions of a destination session.
const (
	Prepared  Event = "prepared"
	Built     Event = "built"
	Staged    Event = "staged"
	Owner     Event = "owner" // for certain
	Ran       Event = "ran"
	Noted     Event = "noted"
	Pages     Event = "told paging" // the record says so, and the pager says the rest
	Overruled Event = "overruled"   // the record gives the tree to the source
	Overtaken Event = "overtaken"   // the record is committed after all
	Dropped   Event = "dropped"
	Undropped Event = "undropped"
	PagerGone Event = "pager gone"
	Lives     Event = "lives"   // it was let go here in this boot
	Partial   Event = "partial" // not all of it was, or it died with the host
	Damaged   Event = "damaged" // there is a record, which makes no sense
	FoundHere Event = "found"   // in the journal

	Prepare  Action = "prepare"
	Receive  Action = "receive" // build the tree up to the verified end of the stream
	Stage    Action = "stage"   // note it in the journal, and move the record to Staged
	Commit   Action = "commit"  // move the record to HandingOff, however long that takes
	Run      Action = "run"
	NoteRan  Action = "note ran"
	Complete Action = "complete" // move the record to Completed, or to Paging
	Tell     Action = "tell"     // move the record to Aborting, unless it ends already
	Drop     Action = "drop"     // what was built
	Return   Action = "return"   // move the record to Returning
	Watch    Action = "watch"    // read the record, and see whether the pager lives
	Look     Action = "look"     // whether the tree lives
	Doom     Action = "doom"     // note in the record that the pager died, as long as it says Paging
	Concede  Action = "concede"  // move the record to Completed: lost
)

// Destination is the session of the host where a tree lands. No task of the tree runs
// before the commit is known to have succeeded, and what ran is given back only when
// nothing of it is left.
var Destination = &Machine{
	Name:  "destination",
	First: Step{Preparing, Prepare},
	Steps: map[State]map[Event]Step{
		Down: {FoundHere: {Answering, Read}},
		Preparing: {
			Prepared: {Receiving, Receive},
			Refused:  {Over, End},
		},
		Receiving: {
			Built:  {Staging, Stage},
			Failed: {Abandoning, Tell},
		},
		Staging: {
			Staged: {Committing, Commit},
			Failed: {Abandoning, Tell},
		},
		Committing: {
			Owner:  {Landing, Run},
			Failed: {Abandoning, Tell},
		},
		Landing: {
			Ran:    {Landed, NoteRan},
			Failed: {GivingBack, Drop},
		},
		Landed: each(Step{Telling, Complete}, Noted, Failed),
		Telling: {
			Told:      {Over, End},
			Pages:     {Paging, Watch},
			Overruled: {Fencing, Kill},
			Refused:   {Over, Keep},
		},
		Paging: row(
			each(Step{Paging, Await}, SawOpen, SawAborting, SawHanding, SawPaging, SawGivenUp),
			each(Step{Fencing, Kill}, SawAborted, SawReturned),
			map[Event]Step{
				SawComplete: {Over, End},
				PagerGone:   {Losing, Doom},
				Damaged:     {Over, Keep},
				Unreadable:  {Over, End},
				News:        {Paging, Watch},
			}),
		Losing: {
			// The kernel fills what is missing with zeros.
			Told:      {Lost, Kill},
			Overtaken: {Paging, Watch}, // its last word was on its way
		},
		Lost: row(
			each(Step{Lost, Await}, SawOpen, SawAborting, SawHanding, SawPaging),
			each(Step{Over, End}, SawAborted, SawReturned, SawComplete, Unreadable),
			map[Event]Step{
				Killed:     {Lost, Read},
				Damaged:    {Over, Keep},
				Unkilled:   {Over, Keep},
				SawGivenUp: {Conceding, Concede},
				News:       {Lost, Read},
			}),
		Conceding: each(Step{Over, End}, Told, Refused),
		Abandoning: {
			Told:      {Dropping, Drop},
			Overtaken: {Dropping, Drop},
			Untold:    {DroppingIt, Drop},
		},
		Dropping: {
			Dropped:   {Over, End},
			Undropped: {Over, Keep},
		},
		DroppingIt: {
			Dropped:   {Withdrawn, Tell},
			Undropped: {Over, Keep},
		},
		Withdrawn: each(Step{Over, End}, Told, Overtaken, Untold),
		GivingBack: {
			Dropped:   {Returning, Return},
			Undropped: {Baffled, Complain},
		},
		Returning: {
			Told:      {Over, End},
			Overruled: {Over, End},
			Pages:     {Losing, Doom}, // the word of an agent that died was on its way
			Refused:   {Over, Keep},
		},
		Baffled: each(Step{Over, Keep}, Told, Untold),
		Fencing: {
			Killed:   {Over, End},
			Unkilled: {Over, Keep},
		},
		Answering: row(
			each(Step{Aborting, Tell}, SawOpen, SawAborting),
			each(Step{Fencing, Kill}, SawAborted, SawReturned),
			each(Step{Paging, Watch}, SawPaging, SawGivenUp),
			map[Event]Step{
				SawHanding:  {Looking, Look},
				SawComplete: {Over, End},
				Unreadable:  {Over, End},
				Damaged:     {Over, Keep},
			}),
		Aborting: {
			Told:      {Over, End},
			Untold:    {Over, Keep},
			Overtaken: {Answering, Read}, // by a commit that was on its way when the agent died
		},
		Looking: {
			Lives:   {Telling, Complete},
			Partial: {Sweeping, Kill},
		},
		Sweeping: {
			Killed:   {Returning, Return},
			Unkilled: {Over, Keep},
		},
	},
	Outcomes: map[Action][]Event{
		Prepare:  {Prepared, Refused},
		Receive:  {Built, Failed},
		Stage:    {Staged, Failed},
		Commit:   {Owner, Failed},
		Run:      {Ran, Failed},
		NoteRan:  {Noted, Failed},
		Complete: {Told, Pages, Overruled, Refused},
		Tell:     {Told, Overtaken, Untold},
		Drop:     {Dropped, Undropped},
		Return:   {Told, Pages, Overruled, Refused},
		Complain: {Told, Untold},
		Kill:     {Killed, Unkilled},
		Read:     append([]Event{Damaged}, sights...),
		Watch:    append([]Event{PagerGone, Damaged}, sights...),
		Await:    {News},
		Look:     {Lives, Partial},
		Doom:     {Told, Overtaken},
		Concede:  {Told, Refused},
	},
}

// Denied says what a refused Complete or Return comes to, by what the record says: another
// attempt of the same, of an agent that has died, may have been made late.
func Denied(sight Event) Event {
	switch sight {
	case SawComplete:
		return Told
	case SawPaging, SawGivenUp:
		return Pages
	case SawReturned, SawAborted:
		return Overruled
	}
	return Refused
}
