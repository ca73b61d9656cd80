// Package explore walks every way in which a migration can go: all orders in which the
// parties may act, with answers of the bus that get lost or come late, each party dead and
// started again after any step, hosts dead, and operators that are right or wrong. What the
// parties decide is what really runs: the tables of agent/handoff, the rules of
// coordinator/rules and the transitions of wire. It must not know how any of that is
// carried out; what an action does to the world is written here once more, in few words.
package explore

import (
	"fmt"
	"strings"

	"godwit/agent/handoff"
	"godwit/wire"
)

// copyOf is what a host has of the tree.
type copyOf uint8

const (
	nothing copyOf = iota
	runs
	frozen  // by a tracer, whose death lets it run
	held    // it stays frozen without the agent, too
	dead    // with its host
	killed  // by its agent
	built   // and dies with its agent
	partial // some of it was let go, the rest dies with its agent
)

var copyNames = [...]string{"nothing", "runs", "frozen", "held", "dead", "killed", "built", "partial"}

// noted is what the journal of a host has.
type noted uint8

const (
	unnoted noted = iota
	begun         // the migration
	withTree
	withRan // all of it was let go
)

// streamOf is how far the end of the stream has come: without it nobody can commit. All
// that comes before it, lost or late or doubled, is in how long that takes.
type streamOf uint8

const (
	open streamOf = iota
	underWay
	arrived
	broken
)

// party is an agent's session, or the pager.
type party struct {
	at handoffID // state
	do handoffID // action
	// tried says that an earlier attempt of the action may have been made.
	tried bool
	// late are changes of the record that this party sent and nobody has heard of, by the
	// state that they lead to: they may still arrive, as long as nothing else has changed
	// the record. Their sender may have died since.
	late uint16
}

type handoffID uint8

// code is the error in a record, as far as anybody decides by it.
type code uint8

const (
	noCode code = iota
	codeAborted
	codeUnknown
)

func (c code) wire() wire.Code {
	return [...]wire.Code{0, wire.Code_CODE_ABORTED, wire.Code_CODE_UNKNOWN_STATE}[c]
}

// world is a state of everything.
type world struct {
	rec   uint8 // wire.State
	by    wire.Role
	why   code
	heard uint8 // coordinators that have heard from the source that it holds nothing

	src, dst, pager party
	atSrc, atDst    copyOf
	srcNoted        noted
	dstNoted        noted
	dstRebooted     bool // since the entry of its journal
	stream          streamOf

	missing    bool // memory of what was built
	agentHolds bool // what is missing, beside the pager

	// What has happened, for the checks.
	ran      bool // the tree at the destination
	srcDied  bool // host
	dstDied  bool // host
	wrong    bool // an operator declared a destination dead that had a copy
	lostWord bool // an operator declared the source dead
	gap      bool // the pager and the agent that held the memory with it both died
	trouble  bool // something could not be let go or killed, for no fault of the protocol
}

func (w world) state() wire.State { return wire.State(w.rec) }

func (w world) sight() handoff.Event { return handoff.Sight(w.state(), w.why.wire()) }

// set changes the record. Whatever was on its way by compare-and-set comes to nothing.
func (w *world) set(to wire.State, by wire.Role) {
	w.rec, w.by = uint8(to), by
	w.src.late, w.dst.late, w.pager.late = 0, 0, 0
	if wire.Terminal(to) {
		w.heard = 0
	}
}

func (w world) runsAtDst() bool { return w.atDst == runs || w.atDst == partial }

func (w world) String() string {
	var flags []string
	for _, f := range []struct {
		name string
		on   bool
	}{
		{"memory is missing", w.missing}, {"the agent holds it", w.agentHolds}, {"it ran", w.ran}, {"the source's host died", w.srcDied},
		{"the destination's host died", w.dstDied}, {"wrong word", w.wrong}, {"lost by word", w.lostWord}, {"gap", w.gap}, {"trouble", w.trouble},
	} {
		if f.on {
			flags = append(flags, f.name)
		}
	}
	return fmt.Sprintf("record %s, source %s/%s has %s, destination %s/%s has %s, pager %s/%s; %s",
		w.state().Word(), names[w.src.at], names[w.src.do], copyNames[w.atSrc], names[w.dst.at], names[w.dst.do], copyNames[w.atDst],
		names[w.pager.at], names[w.pager.do], strings.Join(flags, ", "))
}

// names are the states, events and actions of all machines, by id.
var names []string

var ids = map[string]handoffID{}

func id[T ~string](s T) handoffID {
	i, ok := ids[string(s)]
	if !ok {
		i = handoffID(len(names))
		ids[string(s)] = i
		names = append(names, string(s))
	}
	return i
}

const unborn handoff.State = "unborn"

var (
	idNone   = id("-")
	idUnborn = id(unborn)
	idOver   = id(handoff.Over)
	idDown   = id(handoff.Down)
	idEnd    = id(handoff.End)
	idKeep   = id(handoff.Keep)
)

// phases are the states of records in words.
var phases = func() (out []string) {
	for s := range len(wire.State_name) {
		out = append(out, wire.State(s).Word())
	}
	return out
}()
