package plan

// Support says of one kind of object what becomes of it in a dump and a restore.
type Support struct {
	Kind    string
	Refused bool   // in every case, before anything is touched
	With    string // option of dump and restore without which it is refused, may be empty
	Note    string // what a user should know, or do, about it; may be empty
}
