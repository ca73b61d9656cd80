package plan

// Kin is a process among others.
type Kin struct {
	Pid, Sid int
	Parent   int // index of its parent, -1 for the root, which is the first
}

// Births gives the indexes of processes, parents before children, in the order in
// which a restore makes them: each with all its descendants before the next, and
// those first that were born before their parent began its own session. It is the
// order in which a dump gives the memory of processes, so that a child can be
// cloned out of a parent that has its memory.
func Births(all []Kin) []int {
	children := make([][]int, len(all))
	for i, k := range all {
		if k.Parent >= 0 {
			children[k.Parent] = append(children[k.Parent], i)
		}
	}
	out := make([]int, 0, len(all))
	var grow func(i, session int)
	grow = func(i, session int) {
		out = append(out, i)
		own := all[i].Sid
		for _, early := range []bool{true, false} {
			for _, c := range children[i] {
				if (all[i].Pid == own && all[c].Sid == session && session != own) == early {
					grow(c, own)
				}
			}
		}
	}
	if len(all) > 0 {
		grow(0, all[0].Sid)
	}
	return out
}
