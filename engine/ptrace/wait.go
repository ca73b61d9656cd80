package ptrace

import (
	"errors"
	"fmt"
	"time"

	"godwit/engine/procfs"
	"godwit/engine/sys"
)

const (
	// frozenLimit is how long a target may stand in a frozen control group before
	// what it was to execute is given up.
	frozenLimit = time.Second
	// callLimit is how long a target may use no processor time at all while it
	// executes something for us.
	callLimit = 60 * time.Second
	// takeBack is how long a target whose call is given up may take to stop.
	takeBack = 10 * time.Second

	// A call of a few microseconds ends while it is looked for again and again;
	// for one that takes longer the tracer sleeps, at most longestNap.
	spins      = 40
	longestNap = time.Millisecond
)

// StuckError says that a target does not execute what it was told to.
type StuckError struct {
	Tid    int
	Frozen bool   // it stands in a frozen control group
	Place  string // the kernel's function in which it waits, empty if unknown
	After  time.Duration
}

func (e *StuckError) Error() string {
	if e.Frozen {
		return fmt.Sprintf("task %d stands still in a control group that was frozen meanwhile, where nothing can be executed in it; thaw the group: write 0 to its cgroup.freeze (version 1: THAWED to freezer.state)", e.Tid)
	}
	return fmt.Sprintf("task %d has not gone on for %s, it waits in the kernel's %s", e.Tid, e.After, e.Place)
}

// Wait waits for the next stop or the end of one traced task. A task that cannot
// go on is given up after a while and told to stop: that stop comes together with
// a *StuckError. One that was killed meanwhile is no error.
// Preconditions: on the tracer's thread.
func Wait(tid int) (Stop, error) {
	for range spins {
		if s, ok, err := TryWait(tid); ok || err != nil {
			return s, err
		}
		sys.Yield()
	}
	p := progress{tid: tid, moved: time.Now()}
	nap, look := 20*time.Microsecond, p.moved.Add(frozenLimit/4)
	for {
		sys.Nap(nap)
		if s, ok, err := TryWait(tid); ok || err != nil {
			return s, err
		}
		nap = min(nap+nap/8, longestNap)
		now := time.Now()
		if now.Before(look) {
			continue
		}
		look = now.Add(frozenLimit / 4)
		if err := p.look(now); err != nil {
			s, rerr := recall(tid)
			if rerr == nil && s.Ended() {
				return s, nil
			}
			return s, errors.Join(err, rerr)
		}
	}
}

// progress tells whether a target still goes on.
type progress struct {
	tid    int
	moved  time.Time // when it was last seen to use the processor
	used   uint64    // processor time, ticks
	frozen time.Time // since when it has stood in a frozen group, zero: it does not
}

func (p *progress) look(now time.Time) error {
	st, err := procfs.ReadTaskStat(p.tid, p.tid)
	if err != nil {
		return nil // it is ending, of which TryWait tells
	}
	if used := st.UTime + st.STime; used != p.used || st.State == 'R' {
		p.used, p.moved = used, now
	}
	place := wchan(p.tid)
	switch {
	case !inFreezer(p.tid, st.State, place):
		p.frozen = time.Time{}
	case p.frozen.IsZero():
		p.frozen = now
	case now.Sub(p.frozen) >= frozenLimit:
		return &StuckError{Tid: p.tid, Frozen: true, Place: place}
	}
	if now.Sub(p.moved) >= callLimit {
		return &StuckError{Tid: p.tid, Place: place, After: callLimit}
	}
	return nil
}

// recall stops a task that was resumed and does not go on.
func recall(tid int) (Stop, error) {
	if err := sys.PtraceInterrupt(tid); err != nil {
		return Stop{}, fmt.Errorf("interrupt task %d: %w", tid, gone(err))
	}
	back := func() error { return nil }
	defer func() { _ = back() }()
	left := false
	for begin := time.Now(); time.Since(begin) < takeBack; sys.Nap(longestNap) {
		s, ok, err := TryWait(tid)
		if ok || err != nil {
			return s, err
		}
		if !left && time.Since(begin) > takeBack/100 {
			// A group of version 1 keeps it from stopping, too.
			left = true
			if back, err = leaveFreezer(tid); err != nil {
				return Stop{}, err
			}
		}
	}
	return Stop{}, fmt.Errorf("task %d does not stop, either (it waits in the kernel's %s)", tid, wchan(tid))
}
