package explore

import (
	"godwit/agent/handoff"
	"godwit/wire"
)

func src(w *world) *party { return &w.src }

func (m *model) srcAfter(w world, e handoff.Event, k kind) {
	doing := names[w.src.do]
	switch last := after(m.source, &w.src, e); {
	case last == handoff.End:
		w.srcNoted = unnoted
	case e == handoff.Untold && last == handoff.Keep:
		w = crashSrc(w) // only an agent that is told to stop says nothing
	}
	m.emit(w, k, "source:", doing, "-", string(e))
}

// crashSrc is the death of the source's agent.
func crashSrc(w world) world {
	w.src = party{at: idDown, do: idNone, late: w.src.late}
	if w.atSrc == frozen {
		w.atSrc = runs
	}
	return w
}

// crash is the death of the agent in the middle of an action.
func (m *model) crash(w world, what string) { m.emit(crashSrc(w), fault, "source dies:", what) }

func (m *model) sourceSteps(w world) {
	p := w.src
	if p.at == idDown {
		n := w
		if n.src.at = idOver; w.srcNoted != unnoted {
			n.src.at = idDown
			e := handoff.FoundLoose
			if w.srcNoted == withTree {
				if e = handoff.FoundTree; w.atSrc == dead || w.atSrc == killed {
					e = handoff.FoundGone
				}
			}
			after(m.source, &n.src, e)
		}
		m.emit(n, good, "the source's agent is started")
		return
	}
	m.crash(w, "after a step")
	if !w.srcDied {
		n := crashSrc(w)
		n.srcDied = true
		if n.atSrc != killed {
			n.atSrc = dead
		}
		m.emit(n, fault, "the source's host dies")
	}
	if p.at == idOver || p.at == idUnborn {
		if w.atSrc == runs && w.dst.at != idUnborn && w.srcNoted == unnoted {
			n := w
			n.src.enter(m.source.First)
			m.emit(n, good, "start is heard")
		}
		return
	}
	switch handoff.Action(names[p.do]) {
	case handoff.Claim:
		m.claim(w)
	case handoff.Freeze:
		m.srcAfter(w, handoff.Failed, good)
		if w.atSrc == runs {
			w.atSrc = frozen
			m.srcAfter(w, handoff.Frozen, good)
		}
	case handoff.Dump:
		m.srcAfter(w, handoff.Failed, good)
		m.moved(w, src, wire.RoleSource, wire.State_STATE_FINAL_COPYING, nil, func(w world, ok bool, k kind) {
			if !ok {
				m.srcAfter(w, handoff.Failed, k)
				return
			}
			m.srcAfter(w, handoff.Dumped, k)
		})
	case handoff.Secure:
		m.srcAfter(w, handoff.Failed, fault)
		w.srcNoted = withTree
		m.crash(w, "noted, not held")
		m.srcAfter(w, handoff.Failed, fault)
		if !m.plant.noHold {
			w.atSrc = held
		}
		m.srcAfter(w, handoff.Failed, fault)
		m.srcAfter(w, handoff.Secured, good)
	case handoff.Offer:
		if w.stream == arrived {
			m.srcAfter(w, handoff.Sent, good)
		}
		m.srcAfter(w, handoff.Failed, good) // the end may be on its way
		if w.stream == open {
			w.stream = underWay
			m.emit(w, good, "source: the end of the stream is sent")
		}
	case handoff.Read:
		m.srcAfter(w, w.sight(), good)
	case handoff.Await:
		m.srcAfter(w, handoff.News, good)
	case handoff.Bide:
		m.srcAfter(w, handoff.News, good)
		m.srcAfter(w, handoff.WorkEnded, good)
	case handoff.Abort:
		m.moved(w, src, wire.RoleSource, wire.State_STATE_ABORTING, nil, func(w world, ok bool, k kind) {
			if ok {
				m.srcAfter(w, handoff.Told, k)
			} else {
				m.srcAfter(w, handoff.Refused, k)
			}
		})
	case handoff.Thaw:
		n := w
		if w.atSrc == dead {
			m.srcAfter(w, handoff.Gone, good)
			return
		}
		n.trouble = true
		m.srcAfter(n, handoff.Unthawed, fault)
		w.atSrc = runs
		m.srcAfter(w, handoff.Thawed, good)
	case handoff.Conclude, handoff.GiveUp:
		n := w
		m.srcAfter(n, handoff.Untold, fault)
		n.srcNoted = begun
		m.srcAfter(n, handoff.Untold, fault)
		m.moved(w, src, wire.RoleSource, wire.State_STATE_ABORTED, nil, func(w world, _ bool, k kind) { m.srcAfter(w, handoff.Told, k) })
	case handoff.Complain:
		m.srcAfter(w, handoff.Untold, fault)
		m.moved(w, src, wire.RoleSource, wire.State_STATE_ABORTING, nil, func(w world, _ bool, k kind) {
			if w.why != codeUnknown {
				w.set(w.state(), w.by)
				w.why = codeUnknown
			}
			m.srcAfter(w, handoff.Told, k)
		})
	case handoff.Kill:
		n := w
		n.trouble = true
		m.srcAfter(n, handoff.Unkilled, fault)
		if w.atSrc != dead {
			w.atSrc = killed
		}
		m.srcAfter(w, handoff.Killed, good)
	case handoff.Report:
		m.srcAfter(w, handoff.Told, good)
	default:
		panic("source does not " + names[p.do])
	}
}

func (m *model) claim(w world) {
	m.srcAfter(w, handoff.Refused, fault)
	open := w.state() == wire.State_STATE_REQUESTED || w.state() == wire.State_STATE_PREFLIGHT || w.state() == wire.State_STATE_PRE_COPYING
	if !open && !w.src.tried {
		m.srcAfter(w, handoff.Refused, good)
		return
	}
	w.srcNoted = begun
	m.crash(w, "noted, not claimed")
	m.srcAfter(w, handoff.Failed, fault)
	m.moved(w, src, wire.RoleSource, wire.State_STATE_FREEZING, nil, func(w world, ok bool, k kind) {
		if !ok {
			m.srcAfter(w, handoff.Failed, k)
			return
		}
		m.srcAfter(w, handoff.Claimed, k)
	})
}
