package wire

// Text is a lane for people.
func (x *Lane) Text() string {
	switch {
	case x.GetDirect():
		return "direct " + x.Address
	case x.GetReason() != "":
		return "cluster (direct: " + x.Reason + ")"
	}
	return "cluster"
}
