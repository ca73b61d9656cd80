package explore

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"godwit/agent/handoff"
	"godwit/coordinator/rules"
	"godwit/wire"
)

// kind says what it takes for a step to be made.
type kind uint8

const (
	good  kind = iota // it is made some day, in a cluster that works
	fault             // it may be made
	word              // an operator makes it, who is right
)

// step is one of the ways on from a world.
type step struct {
	to   world
	kind kind
	what string
}

// model is what is explored.
type model struct {
	paged               bool
	source, dest, pager *handoff.Machine
	settles             func(wire.State, wire.Code) bool
	plant               plant

	mute bool // steps need no names
	out  []step
}

// plant are bugs that are not in a table.
type plant struct {
	noCompare     bool // the commit is written whatever the record says meanwhile
	noHold        bool // the second hold is forgotten
	runUndecided  bool // a commit counts as made although nobody knows
	eager         bool // the pager says Completed although the tree may not run yet
	commitUnnoted bool // the commit does not wait for the journal
	looseMemory   bool // the pager lets go before all memory is there
}

func newModel(paged bool) *model {
	return &model{paged: paged, source: handoff.Source, dest: handoff.Destination, pager: handoff.Pager, settles: rules.Settles}
}

// with is a machine with one row changed.
func with(m *handoff.Machine, s handoff.State, e handoff.Event, to handoff.Step) *handoff.Machine {
	c := *m
	c.Steps = maps.Clone(m.Steps)
	c.Steps[s] = maps.Clone(m.Steps[s])
	c.Steps[s][e] = to
	return &c
}

func (m *model) first() world {
	w := world{rec: uint8(wire.State_STATE_PREFLIGHT), by: wire.RoleCoordinator, atSrc: runs}
	w.src.at, w.dst.at, w.pager.at = idUnborn, idUnborn, idUnborn
	return w
}

// found is what an exploration found.
type found struct {
	states, steps int
	problem       string // empty: none
	trace         []string
}

// explore walks all worlds, breadth first, until there is no new one, and stops at the
// first that breaks a rule.
func (m *model) explore() found {
	index := map[world]int32{}
	var list []world
	var parent []int32
	var edges []uint32 // to<<2 | kind, those of world i from starts[i] on
	starts := []int32{0}
	add := func(w world, from int32) int32 {
		if i, ok := index[w]; ok {
			return i
		}
		i := int32(len(list))
		index[w] = i
		list, parent = append(list, w), append(parent, from)
		return i
	}
	m.mute = true
	defer func() { m.mute = false }()
	trace := func(i int32) (out []string) {
		m.mute = false
		for ; i >= 0; i = parent[i] {
			what := "begin"
			if p := parent[i]; p >= 0 {
				for _, s := range m.next(list[p]) {
					if s.to == list[i] {
						what = s.what
						break
					}
				}
			}
			out = append(out, fmt.Sprintf("%-42s %s", what, list[i]))
		}
		slices.Reverse(out)
		return out
	}
	add(m.first(), -1)
	for i := 0; i < len(list); i++ {
		if why := m.broken(list[i]); why != "" {
			return found{len(list), len(edges), why, trace(int32(i))}
		}
		for _, s := range m.next(list[i]) {
			edges = append(edges, uint32(add(s.to, int32(i)))<<2|uint32(s.kind))
		}
		starts = append(starts, int32(len(edges)))
	}
	f := found{states: len(list), steps: len(edges)}
	// From every world, a working cluster leads to an end or to where an operator is
	// asked, and from there an operator to an end.
	ends := make([]bool, len(list))
	waits := make([]bool, len(list))
	for i, w := range list {
		ends[i] = m.ended(w)
		waits[i] = ends[i] || m.asksOperator(w)
	}
	for _, way := range []struct {
		to   []bool
		most kind
		of   func(world) bool
		says string
	}{
		{waits, good, func(world) bool { return true }, "no way leads to an end, nor to where an operator is asked"},
		{ends, word, func(w world) bool { return !w.trouble && !gone(w) }, "no way leads to an end, with an operator"},
	} {
		for grew := true; grew; {
			grew = false
			for i := len(list) - 1; i >= 0; i-- {
				for k := starts[i]; k < starts[i+1] && !way.to[i]; k++ {
					if k := edges[k]; (kind(k&3) == good || kind(k&3) == way.most) && way.to[k>>2] {
						way.to[i], grew = true, true
					}
				}
			}
		}
		for i, w := range list {
			if !way.to[i] && way.of(w) {
				f.problem, f.trace = way.says, trace(int32(i))
				return f
			}
		}
	}
	return f
}

// broken says which rule a world breaks; empty: none.
func (m *model) broken(w world) string {
	over := func(p party) bool { return p.at == idOver || p.at == idUnborn || p.at == idDown }
	switch s := w.state(); {
	case w.atSrc == runs && w.runsAtDst() && !w.wrong:
		return "two copies run"
	case s == wire.State_STATE_ABORTED && w.atSrc != runs && !w.srcDied && !w.lostWord:
		return "Aborted promises that the tree runs at the source"
	case s == wire.State_STATE_COMPLETED && (!w.ran || w.missing) && !w.lostWord:
		return "Completed promises that all of the tree runs at the destination"
	case w.atSrc == killed && s != wire.State_STATE_COMPLETED:
		return "the copy at the source was killed before Completed"
	case (w.atSrc == held || w.atSrc == frozen) && over(w.src) && w.srcNoted != withTree && !w.trouble:
		return "a frozen tree has no owner"
	case w.runsAtDst() && w.missing && !w.agentHolds && over(w.pager) && !w.gap && !w.trouble:
		return "the kernel fills missing memory with zeros"
	}
	return ""
}

// ended says whether a migration is through: the tree runs exactly once, unless it died
// with the only host that could have it or by the word of an operator.
func (m *model) ended(w world) bool {
	over := func(p party) bool { return p.at == idOver || p.at == idUnborn }
	if !wire.Terminal(w.state()) || !over(w.src) || !over(w.dst) || !over(w.pager) && w.pager.at != idDown ||
		w.atSrc == frozen || w.atSrc == held || w.srcNoted != unnoted || w.dstNoted != unnoted {
		return false
	}
	copies := 0
	for _, is := range []bool{w.atSrc == runs, w.runsAtDst()} {
		if is {
			copies++
		}
	}
	if copies == 0 {
		return w.lostWord || w.state() == wire.State_STATE_COMPLETED && w.dstDied || w.state() == wire.State_STATE_ABORTED && w.srcDied
	}
	return copies == 1
}

// asksOperator says whether a record or a log says that an operator must look.
func (m *model) asksOperator(w world) bool {
	return w.trouble || w.why == codeUnknown || rules.Stuck(w.state(), w.why.wire())
}

// gone says that the source's copy died with its host, and no other is whole, or is about to
// be killed by the word of an operator who was wrong. If none ever is, all that is asked for
// is that somebody is told.
func gone(w world) bool { return w.atSrc == dead && (w.atDst != runs || w.wrong) }

// next lists the ways on.
func (m *model) next(w world) []step {
	m.out = m.out[:0]
	m.sourceSteps(w)
	m.destinationSteps(w)
	m.pagerSteps(w)
	m.coordinatorSteps(w)
	m.busSteps(w)
	return m.out
}

func (m *model) emit(w world, k kind, what ...string) {
	s := step{to: w, kind: k}
	if !m.mute {
		s.what = strings.Join(what, " ")
	}
	m.out = append(m.out, s)
}

// after makes the step of a machine that follows from an event.
func after(mach *handoff.Machine, p *party, e handoff.Event) (last handoff.Action) {
	s, ok := mach.On(handoff.State(names[p.at]), e)
	if !ok {
		panic(fmt.Sprintf("%s: no step from %q by %q", mach.Name, names[p.at], e))
	}
	p.enter(s)
	return s.Do
}

func (p *party) enter(s handoff.Step) {
	p.at, p.do, p.tried = id(s.To), id(s.Do), false
	if p.do == idEnd || p.do == idKeep {
		p.do = idNone
	}
}

// moved is a try at a move of the record by a party, as package agent's ledger does it:
// made, made without an answer, on its way, or refused. It goes on until it is made or
// refused.
func (m *model) moved(w world, who func(*world) *party, role wire.Role, to wire.State, edit func(*world), then func(w world, ok bool, k kind)) {
	p := who(&w)
	switch {
	case p.tried && w.state() == to && w.by == role:
		then(w, true, good)
		return
	case !wire.CanMove(w.state(), to, role):
		then(w, false, good)
		return
	}
	made := w
	made.set(to, role)
	if edit != nil {
		edit(&made)
	}
	then(made, true, good)
	lost := made
	who(&lost).tried = true
	m.emit(lost, fault, role.String(), "makes it", phases[to], "(answer lost)")
	if bit := uint16(1) << to; p.late&bit == 0 {
		delayed := w
		q := who(&delayed)
		q.late, q.tried = q.late|bit, true
		m.emit(delayed, fault, role.String(), "makes it", phases[to], "(on its way)")
	}
}

// busSteps let changes of the record arrive that were on their way.
func (m *model) busSteps(w world) {
	for _, x := range []struct {
		late uint16
		role wire.Role
	}{{w.src.late, wire.RoleSource}, {w.dst.late, wire.RoleDestination}, {w.pager.late, wire.RoleDestination}} {
		for to := wire.State(0); x.late>>to != 0; to++ {
			if x.late&(1<<to) == 0 {
				continue
			}
			n := w
			n.set(to, x.role)
			m.emit(n, fault, "the", x.role.String(), "made it", phases[to], "(late)")
		}
	}
	if m.plant.noCompare && w.dst.do == id(handoff.Commit) && w.dst.tried && w.state() != wire.State_STATE_HANDING_OFF && w.state() != wire.State_STATE_COMPLETED {
		n := w
		n.set(wire.State_STATE_HANDING_OFF, wire.RoleDestination)
		m.emit(n, fault, "destination's handing off arrives, whatever the record says")
	}
}
