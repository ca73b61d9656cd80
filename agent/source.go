package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

// source is the session of the host that a tree leaves.
//
//	start ─► stream opened ─► [PreCopying ─►] Freezing ─► frozen ─► FinalCopying ─► dumped ─► hold
//	                │               │             │                      │                     │
//	                └─ refused      └─ Aborted    └─ Aborted             └────── hold ◄────────┘
//
//	hold: before all was sent, with a cause   ─► thaw ─► Aborted, whenever the bus is there
//	      before the commit, with a cause     ─► Aborting (compare-and-set)
//	      Aborting, Aborted, Returning        ─► thaw ─► Aborted
//	      HandingOff, Stuck                   ─► stay frozen
//	      Completed                           ─► kill
//
// The frozen tree is only let go when the destination cannot commit, because it has not
// all of the tree or the record says so, and only killed when the record says that the
// tree runs there.
type source struct {
	*session
	req *wire.StartRequest

	out  outStream
	sink *streamSink
	tree engine.Tree
	live engine.Live // the copy of the running tree; nil: there is none
	// early is what the other side has of the files that travel; nil: none do.
	early *engine.EarlyCopy
	// pages: memory travels while the tree runs.
	pages bool
	// confirm compares the frozen tree with what was planned; it may be nil.
	confirm func([]plan.Object) []engine.Problem
	// leaving are the proxies of the tree.
	leaving *departing
	// served is the memory that the destination asks for, late says whose; nil: none.
	served *served
	late   map[uint32]engine.Late
	// postcopy says that memory that is left stays for the destination to ask for.
	postcopy bool
	// frozen is the tree in the end: tree, or what an agent that died has left of it.
	frozen interface {
		Thaw() error
		Kill() error
	}

	// offered says that the destination may have all of the tree, without which it cannot
	// commit.
	offered bool

	memory   uint64    // of the tree, bytes, as the plan found it
	frozenAt time.Time // before the first task was told to stop
	report   *wire.Report
}

// outStream is the sending end of a stream.
type outStream interface {
	chunkWriter
	// Close waits until all that was sent has been applied by the other side.
	Close(ctx context.Context) error
	// Abort ends the stream for both sides; after Close it does nothing.
	Abort(err error)
	meter
}

// Preflight looks at the tree that is to leave and says what it needs.
func (a *Agent) Preflight(ctx context.Context, req *wire.PreflightRequest) (*wire.PreflightReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	if req.Pid <= 0 {
		return nil, invalid("pid %d is not the pid of a process", req.Pid)
	}
	if err := checkOptions(req.Options); err != nil {
		return nil, err
	}
	root, err := process(int(req.Pid))
	if err != nil {
		return nil, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	if root.KernelThread {
		return nil, failure(wire.Errorf(wire.Code_CODE_REFUSED, "pid %d (%s) is a thread of the kernel", req.Pid, root.Comm), a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	if req.Pid == 1 || a.within(int(req.Pid)) {
		return nil, failure(wire.Errorf(wire.Code_CODE_REFUSED, "the tree of pid %d (%s) holds this agent itself: choose a process below", req.Pid, root.Comm), a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	o := a.dumpOptions(req.Options, req.Resolutions)
	o.Files.Hash = req.Hash
	p, err := a.cfg.Engine.Plan(ctx, int(req.Pid), o)
	reply := &wire.PreflightReply{Root: root}
	if p != nil { // also of a tree that is refused: the destination may lack something, too
		reply.Requirements = requirements(p)
	}
	if err == nil && req.Options.GetAttach() != nil {
		err = attachable(p)
	}
	if req.Discover && p != nil {
		reply.Objects = openObjects(p.Objects)
		if err := a.standIns(p, reply.Objects); err != nil {
			return reply, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
		}
		err = lasting(err)
	}
	if err != nil {
		return reply, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	if req.Options.GetLane() != wire.LaneChoice_LANE_CHOICE_CLUSTER {
		reply.Direct = a.cfg.Streams.Direct.offer(req.Id)
	}
	return reply, nil
}

// lasting takes out of a refusal what a declaration solves.
func lasting(err error) error {
	r, ok := errors.AsType[*engine.Refusal](err)
	if !ok {
		return err
	}
	left := &engine.Refusal{Doing: r.Doing}
	for _, p := range r.Problems {
		if !p.Declarable {
			left.Add(p)
		}
	}
	return left.Err()
}

// checkOptions refuses what no migration can do.
func checkOptions(o *wire.MigrateOptions) error {
	if o.GetLeaveRunning() {
		return invalid("a migration cannot leave the tree running at the source: two copies would run")
	}
	if _, ok := wire.LaneChoice_name[int32(o.GetLane())]; !ok {
		return invalid("the request asks for lane %d, which this agent does not know", o.GetLane())
	}
	_, err := compression(o.GetCompression(), wire.Codecs)
	return err
}

func (a *Agent) dumpOptions(o *wire.MigrateOptions, resolutions []*wire.Resolution) engine.DumpOptions {
	return engine.DumpOptions{
		External: o.GetExternal(), Timeout: a.cfg.Timeouts.Freeze, Host: a.cfg.Host, GhostLimit: a.cfg.GhostLimit,
		FileLocks: true, ExtUnixSk: true, TCPEstablished: true, // nothing else would keep them
		Elsewhere: true, Carry: carried(resolutions), ShellJob: o.GetAttach() != nil,
		Files: engine.FileOptions{Proxied: a.departing("", o.GetProxied()).proxied(), Masters: a.departing("", o.GetProxied()).masters()},
	}
}

// Start begins to move a tree away. It returns once the record says Freezing;
// what happens then is in the record.
func (a *Agent) Start(ctx context.Context, req *wire.StartRequest) (*wire.StartReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	switch {
	case req.Pid <= 0:
		return nil, invalid("pid %d is not the pid of a process", req.Pid)
	case req.Stream == "" || req.Id == "" || req.Destination == "":
		return nil, invalid("the request lacks the migration's id, destination or stream")
	}
	if err := checkOptions(req.Options); err != nil {
		return nil, err
	}
	if req.Pid == 1 || a.within(int(req.Pid)) {
		return nil, wire.Errorf(wire.Code_CODE_REFUSED, "the tree of pid %d holds this agent itself", req.Pid)
	}
	if err := directly(req.Options.GetLane(), req.Lane); err != nil {
		return nil, err
	}
	check, err := confirm(req)
	if err != nil {
		return nil, err
	}
	s, isNew, err := a.admitSource(req, check)
	if err != nil {
		return nil, err
	}
	if isNew {
		go s.run()
	}
	if err := s.await(ctx); err != nil {
		return nil, failure(err, a.cfg.Host, wire.State_STATE_FREEZING)
	}
	return &wire.StartReply{}, nil
}

// admitSource makes the session for a request, or finds the one that an equal
// request made.
func (a *Agent) admitSource(req *wire.StartRequest, check func([]plan.Object) []engine.Problem) (s *source, isNew bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.sources[req.Id]; old != nil {
		if old.req.Pid != req.Pid || old.req.Stream != req.Stream || old.req.Destination != req.Destination {
			return nil, false, wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is in flight here with another pid, destination or stream", req.Id)
		}
		return old, false, nil
	}
	if a.stopping {
		return nil, false, errStopping(a.cfg.Host)
	}
	if err := a.mayLeave(req.Id, int(req.Pid)); err != nil {
		return nil, false, err
	}
	delete(a.reserved, req.Id)
	s = &source{session: a.newSession(req.Id, wire.RoleSource, req.Destination), req: req, confirm: check, report: &wire.Report{}, leaving: a.departing(req.Id, req.Options.GetProxied())}
	a.sources[req.Id] = s
	return s, true, nil
}

func (s *source) run() {
	defer s.end()
	touched, err := s.begin()
	if err != nil && !touched {
		// Whoever is refused may ask again at once and must not meet himself.
		s.leave()
	}
	s.answer(err)
	if err == nil && s.phase() == wire.State_STATE_PRE_COPYING {
		err = s.precopy()
	}
	if err == nil {
		err = s.freeze()
	}
	switch {
	case s.tree != nil:
		if err == nil {
			err = s.copy()
		}
		if err != nil {
			s.log.Warn("the tree cannot be moved; it stays frozen until the record says that it does not run elsewhere", "error", err)
			s.out.Abort(err)
		}
		s.hold(err)
	case err != nil:
		if s.out != nil {
			s.out.Abort(err)
		}
		if touched {
			s.giveUp(err)
		}
	}
}

// end is the last of a session.
func (s *source) end() {
	if s.unfeed != nil {
		s.unfeed()
	}
	if s.live != nil {
		if err := s.live.Close(); err != nil {
			s.log.Warn("the copy of the running tree could not be ended", "error", err)
		}
	}
	if err := s.served.close(); err != nil {
		s.log.Warn("the memory of the tree could not be let go", "error", err)
	}
	s.a.cfg.Streams.Direct.end(s.id)
	s.forget()
	s.cancel(nil)
	s.leave()
	close(s.done)
}

// leave takes the session off the agent's list.
func (s *source) leave() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	if s.a.sources[s.id] == s {
		delete(s.a.sources, s.id)
	}
}

// begin opens the stream, so that what can fail about it fails while the tree
// runs, and claims the migration. touched says that the record may have been changed.
func (s *source) begin() (touched bool, err error) {
	rec, err := s.ledger.read(limit(s.work, s.a.cfg.Timeouts.Begin))
	if err != nil {
		return false, err
	}
	if err := belongs(rec, s.a.cfg.Host, s.req.Destination); err != nil {
		return false, err
	}
	if rec.Pid != s.req.Pid {
		return false, invalid("the record of migration %s is about pid %d, the request about pid %d", s.id, rec.Pid, s.req.Pid)
	}
	s.watch()
	packing, err := compression(s.req.Options.GetCompression(), s.req.Codecs)
	if err != nil {
		return false, err
	}
	if s.out, err = s.a.cfg.Streams.Send(s.work, s.id, s.req.Stream, s.req.Destination, sendOptions{
		rate: s.req.Options.GetBandwidth(), lane: s.req.Lane, only: s.req.Options.GetLane() == wire.LaneChoice_LANE_CHOICE_DIRECT, compression: packing,
	}); err != nil {
		return false, fmt.Errorf("open the stream to %s: %w", s.req.Destination, err)
	}
	s.sink = newStreamSink(s.work, s.out)
	if err := s.sink.hello(&wire.Hello{Protocol: wire.Version, Id: s.id, Source: s.a.cfg.Host, Version: s.a.cfg.Version}); err != nil {
		return false, fmt.Errorf("open the stream to %s: %w", s.req.Destination, err)
	}
	if err := s.note(entry{Pid: int(s.req.Pid)}); err != nil {
		return true, err
	}
	first := wire.State_STATE_FREEZING
	s.pages = s.wantsPrecopy(rec)
	if len(carried(s.req.Resolutions)) > 0 {
		s.early = engine.NewEarlyCopy()
	}
	if s.pages || s.early != nil {
		first = wire.State_STATE_PRE_COPYING
	}
	s.memory = rec.MemoryBytes
	s.enter(first, "pid", s.req.Pid)
	_, err = s.ledger.move(limit(s.work, s.a.cfg.Timeouts.Begin), first, nil)
	s.point("begun")
	return true, err
}

// limit is ctx for at most d. It is let go by time alone.
func limit(ctx context.Context, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(ctx, d)
	context.AfterFunc(ctx, cancel)
	return ctx
}

// freeze stops the tree. If it fails the tree runs.
func (s *source) freeze() error {
	o := s.a.dumpOptions(s.req.Options, s.req.Resolutions)
	o.Confirm, o.Live, o.Late, o.Early = s.confirm, s.live, s.postcopy, s.early
	frozen := s.a.cfg.Timeouts.Frozen
	if ms := s.req.Options.GetTimeoutMs(); ms > 0 {
		frozen = time.Duration(ms) * time.Millisecond
	}
	// The clock of the frozen part runs from here on.
	timer := time.AfterFunc(frozen, func() {
		s.cancel(wire.Errorf(wire.Code_CODE_ABORTED, "the tree was frozen for %s without having been handed over, which is the limit", frozen))
	})
	context.AfterFunc(s.work, func() { timer.Stop() })
	s.frozenAt = time.Now()
	tree, err := s.a.cfg.Engine.Freeze(s.work, int(s.req.Pid), o)
	if err != nil {
		return s.because(err)
	}
	s.tree, s.frozen = tree, tree
	s.leaving.frozen()
	s.point("frozen")
	return nil
}

// secure makes the tree stay frozen whatever becomes of this process, and notes it
// for the agent that takes its place. Before the destination has all of the tree
// it cannot run there, and the death of this process may let it run on here.
func (s *source) secure() error {
	err := s.tree.Hold(func(held []engine.Held) error {
		err := s.note(entry{Pid: int(s.req.Pid), Tree: held, Late: s.late, FrozenUnixUs: s.frozenAt.UnixMicro()})
		s.point("noted")
		return err
	})
	if err != nil {
		return fmt.Errorf("hold the tree of pid %d: %w", s.req.Pid, err)
	}
	return nil
}

// because is the reason why the work was ended, if it was: what failed then is
// only a consequence.
func (s *session) because(err error) error {
	if s.work.Err() != nil {
		return context.Cause(s.work)
	}
	return err
}

// copy sends the frozen tree. It returns once all of it has been applied.
func (s *source) copy() error {
	// Every millisecond counts now: the record is brought up to date while the tree is
	// read, before the destination has enough to go on.
	told := promise(func() error {
		if _, err := s.ledger.move(s.work, wire.State_STATE_FINAL_COPYING, nil); err != nil {
			return err
		}
		s.enter(wire.State_STATE_FINAL_COPYING, "pid", s.req.Pid)
		s.point("copying")
		return nil
	})
	s.sink.complete = told.wait
	ctx, stop := context.WithCancel(s.work)
	defer stop()
	go s.session.report(ctx, s.out, s.sink.pages.Load, s.memory)

	stats, err := s.tree.Dump(s.work, s.sink)
	if terr := told.wait(); terr != nil {
		err = terr // the other one is a consequence
	}
	s.point("dumped")
	if s.late = stats.Late; err == nil && len(s.late) > 0 {
		err = s.servePages(s.work, s.late)
	}
	if err == nil {
		err = s.sink.dataDone()
	}
	if err == nil {
		err = s.secure()
	}
	s.point("held")
	if err == nil {
		err = s.leaving.dumped(s.work, s.tree.Pids())
	}
	if err == nil {
		s.offered = true
		err = s.sink.end(nil)
	}
	if err == nil {
		err = s.out.Close(s.work)
	}
	if !stats.FrozenAt.IsZero() {
		s.frozenAt = stats.FrozenAt
	}
	s.report.FrozenFileBytes = stats.CarriedBytes
	s.report.FreezeUs, s.report.DumpUs = us(stats.FreezeDur), us(stats.DumpDur)
	if err != nil {
		return s.because(fmt.Errorf("copy the tree of pid %d to %s: %w", s.req.Pid, s.req.Destination, err))
	}
	s.point("sent")
	st := s.out.Stats()
	s.log.Info("copied", "processes", stats.Processes, "threads", stats.Threads, "pages", stats.Pages, "bytes", st.WireBytes,
		"resent_bytes", st.ResentBytes, "freeze_ms", stats.FreezeDur.Milliseconds(), "dump_ms", stats.DumpDur.Milliseconds())
	return nil
}

// hold keeps the tree frozen until the record says who runs it, and sees to
// that. With a cause it tries to end the migration, which works as long as the
// destination has not committed.
func (s *source) hold(cause error) {
	if cause != nil && !s.offered {
		s.retreat(cause)
		return
	}
	work := s.work.Done()
	if cause != nil {
		work = nil
	}
	told := time.Time{}
	for {
		rec, err := s.ledger.read(forever())
		if err != nil {
			// Without the record nobody knows whether the destination runs the tree.
			if time.Since(told) > time.Minute {
				told = time.Now()
				s.log.Error("the record of the migration cannot be read, so nobody knows where the tree may run; it stays frozen here", "pid", s.req.Pid, "error", err)
			}
			s.pauseHold(nil)
			continue
		}
		switch rec.State {
		case wire.State_STATE_COMPLETED:
			s.committed.Store(true)
			s.point("completed")
			s.discard()
			s.point("discarded")
			return
		case wire.State_STATE_ABORTING, wire.State_STATE_ABORTED, wire.State_STATE_RETURNING:
			s.resume(rec)
			return
		case wire.State_STATE_HANDING_OFF, wire.State_STATE_PAGING, wire.State_STATE_STUCK:
			if rec.State == wire.State_STATE_PAGING && s.phase() != rec.State && s.committed.Load() {
				s.enter(rec.State)
			}
			if !s.committed.Swap(true) {
				s.enter(rec.State)
				if cause != nil {
					s.log.Warn("the destination has committed; the tree stays frozen here until it tells the outcome", "error", cause)
				}
			}
			work = nil
		default:
			if cause != nil {
				if _, err := s.ledger.move(forever(), wire.State_STATE_ABORTING, s.blame(cause)); err == nil {
					s.enter(wire.State_STATE_ABORTING, "reason", cause)
					continue
				}
				// Somebody else was faster: the next round sees what it is now.
			}
		}
		if s.pauseHold(work) {
			cause, work = context.Cause(s.work), nil
		}
	}
}

// retreat lets the tree run on here at once: nobody else can. The record follows when it
// can be reached.
func (s *source) retreat(cause error) {
	s.letGo(severity(wire.CodeOf(cause)), cause.Error())
	ctx, cancel := context.WithCancel(s.a.informing)
	defer cancel()
	blame := s.blame(cause)
	if s.trouble != nil {
		if _, err := s.ledger.move(ctx, wire.State_STATE_ABORTING, blame); err != nil {
			s.log.Debug("the record is aborting already, or cannot be reached", "error", err)
		}
	}
	s.conclude(ctx, blame)
}

// pauseHold waits for news of the record; true means that the work has ended.
func (s *source) pauseHold(work <-chan struct{}) bool {
	select {
	case <-s.feed.changed:
	case <-work:
		return true
	case <-time.After(recordPoll):
	}
	return false
}

// resume lets the tree run on here: the record says that it cannot run elsewhere.
func (s *source) resume(rec *wire.Record) {
	s.letGo(severity(rec.Error.GetCode()), rec.Reason)
	ctx, cancel := s.brief()
	defer cancel()
	s.conclude(ctx, func(*wire.Record) {})
}

// letGo lets the tree run on here; trouble says whether that failed.
func (s *source) letGo(level hclog.Level, reason string) {
	s.leaving.stays()
	err := s.frozen.Thaw()
	s.sum()
	if err != nil {
		s.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the tree of pid %d could not be let go, look at it: %w", s.req.Pid, err)
		s.log.Error("the tree could not be let go; an operator must look", "pid", s.req.Pid, "error", err)
		return
	}
	s.log.Log(level, "the migration was aborted; the tree runs on here", "pid", s.req.Pid, "reason", reason, "frozen_ms", s.report.FrozenUs/1000)
}

// conclude moves the record to Aborted with what this side measured, and what more is to
// be said. In trouble the record stays as it is, for Aborted promises that the tree runs.
func (s *source) conclude(ctx context.Context, more func(*wire.Record)) {
	add := func(r *wire.Record) {
		r.SourceReport = s.report
		if more(r); s.trouble != nil {
			r.Error = failure(s.trouble, s.a.cfg.Host, s.phase()).Proto()
			r.Reason = r.Error.Message
		}
	}
	var err error
	if s.trouble == nil {
		_, err = s.ledger.move(ctx, wire.State_STATE_ABORTED, add)
	}
	if s.trouble != nil || err != nil {
		_, err = s.ledger.note(ctx, add) // it is Aborted already
	}
	if err != nil {
		s.log.Warn("the record could not be brought up to date", "error", err)
	}
	s.state.Store(int32(wire.State_STATE_ABORTED))
}

// discard ends the frozen copy: the tree runs at the destination.
func (s *source) discard() {
	var err error
	var stand engine.StandIn
	kill := s.frozen.Kill
	if s.tree != nil && s.leaving.standsIn(int(s.req.Pid)) {
		kill = func() (err error) { stand, err = s.tree.KillButRoot(); return err }
	}
	s.a.leaves(int(s.req.Pid))
	for n := range 5 {
		if err = kill(); err == nil {
			break
		}
		s.log.Warn("the frozen copy could not be killed; trying again", "pid", s.req.Pid, "error", err)
		time.Sleep(50 * time.Millisecond << n)
	}
	s.leaving.gone(stand)
	s.owes = err != nil
	s.sum()
	s.enter(wire.State_STATE_COMPLETED, "pid", s.req.Pid, "frozen_ms", s.report.FrozenUs/1000)
	if err != nil {
		s.log.Error("the tree runs at the destination, but its frozen copy here could not be killed; it must never run again, kill it", "pid", s.req.Pid, "error", err)
	}
	ctx, cancel := s.brief()
	defer cancel()
	if _, nerr := s.ledger.note(ctx, func(r *wire.Record) {
		r.SourceReport = s.report
		if err != nil {
			r.Error = failure(wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the frozen copy of pid %d could not be killed; it must never run again: %w", s.req.Pid, err), s.a.cfg.Host, wire.State_STATE_COMPLETED).Proto()
		}
	}); nerr != nil {
		s.log.Warn("the record could not be brought up to date", "error", nerr)
	}
}

// sum completes the report when the frozen part is over.
func (s *source) sum() {
	s.report.FrozenUs = us(time.Since(s.frozenAt))
	s.report.FrozenAtUnixUs = s.frozenAt.UnixMicro()
	if s.out == nil {
		return // the agent that sent it has died
	}
	st := s.out.Stats()
	transferred(s.report, st, s.sink.pages.Load())
	s.report.Lane, s.report.Compression = laneText(s.req.Lane, st.Detoured), st.Compression
}

// giveUp ends a migration that failed before the tree was frozen.
func (s *source) giveUp(cause error) {
	ctx, cancel := s.brief()
	defer cancel()
	blame := s.blame(cause)
	if s.out != nil {
		transferred(s.report, s.out.Stats(), s.sink.pages.Load())
	}
	report := func(r *wire.Record) { r.SourceReport = s.report } // whose absence the operator's command waits for
	rec, err := s.ledger.move(ctx, wire.State_STATE_ABORTED, func(r *wire.Record) {
		blame(r)
		report(r)
	})
	if f, ok := errors.AsType[*wire.Failure](err); ok && f.Code == wire.Code_CODE_CONFLICT && rec.GetState() == wire.State_STATE_ABORTED {
		_, err = s.ledger.note(ctx, report)
	}
	if err != nil {
		s.log.Warn("the record could not be brought up to date", "error", err)
	}
	s.log.Log(severity(wire.CodeOf(cause)), "the migration ended before the tree was frozen, nothing was touched", "pid", s.req.Pid, "reason", cause)
}
