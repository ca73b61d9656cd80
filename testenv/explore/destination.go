package explore

import (
	"godwit/agent/handoff"
	"godwit/wire"
)

func dst(w *world) *party { return &w.dst }

func (m *model) dstAfter(w world, e handoff.Event, k kind) {
	doing := names[w.dst.do]
	switch after(m.dest, &w.dst, e) {
	case handoff.End:
		w.dstNoted = unnoted
		w.agentHolds = false
	case handoff.Keep:
		w.agentHolds = false
	}
	m.emit(w, k, "destination:", doing, "-", string(e))
}

// crashDst is the death of the destination's agent.
func crashDst(w world) world {
	w.dst = party{at: idDown, do: idNone, late: w.dst.late}
	if w.atDst == built {
		w.atDst = nothing
	}
	w.agentHolds = false
	if w.missing && w.pager.at == idDown {
		w.gap = true
	}
	return w
}

// dieDst is the death of the destination's host.
func dieDst(w world) world {
	w = crashDst(w)
	w.atDst, w.dstRebooted, w.dstDied = nothing, true, true
	if w.pager.at != idUnborn {
		w.pager = party{at: idDown, do: idNone, late: w.pager.late}
	}
	return w
}

func (m *model) destinationSteps(w world) {
	p := w.dst
	if p.at == idDown {
		n := w
		if n.dst.at = idOver; w.dstNoted != unnoted {
			n.dst.at = idDown
			after(m.dest, &n.dst, handoff.FoundHere)
		}
		m.emit(n, good, "the destination's agent is started")
		return
	}
	m.emit(crashDst(w), fault, "destination dies: after a step")
	m.emit(dieDst(w), fault, "the destination's host dies")
	switch p.at {
	case idUnborn:
		n := w
		n.dst.enter(m.dest.First)
		m.emit(n, good, "prepare is heard")
		return
	case idOver:
		return
	}
	moved := func(w world, to wire.State, yes, no handoff.Event) {
		m.moved(w, dst, wire.RoleDestination, to, nil, func(w world, ok bool, k kind) {
			if ok {
				m.dstAfter(w, yes, k)
			} else {
				m.dstAfter(w, no, k)
			}
		})
	}
	switch handoff.Action(names[p.do]) {
	case handoff.Prepare:
		m.dstAfter(w, handoff.Refused, good)
		w.dstNoted, w.dstRebooted = begun, false
		m.dstAfter(w, handoff.Prepared, good)
	case handoff.Receive:
		m.receive(w)
	case handoff.Stage:
		m.dstAfter(w, handoff.Failed, good)
		m.noteTree(w)
		moved(w, wire.State_STATE_STAGED, handoff.Staged, handoff.Failed)
	case handoff.Commit:
		m.noteTree(w)
		if !w.dst.tried {
			m.dstAfter(w, handoff.Failed, good)
		}
		if w.dstNoted < withTree && !m.plant.commitUnnoted {
			return
		}
		if m.plant.runUndecided && w.dst.tried {
			m.dstAfter(w, handoff.Owner, fault)
		}
		moved(w, wire.State_STATE_HANDING_OFF, handoff.Owner, handoff.Failed)
	case handoff.Run:
		if w.atDst == nothing { // its pager has killed it
			m.dstAfter(w, handoff.Failed, good)
			return
		}
		m.dstAfter(w, handoff.Failed, fault)
		n := w
		if n.atDst, n.ran = runs, true; w.atDst == built {
			n.atDst, n.ran = partial, w.ran
			m.emit(n, good, "destination: some of the tree is let go")
			return
		}
		m.dstAfter(n, handoff.Ran, good)
	case handoff.NoteRan:
		m.dstAfter(w, handoff.Failed, fault)
		w.dstNoted = withRan
		m.dstAfter(w, handoff.Noted, good)
	case handoff.Complete:
		to, yes := wire.State_STATE_COMPLETED, handoff.Told
		if m.paged {
			to, yes = wire.State_STATE_PAGING, handoff.Pages
		}
		moved(w, to, yes, handoff.Denied(w.sight()))
	case handoff.Tell:
		m.tell(w)
	case handoff.Drop:
		n := w
		n.trouble = true
		m.dstAfter(n, handoff.Undropped, fault)
		if w.atDst != nothing {
			w.atDst = nothing
		}
		m.dstAfter(w, handoff.Dropped, good)
	case handoff.Return:
		moved(w, wire.State_STATE_RETURNING, handoff.Told, handoff.Denied(w.sight()))
	case handoff.Complain:
		m.dstAfter(w, handoff.Untold, fault)
		w.set(w.state(), w.by)
		w.why = codeUnknown
		m.dstAfter(w, handoff.Told, good)
	case handoff.Kill:
		n := w
		n.trouble = true
		m.dstAfter(n, handoff.Unkilled, fault)
		w.atDst = nothing
		m.dstAfter(w, handoff.Killed, good)
	case handoff.Read:
		m.dstAfter(w, w.sight(), good)
	case handoff.Watch:
		if s := w.sight(); w.pager.at == idDown || w.pager.at == idOver {
			if s != handoff.SawComplete && s != handoff.SawReturned && s != handoff.SawAborted {
				m.dstAfter(w, handoff.PagerGone, good)
			}
		}
		m.dstAfter(w, w.sight(), good)
	case handoff.Await:
		m.dstAfter(w, handoff.News, good)
	case handoff.Look:
		e := handoff.Partial
		if w.dstNoted >= withTree && !w.dstRebooted && (w.dstNoted == withRan || w.atDst == runs) {
			e = handoff.Lives
		}
		m.dstAfter(w, e, good)
	case handoff.Doom:
		if w.state() != wire.State_STATE_PAGING {
			m.dstAfter(w, handoff.Overtaken, good)
			return
		}
		w.set(w.state(), w.by)
		if w.why != codeAborted {
			w.why = codeUnknown
		}
		m.dstAfter(w, handoff.Told, good)
	case handoff.Concede:
		moved(w, wire.State_STATE_COMPLETED, handoff.Told, handoff.Refused)
	default:
		panic("destination does not " + names[p.do])
	}
}

// noteTree is the journal's part of the commit, which is written meanwhile.
func (m *model) noteTree(w world) {
	if w.dstNoted == begun {
		w.dstNoted = withTree
		m.emit(w, good, "destination: the tree is noted")
	}
}

func (m *model) receive(w world) {
	n := w
	if n.stream != arrived {
		n.stream = broken
	}
	m.dstAfter(n, handoff.Failed, good)
	n.atDst = built
	m.dstAfter(n, handoff.Failed, fault) // after it was built
	if w.state() == wire.State_STATE_FINAL_COPYING {
		m.moved(w, dst, wire.RoleDestination, wire.State_STATE_RESTORING, nil, func(w world, ok bool, k kind) {
			m.emit(w, k, "destination: the record says restoring")
		})
	}
	if w.stream == underWay {
		n := w
		n.stream = arrived
		m.emit(n, good, "the end of the stream arrives")
	}
	if w.stream == arrived && w.state() == wire.State_STATE_RESTORING {
		w.atDst = built
		if m.paged {
			w.missing, w.agentHolds = true, true
			w.pager.enter(m.pager.First)
		}
		m.dstAfter(w, handoff.Built, good)
	}
}

func (m *model) tell(w world) {
	k := fault
	if w.dst.at == id(handoff.Aborting) {
		n := w
		last := after(m.dest, &n.dst, handoff.Untold)
		if last == handoff.Keep { // only an agent that is told to stop says nothing
			m.emit(crashDst(n), fault, "destination: tell: untold")
		} else {
			m.emit(n, fault, "destination: tell: untold")
		}
	} else {
		m.dstAfter(w, handoff.Untold, k)
	}
	s := w.state()
	to := wire.State_STATE_ABORTING
	if s < wire.State_STATE_PRE_COPYING {
		to = wire.State_STATE_ABORTED
	}
	switch {
	case wire.Committed(s):
		m.dstAfter(w, handoff.Overtaken, good)
	case wire.Terminal(s) || s == wire.State_STATE_ABORTING:
		m.dstAfter(w, handoff.Told, good)
	default:
		m.moved(w, dst, wire.RoleDestination, to, nil, func(w world, ok bool, k kind) {
			if ok {
				m.dstAfter(w, handoff.Told, k)
			}
		})
	}
}
