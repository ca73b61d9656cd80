package explore

import (
	"time"

	"godwit/coordinator/rules"
	"godwit/wire"
)

// patience is always at its end: what takes long to happen may happen at any moment.
var patience = rules.Patience{Probe: 1, Dead: 1, Orphan: 1}

// coordinatorSteps are those of two coordinators and of operators. All that a coordinator
// remembers is whether the source has said that it holds nothing of the migration, so that
// one which dies and is started again has only forgotten that.
func (m *model) coordinatorSteps(w world) {
	abort := func(k kind, what string) {
		if to, late := rules.Abort(w.state()); !late && to != 0 {
			n := w
			n.set(to, wire.RoleCoordinator)
			m.emit(n, k, what)
		}
	}
	ask := func(k kind) {
		if (w.src.at == idOver || w.src.at == idUnborn) && w.heard < 2 && w.state() == wire.State_STATE_ABORTING {
			n := w
			n.heard++
			m.emit(n, k, "the source says that it holds nothing")
		}
	}
	stuck := rules.Stuck(w.state(), w.why.wire())
	if !stuck {
		for _, src := range signs(w.src) {
			for _, dst := range signs(w.dst) {
				k := fault
				if src == truth(w.src) && dst == truth(w.dst) {
					k = good
				}
				switch rules.Judge(w.state(), time.Hour, src, dst, patience) {
				case rules.AskAbort:
					abort(k, "the coordinator aborts")
				case rules.Remind:
					ask(k)
				case rules.MarkStuck:
					n := w
					n.set(wire.State_STATE_STUCK, wire.RoleCoordinator)
					m.emit(n, k, "the coordinator says stuck")
				}
			}
		}
	}
	abort(good, "somebody aborts")
	ask(good)
	if w.heard > 0 {
		n := w
		n.heard--
		m.emit(n, fault, "a coordinator dies")
		if m.settles(w.state(), w.why.wire()) {
			n := w
			n.set(wire.State_STATE_ABORTED, wire.RoleCoordinator)
			m.emit(n, good, "the coordinator says aborted")
		}
	}
	m.operatorSteps(w, stuck)
}

// signs are what may be known of an agent: one that lives may be cut off.
func signs(p party) []rules.Sign {
	if p.at == idDown {
		return []rules.Sign{rules.Dead, rules.Unknown}
	}
	return []rules.Sign{rules.Alive, rules.Dead, rules.Unknown}
}

func truth(p party) rules.Sign {
	if p.at == idDown {
		return rules.Dead
	}
	return rules.Alive
}

// operatorSteps are the words of an operator, who is right or wrong, and the fencing of a
// host before one.
func (m *model) operatorSteps(w world, stuck bool) {
	for _, destination := range []bool{true, false} {
		v := rules.Pronounce(w.state(), destination)
		if v < rules.GivesBack {
			continue
		}
		n := w
		for _, to := range v.Steps(w.state()) {
			if !wire.CanMove(n.state(), to, wire.RoleCoordinator) {
				panic("an operator's word that the record refuses")
			}
			n.set(to, wire.RoleCoordinator)
		}
		if n.why = codeAborted; v == rules.Ends {
			n.set(w.state(), w.by)
		}
		k, what := word, "an operator says that the destination is dead"
		if destination {
			if w.runsAtDst() || w.atDst == built {
				n.wrong, k = true, fault
			}
		} else {
			what = "an operator says that the source is dead"
			if n.lostWord = true; w.atSrc != dead && w.atSrc != killed {
				k = fault
			}
		}
		m.emit(n, k, what)
	}
	if stuck {
		m.emit(dieDst(w), word, "an operator fences the destination")
	}
}
