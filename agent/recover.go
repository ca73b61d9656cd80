package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/agent/handoff"
	"godwit/engine"
	"godwit/engine/procfs"
	"godwit/wire"
)

// note puts a session into the journal, in place of what it said of it before.
func (s *session) note(e entry) error {
	if s.a.cfg.Journal == nil {
		return nil
	}
	var err error
	if e.Boot, err = procfs.BootID(); err != nil {
		return err
	}
	if e.Agent, err = identify(os.Getpid()); err != nil {
		return err
	}
	e.Version, e.Role, e.ID, e.Peer = journalVersion, s.role.String(), s.id, s.peer
	s.noted = true
	return s.a.cfg.Journal.put(&e)
}

func identify(pid int) (engine.Held, error) {
	st, err := procfs.ReadStat(pid)
	if err != nil {
		return engine.Held{}, fmt.Errorf("identify pid %d: %w", pid, err)
	}
	return engine.Held{Pid: pid, Start: st.StartTime}, nil
}

// forget removes the session's entry.
func (s *session) forget() {
	if !s.noted {
		return
	}
	s.noted = false
	if err := s.a.cfg.Journal.drop(s.role.String(), s.id); err != nil {
		s.log.Warn("an entry of the journal is left; it does no harm", "error", err)
	}
}

// Recover takes up what the journal tells of migrations in which an agent of this
// host died: their trees are let go, ended or answered for as their records say.
// Preconditions: the agent does not serve yet.
func (a *Agent) Recover() {
	list, err := a.cfg.Journal.load()
	if err != nil {
		a.log.Error("the journal tells of migrations that cannot be taken up; look whether processes of theirs are stopped here", "error", err)
	}
	boot, err := procfs.BootID()
	if err != nil {
		a.log.Error("the journal cannot be compared with this boot; nothing of it is taken up", "error", err)
		return
	}
	for _, e := range list {
		if e.Role == wire.RoleSource.String() {
			a.recoverSource(e, e.Boot == boot)
		} else {
			a.recoverDestination(e, e.Boot == boot)
		}
	}
}

// leftover is the tree of a source whose agent died.
type leftover struct{ *engine.Leftover }

var errTreeGone = errors.New("none of its processes is left on this host")

func (l leftover) Thaw() error {
	if l.Processes() == 0 {
		return errTreeGone
	}
	return l.Leftover.Thaw()
}

// ranOn is a tree that the end of an agent let run on: not all of it had been sent,
// so that it runs nowhere else.
type ranOn struct{}

func (ranOn) Thaw() error { return nil }
func (ranOn) Kill() error {
	return errors.New("it was let go when its agent ended, although the record says that it runs elsewhere")
}

func (a *Agent) recoverSource(e *entry, sameBoot bool) {
	var held []engine.Held
	if sameBoot {
		awaitEnd(e.Agent)
		held = e.Tree
	}
	s := &source{
		session: a.newSession(e.ID, wire.RoleSource, e.Peer), report: &wire.Report{},
		leaving: &departing{}, req: &wire.StartRequest{Id: e.ID, Pid: int32(e.Pid), Destination: e.Peer}, frozenAt: time.UnixMicro(e.FrozenUnixUs),
	}
	s.noted = true
	left := leftover{engine.NewLeftover(held)}
	s.frozen, s.late = left, e.Late
	if sameBoot && len(e.Tree) == 0 {
		s.frozen = ranOn{}
	}
	s.answer(nil)
	s.state.Store(int32(wire.State_STATE_FINAL_COPYING))
	s.log.Warn("an agent died in the middle of a migration; this one brings it to its end", "pid", e.Pid, "frozen_processes", left.Processes())
	a.mu.Lock()
	a.sources[e.ID] = s
	a.mu.Unlock()
	s.cause = wire.Errorf(wire.Code_CODE_ABORTED, "the agent of %s ended in the middle of the migration, and was started again", a.cfg.Host)
	found := handoff.FoundLoose
	switch {
	case left.Processes() > 0:
		found = handoff.FoundTree
	case len(e.Tree) > 0:
		found = handoff.FoundGone
	}
	go func() {
		s.watch()
		if sameBoot && len(e.Late) > 0 {
			// The tree may run already, and wait for its memory.
			err := s.readyPages(forever())
			if err == nil {
				err = s.servePages(e.Late)
			}
			if err != nil {
				s.log.Error("the destination may wait for memory, which cannot be served", "error", err)
			}
		}
		s.drive(handoff.Source.Steps[handoff.Down][found])
	}()
}

func (a *Agent) recoverDestination(e *entry, sameBoot bool) {
	d := &destination{
		session: a.newSession(e.ID, wire.RoleDestination, e.Peer), report: &wire.Report{},
		req: &wire.PrepareRequest{Id: e.ID, Source: e.Peer},
	}
	d.noted = true
	d.answer(nil)
	d.state.Store(int32(wire.State_STATE_STAGED))
	d.log.Warn("an agent died in the middle of a migration; this one looks what became of the tree", "pid", e.Pid)
	a.mu.Lock()
	a.destinations[e.ID] = d
	a.mu.Unlock()
	d.entry, d.recovered = *e, true
	d.cause = wire.Errorf(wire.Code_CODE_ABORTED, "the agent of %s ended before all of the tree ran there", a.cfg.Host)
	go func() {
		d.watch()
		if sameBoot {
			awaitEnd(e.Agent)
			d.alive = survivors(e.Tree)
		}
		d.lives = len(e.Tree) > 0 && sameBoot && (e.Ran || len(d.alive) == len(e.Tree))
		d.paged = e.Pager != nil
		d.drive(handoff.Destination.Steps[handoff.Down][handoff.FoundHere])
	}()
}

// tidy removes what an agent that died has left of the files that it made for a tree:
// all of them, or if the tree runs here what they have replaced.
func (d *destination) tidy() {
	if !d.recovered {
		return
	}
	e := &d.entry
	err := func() error {
		if d.here {
			return engine.EndWaiting(e.Waiting)
		}
		errs := []error{engine.UndoWaiting(e.Waiting)}
		if len(e.Places) > 0 {
			errs = append(errs, engine.RemoveMarked(engine.MarkOf(e.ID), e.Places))
		}
		for _, f := range e.Created {
			errs = append(errs, f.remove())
		}
		return errors.Join(append(errs, engine.RemoveMade(e.Made))...)
	}()
	if err != nil {
		d.log.Warn("files that were made for the tree are left", "error", err)
	}
}

// remove removes the file, as long as its path leads to it.
func (f *createdFile) remove() error {
	var st unix.Stat_t
	err := unix.Lstat(f.Path, &st)
	if err == nil && st.Ino == f.Ino {
		err = unix.Unlink(f.Path)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: f.Path, Err: err}
	}
	return nil
}

// awaitEnd waits until a process that has died is through: what it traced has
// been killed or let go then.
func awaitEnd(h engine.Held) {
	for end := time.Now().Add(endPatience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		st, err := procfs.ReadStat(h.Pid)
		if err != nil || st.StartTime != h.Start || st.State == 'Z' && st.NumThreads <= 1 {
			return
		}
	}
}

const endPatience = 10 * time.Second

// survivors are the processes of a tree that live and were not killed.
func survivors(tree []engine.Held) []engine.Held {
	dying := func(h engine.Held) bool {
		st, err := procfs.ReadStatus(h.Pid)
		return err != nil || (st.SigPnd|st.ShdPnd)&(1<<8) != 0 // SIGKILL
	}
	for end := time.Now().Add(endPatience); ; time.Sleep(5 * time.Millisecond) {
		left := slices.DeleteFunc(slices.Clone(tree), func(h engine.Held) bool { return !h.Lives() })
		if !slices.ContainsFunc(left, dying) || time.Now().After(end) {
			return left
		}
	}
}

// overruled says whether the tree runs at the source, or is about to, whatever this
// host has done: it took too long to tell, and somebody declared it dead.
func overruled(rec *wire.Record) bool {
	return rec.State == wire.State_STATE_RETURNING || rec.State == wire.State_STATE_ABORTED
}

// killTrees kills processes with everything that they have started. left are those that
// do not die.
func killTrees(tree []engine.Held) (killed int, left []int) {
	for end := time.Now().Add(endPatience); ; time.Sleep(5 * time.Millisecond) {
		left = nil
		for _, h := range tree {
			if !h.Lives() {
				continue
			}
			pids, err := procfs.Tree(h.Pid)
			if err == nil {
				left = append(left, pids...)
			}
		}
		if len(left) == 0 {
			return killed, nil
		}
		for _, pid := range left {
			if err := unix.Kill(pid, unix.SIGKILL); err == nil {
				killed++
			}
		}
		if time.Now().After(end) {
			return killed, left
		}
	}
}

// signalTrees sends a signal to processes with everything that they have started.
func signalTrees(tree []engine.Held, sig unix.Signal) {
	for _, h := range tree {
		if !h.Lives() {
			continue
		}
		pids, err := procfs.Tree(h.Pid)
		if err != nil {
			continue
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, sig) // gone, at worst
		}
	}
}
