package explore

import (
	"godwit/agent/handoff"
	"godwit/wire"
)

func pager(w *world) *party { return &w.pager }

func (m *model) pagerAfter(w world, e handoff.Event, k kind) {
	doing := names[w.pager.do]
	after(m.pager, &w.pager, e)
	m.emit(w, k, "pager:", doing, "-", string(e))
}

func (m *model) pagerSteps(w world) {
	p := w.pager
	if p.at == idUnborn || p.at == idOver || p.at == idDown {
		return
	}
	n := w
	n.pager = party{at: idDown, do: idNone, late: p.late}
	if w.missing && !w.agentHolds {
		n.gap = true
	}
	m.emit(n, fault, "the pager dies")
	moved := func(w world, to wire.State, edit func(*world), yes, no handoff.Event) {
		m.moved(w, pager, wire.RoleDestination, to, edit, func(w world, ok bool, k kind) {
			if ok {
				m.pagerAfter(w, yes, k)
			} else {
				m.pagerAfter(w, no, k)
			}
		})
	}
	over, isOver := handoff.PagingOver(w.sight())
	switch handoff.Action(names[p.do]) {
	case handoff.Fill:
		m.pagerAfter(w, handoff.Failed, fault)
		if isOver {
			m.pagerAfter(w, over, good)
		}
		if m.plant.looseMemory {
			m.pagerAfter(w, handoff.AllHere, fault)
		}
		if serving := w.src.at != idDown && w.src.at != idOver && w.src.at != idUnborn; serving && (w.atSrc == held || w.atSrc == frozen) {
			w.missing = false
			m.pagerAfter(w, handoff.AllHere, good)
		}
	case handoff.Release:
		w.agentHolds = false
		m.pagerAfter(w, handoff.Told, good)
	case handoff.Complete:
		switch {
		case w.state() == wire.State_STATE_COMPLETED:
			m.pagerAfter(w, handoff.Told, good)
		case isOver && over != handoff.SawGivenUp:
			m.pagerAfter(w, over, good)
		case !m.plant.eager && !handoff.MayComplete(w.sight()):
			m.pagerAfter(w, handoff.Refused, good)
		default:
			moved(w, wire.State_STATE_COMPLETED, func(w *world) { w.why = noCode }, handoff.Told, handoff.Refused)
		}
	case handoff.Await:
		m.pagerAfter(w, handoff.News, good)
	case handoff.Kill:
		n := w
		n.trouble = true
		m.pagerAfter(n, handoff.Unkilled, fault)
		if w.runsAtDst() || w.atDst == built {
			w.atDst = nothing
		}
		m.pagerAfter(w, handoff.Killed, good)
	case handoff.Concede:
		moved(w, wire.State_STATE_COMPLETED, nil, handoff.Told, handoff.Refused)
	case handoff.Complain:
		if w.state() == wire.State_STATE_PAGING {
			w.set(w.state(), w.by)
			w.why = codeUnknown
		}
		m.pagerAfter(w, handoff.Told, good)
	case handoff.Hang:
	default:
		panic("pager does not " + names[p.do])
	}
}
