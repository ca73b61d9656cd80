package agent

import (
	"time"

	"godwit/engine/procfs"
	"godwit/transport"
	"godwit/wire"
)

// ending is how a tree that landed here has ended, for who has its terminal.
type ending struct {
	ended  bool
	how    wire.Ending
	status uint8
}

// endingKept is how long it is remembered how a tree ended.
const endingKept = 10 * time.Minute

// lands notes a tree that runs here from now on.
func (a *Agent) lands(migration string) *ending {
	e := &ending{}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.endings[migration] = e
	return e
}

// ends notes the exit status of the root as a shell has it; -1: it is not known.
func (a *Agent) ends(migration string, e *ending, status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.how != wire.EndingMoved && status >= 0 {
		e.how, e.status = wire.EndingExited, uint8(status)
	}
	e.ended = true
	time.AfterFunc(endingKept, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.endings, migration)
	})
}

// leaves notes that a tree of this host runs elsewhere now, if it had landed here:
// its end here is not its own.
func (a *Agent) leaves(root int) {
	parent := parentOf(root)
	a.mu.Lock()
	defer a.mu.Unlock()
	for child, migration := range a.landed {
		if e := a.endings[migration]; e != nil && (child == root || child == parent) {
			e.how = wire.EndingMoved
		}
	}
}

// endingOf says how the tree of a migration ended; false: it runs.
func (a *Agent) endingOf(migration string) (how wire.Ending, status uint8, ended bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e := a.endings[migration]; e != nil {
		return e.how, e.status, e.ended || e.how == wire.EndingMoved
	}
	return wire.EndingUnknown, 0, true
}

// parentOf is the parent of a process, 0 if there is none.
func parentOf(pid int) int {
	st, err := procfs.ReadStat(pid)
	if err != nil {
		return 0
	}
	return st.PPid
}

// tellEnd tells home how the tree ended once its terminal has, again and again as long
// as home may not have heard it.
func (p *proxy) tellEnd(st transport.RelayStats) {
	if !st.Over {
		return
	}
	if p.overAt.IsZero() {
		p.overAt = time.Now()
	}
	how, status, ended := p.ps.ending(p.migration)
	switch {
	case !ended && time.Since(p.overAt) < endWait:
		return
	case !ended:
		how = wire.EndingRunning
	}
	_ = p.tell(st.Peer, wire.RelayEnd, wire.EndPayload(how, status)) // it is told again
}
