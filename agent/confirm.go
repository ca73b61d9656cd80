package agent

import (
	"fmt"
	"slices"
	"strings"

	"godwit/configs/external"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

// confirm gives what compares the objects of a frozen tree with those for which
// the destination holds something: the entries in force must come to the same. A
// tree that opened another file meanwhile is not moved with the one that it had.
// nil: nothing is to be compared.
func confirm(req *wire.StartRequest) (func([]plan.Object) []engine.Problem, error) {
	if len(req.Entries) == 0 {
		return nil, nil
	}
	var rules []external.Rule
	for _, x := range req.Entries {
		e, err := external.Parse(x.Text)
		if err != nil {
			return nil, invalid("an entry in force, of %s: %w", x.Origin, err)
		}
		rules = append(rules, external.Rule{Entry: e, Origin: x.Origin, Asked: x.Asked})
	}
	return func(frozen []plan.Object) []engine.Problem {
		return changes(openObjects(frozen), rules, req.Resolutions)
	}, nil
}

// changes lists what became of the objects since they were resolved.
func changes(frozen []*wire.OpenObject, rules []external.Rule, planned []*wire.Resolution) []engine.Problem {
	var out []engine.Problem
	add := func(o *wire.Object, reason string) {
		out = append(out, engine.Problem{
			Pid: int(o.Pid), Comm: o.Comm, FD: int(o.Fd), HasFD: o.HasFd, Path: o.Path, Key: o.Key,
			Reason: "since the plan was made, " + reason, Hint: "migrate again",
		})
	}
	choices, bad := match(frozen, rules)
	for _, p := range bad {
		o := &wire.Object{}
		if p.Object >= 0 {
			o = nameObject(frozen[p.Object])
		}
		add(o, fmt.Sprintf("%s: %s", p.Rule, p.Reason))
	}
	left := map[string]*wire.Resolution{}
	for _, r := range planned {
		left[r.Key] = r
	}
	for _, c := range choices {
		o := frozen[c.Objects[0]]
		was := left[c.Key]
		delete(left, c.Key)
		switch {
		case c.Rule.Entry.Resolver == external.Carry && (was == nil && inTree(planned, c.Rule.Entry) || was != nil && was.Entry == c.Rule.Entry.String()):
			// What is in a directory that travels does, and what travels is read now.
		case was == nil:
			reason := fmt.Sprintf("this was opened, for which there is %s", c.Rule)
			if before := formerly(planned, o); before != nil {
				reason = fmt.Sprintf("this came in place of %s, for which there is %s", describe(before), c.Rule)
			}
			add(nameObject(o), reason)
		case was.Entry != c.Rule.Entry.String():
			add(nameObject(o), fmt.Sprintf("%s came to be for this in place of %s", c.Rule.Entry, was.Entry))
		case len(was.Objects) > 0 && another(was.Objects[0], o):
			add(nameObject(o), fmt.Sprintf("another file came in place of %s, with its inode number", describe(was.Objects[0])))
		}
	}
	for _, r := range planned {
		if left[r.Key] != nil && r.Entry != "" && r.Resolver != external.Carry { // which nobody holds
			add(objectOf(r), fmt.Sprintf("%s leads to this no longer", r.Entry))
		}
	}
	return out
}

// inTree says whether an entry lets a whole directory travel.
func inTree(planned []*wire.Resolution, e external.Entry) bool {
	return slices.ContainsFunc(carriedTrees(planned), func(t carriedTree) bool { return t.r.Entry == e.String() })
}

// formerly finds what was planned at a descriptor that leads to o now.
func formerly(planned []*wire.Resolution, o *wire.OpenObject) *wire.OpenObject {
	for _, r := range planned {
		for _, was := range r.Objects {
			for _, h := range was.Holders {
				for _, g := range o.Holders {
					if h.Pid == g.Pid && slices.ContainsFunc(h.Fds, func(fd int32) bool { return slices.Contains(g.Fds, fd) }) {
						return was
					}
				}
			}
		}
	}
	return nil
}

// another says whether two objects of one key are of different files: an inode
// number is used again once its file is gone.
func another(was, is *wire.OpenObject) bool {
	return was.Mode&fileType != is.Mode&fileType || was.Rdev != is.Rdev || was.BirthNs != 0 && is.BirthNs != 0 && was.BirthNs != is.BirthNs
}

// fileType is S_IFMT.
const fileType = 0o170000

// describe is an object in few words.
func describe(o *wire.OpenObject) string {
	name := o.Path
	if name == "" {
		name = o.Link
	}
	return strings.TrimSpace(o.Kind + " " + name)
}
