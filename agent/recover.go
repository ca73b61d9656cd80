package agent

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

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

// forget removes the session's entry, unless something still hangs on it.
func (s *session) forget() {
	if !s.noted || s.owes || s.trouble != nil {
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
	s.offered = len(e.Tree) > 0 // it was noted before the end was sent
	if sameBoot && len(e.Tree) == 0 {
		s.frozen = ranOn{}
	}
	s.answer(nil)
	s.state.Store(int32(wire.State_STATE_FINAL_COPYING))
	s.log.Warn("an agent died in the middle of a migration; this one brings it to its end", "pid", e.Pid, "frozen_processes", left.Processes())
	a.mu.Lock()
	a.sources[e.ID] = s
	a.mu.Unlock()
	go func() {
		defer s.end()
		s.watch()
		if sameBoot && len(e.Late) > 0 {
			// The tree may run already, and wait for its memory.
			if err := s.servePages(forever(), e.Late); err != nil {
				s.log.Error("the destination may wait for memory, which cannot be served", "error", err)
			}
		}
		s.hold(wire.Errorf(wire.Code_CODE_ABORTED, "the agent of %s ended in the middle of the migration, and was started again", a.cfg.Host))
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
	go func() {
		defer func() {
			d.forget()
			d.cancel(nil)
			d.leave()
			close(d.done)
		}()
		var alive []engine.Held
		if sameBoot {
			awaitEnd(e.Agent)
			alive = survivors(e.Tree)
		}
		d.answerFor(e, alive)
	}()
}

// answerFor brings a migration to its end of which this host may be the owner.
func (d *destination) answerFor(e *entry, alive []engine.Held) {
	rec, err := d.ledger.read(forever())
	switch {
	case err != nil:
		d.log.Error("the record cannot be read, so the migration is left as it is", "error", err)
		d.owes = wire.CodeOf(err) != wire.Code_CODE_NOT_FOUND
		if !d.owes && len(e.Tree) == 0 {
			d.tidy(e, false)
		}
		return
	case overruled(rec):
		d.fence(alive)
		if d.trouble == nil {
			d.tidy(e, false)
		}
		return
	case rec.State == wire.State_STATE_COMPLETED:
		d.tidy(e, true)
		return
	case rec.State == wire.State_STATE_PAGING && e.Pager != nil:
		d.committed.Store(true)
		d.tidy(e, true)
		d.watch()
		d.awaitPaging(*e.Pager, nil, alive)
		return
	case rec.State != wire.State_STATE_HANDING_OFF && rec.State != wire.State_STATE_STUCK:
		// Nothing has run here without the commit, and no process is left of it.
		if err := d.tell(30*time.Second, wire.Errorf(wire.Code_CODE_ABORTED, "the agent of %s ended before the tree ran there", d.a.cfg.Host)); err != nil {
			d.log.Warn("the record could not be brought up to date; the source finds out by itself", "error", err)
		}
		d.tidy(e, false)
		return
	}
	d.committed.Store(true)
	to, edit := wire.State_STATE_COMPLETED, func(r *wire.Record) { r.LandedPid = int32(e.Pid) }
	if !e.Ran && len(alive) < len(e.Tree) {
		// It died while it let the tree go, which ended what it had not let go yet.
		if err := engine.NewLeftover(alive).Kill(); err != nil {
			d.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "some of the tree runs here and cannot be ended, so the source stays frozen until an operator has looked: %w", err)
			d.log.Error("a part of the tree runs here and cannot be ended; an operator must look", "error", d.trouble)
			return
		}
		to, edit = wire.State_STATE_RETURNING, d.blame(wire.Errorf(wire.Code_CODE_ABORTED, "the agent of %s ended before all of the tree ran there", d.a.cfg.Host))
	}
	if to == wire.State_STATE_COMPLETED && e.Pager != nil {
		to = wire.State_STATE_PAGING
	}
	if _, err := d.ledger.move(forever(), to, edit); err != nil {
		d.owes = true
		d.log.Error("the record could not be brought up to date", "state", to.Word(), "error", err)
		return
	}
	d.enter(to, "pid", e.Pid)
	d.tidy(e, to != wire.State_STATE_RETURNING)
	if to == wire.State_STATE_PAGING {
		d.watch()
		d.awaitPaging(*e.Pager, nil, alive)
	}
}

// tidy removes what an agent that died has left of the files that it made for a tree:
// all of them, or if the tree runs here what they have replaced.
func (d *destination) tidy(e *entry, runs bool) {
	err := func() error {
		if runs {
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

// fence kills what runs here of a tree that belongs to the source again, with
// everything that it has started since.
func (d *destination) fence(tree []engine.Held) {
	killed, left := killTrees(tree)
	if len(left) > 0 {
		d.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the tree was given back to %s, but its copy here could not be killed; it must not run, kill it", d.req.Source)
		d.log.Error("two copies of the tree run: this one could not be killed", "pids", left)
		return
	}
	if killed > 0 {
		d.log.Error("the copy of the tree here was killed", "source", d.req.Source, "processes", killed)
	}
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
