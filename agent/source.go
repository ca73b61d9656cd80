package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"godwit/agent/handoff"
	"godwit/engine"
	"godwit/engine/plan"
	"godwit/wire"
)

// source is the session of the host that a tree leaves.
//
//	start ─► stream opened ─► [PreCopying ─►] Freezing ─► frozen ─► FinalCopying ─► dumped ─► held ─► offered ─► wait
//
// What it does when is the table handoff.Source; here is how.
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

	// cause is why the migration is to end; nil: it is not.
	cause error
	// rec is the record as it was last read.
	rec *wire.Record
	// quiet ends the reports of what is sent.
	quiet context.CancelFunc
	// unread is when somebody was last told that the record cannot be read.
	unread time.Time

	dumped   engine.DumpStats
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
	s.drive(handoff.Source.First)
}

// drive brings the session from a step to its end.
func (s *source) drive(from handoff.Step) {
	last := handoff.Source.Run(from, s.perform)
	s.end(last.Do == handoff.Keep)
}

// perform carries out the action of a step.
func (s *source) perform(at handoff.Step) handoff.Event {
	switch at.Do {
	case handoff.Claim:
		return s.claim()
	case handoff.Freeze:
		return s.went(handoff.Frozen, s.freeze())
	case handoff.Dump:
		return s.copied(handoff.Dumped, s.dump())
	case handoff.Secure:
		return s.copied(handoff.Secured, s.secure())
	case handoff.Offer:
		return s.copied(handoff.Sent, s.offer())
	case handoff.Read:
		return s.read(at.To)
	case handoff.Await:
		return s.pause(nil)
	case handoff.Bide:
		return s.pause(s.work.Done())
	case handoff.Abort:
		if _, err := s.ledger.move(forever(), wire.State_STATE_ABORTING, s.blame(s.cause)); err != nil {
			return handoff.Refused
		}
		s.enter(wire.State_STATE_ABORTING, "reason", s.cause)
		return handoff.Told
	case handoff.Thaw:
		return s.letGo(at.To)
	case handoff.Conclude, handoff.Complain:
		return s.conclude(at)
	case handoff.GiveUp:
		return s.giveUp()
	case handoff.Kill:
		return s.discard()
	case handoff.Report:
		return s.accountFor(at.To)
	}
	panic("a source does not " + string(at.Do))
}

// went is what came of an action that ends the migration if it fails.
func (s *source) went(well handoff.Event, err error) handoff.Event {
	if err == nil {
		return well
	}
	s.cause = err
	if s.out != nil {
		s.out.Abort(err)
	}
	return handoff.Failed
}

// copied is went for the steps of a frozen tree.
func (s *source) copied(well handoff.Event, err error) handoff.Event {
	if err != nil {
		err = s.because(fmt.Errorf("copy the tree of pid %d to %s: %w", s.req.Pid, s.req.Destination, err))
		s.log.Warn("the tree cannot be moved", "error", err)
	}
	if err != nil || well == handoff.Sent {
		s.quiet()
	}
	return s.went(well, err)
}

func (s *source) claim() handoff.Event {
	touched, err := s.begin()
	if err != nil && !touched {
		// Whoever is refused may ask again at once and must not meet himself.
		s.leave()
	}
	s.answer(err)
	if e := s.went(handoff.Claimed, err); e == handoff.Claimed || touched {
		return e
	}
	return handoff.Refused
}

// end is the last of a session. keep leaves its entry in the journal.
func (s *source) end(keep bool) {
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
	if !keep {
		s.forget()
	}
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

// freeze stops the tree, of which it may have copied memory before. If it fails the
// tree runs.
func (s *source) freeze() error {
	if s.phase() == wire.State_STATE_PRE_COPYING {
		if err := s.precopy(); err != nil {
			return err
		}
	}
	if s.postcopy {
		if err := s.readyPages(s.work); err != nil {
			return s.because(err)
		}
	}
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
	s.point("held")
	return s.leaving.dumped(s.work, s.tree.Pids())
}

// because is the reason why the work was ended, if it was: what failed then is
// only a consequence.
func (s *session) because(err error) error {
	if s.work.Err() != nil {
		return context.Cause(s.work)
	}
	return err
}

// dump reads the frozen tree and sends it, but for the end.
func (s *source) dump() error {
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
	var ctx context.Context
	ctx, s.quiet = context.WithCancel(s.work)
	go s.session.report(ctx, s.out, s.sink.pages.Load, s.memory)

	stats, err := s.tree.Dump(s.work, s.sink)
	if terr := told.wait(); terr != nil {
		err = terr // the other one is a consequence
	}
	s.point("dumped")
	if !stats.FrozenAt.IsZero() {
		s.frozenAt = stats.FrozenAt
	}
	s.report.FreezeUs, s.report.DumpUs = us(stats.FreezeDur), us(stats.DumpDur)
	s.report.FrozenFileBytes = stats.CarriedBytes
	s.dumped = stats
	if s.late = stats.Late; err == nil && len(s.late) > 0 {
		err = s.servePages(s.late)
	}
	if err == nil {
		err = s.sink.dataDone()
	}
	return err
}

// offer sends the end of the stream, without which the destination cannot commit. It
// returns once all has been applied.
func (s *source) offer() error {
	err := s.sink.end(nil)
	if err == nil {
		err = s.out.Close(s.work)
	}
	if err != nil {
		return err
	}
	s.point("sent")
	st, d := s.out.Stats(), s.dumped
	s.log.Info("copied", "processes", d.Processes, "threads", d.Threads, "pages", d.Pages, "bytes", st.WireBytes,
		"resent_bytes", st.ResentBytes, "freeze_ms", d.FreezeDur.Milliseconds(), "dump_ms", d.DumpDur.Milliseconds())
	return nil
}

// read looks who runs the tree.
func (s *source) read(in handoff.State) handoff.Event {
	rec, err := s.ledger.read(forever())
	if err != nil {
		if time.Since(s.unread) > time.Minute {
			s.unread = time.Now()
			s.log.Error("the record of the migration cannot be read, so nobody knows where the tree may run; it stays frozen here", "pid", s.req.Pid, "error", err)
		}
		return handoff.Unreadable
	}
	s.rec = rec
	saw := handoff.Saw(rec)
	switch saw {
	case handoff.SawComplete:
		s.committed.Store(true)
		s.point("completed")
	case handoff.SawHanding, handoff.SawPaging, handoff.SawGivenUp:
		if rec.State == wire.State_STATE_PAGING && s.phase() != rec.State && s.committed.Load() {
			s.enter(rec.State)
		}
		if !s.committed.Swap(true) {
			s.enter(rec.State)
			if in == handoff.Ending {
				s.log.Warn("the destination has committed; the tree stays frozen here until it tells the outcome", "error", s.cause)
			}
		}
	}
	return saw
}

// pause waits for news of the record, or for the end of the work.
func (s *source) pause(work <-chan struct{}) handoff.Event {
	select {
	case <-s.feed.changed:
	case <-work:
		s.cause = context.Cause(s.work)
		return handoff.WorkEnded
	case <-time.After(recordPoll):
	}
	return handoff.News
}

// letGo lets the tree run on here: nobody else can have it, or the record says so.
// trouble says whether that failed.
func (s *source) letGo(in handoff.State) handoff.Event {
	level, reason := severity(wire.CodeOf(s.cause)), ""
	if in == handoff.Resuming {
		level, reason = severity(s.rec.Error.GetCode()), s.rec.Reason
	} else {
		reason = s.cause.Error()
	}
	s.leaving.stays()
	err := s.frozen.Thaw()
	s.sum()
	if err != nil {
		s.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the tree of pid %d could not be let go, look at it: %w", s.req.Pid, err)
		s.log.Error("the tree could not be let go; an operator must look", "pid", s.req.Pid, "error", err)
		if errors.Is(err, errTreeGone) {
			return handoff.Gone
		}
		return handoff.Unthawed
	}
	s.log.Log(level, "the migration was aborted; the tree runs on here", "pid", s.req.Pid, "reason", reason, "frozen_ms", s.report.FrozenUs/1000)
	return handoff.Thawed
}

// conclude brings the record to its end, with what this side measured, for as long as
// the agent is not told to stop: to Aborted if the tree runs here, which that promises, and
// else only to Aborting.
func (s *source) conclude(at handoff.Step) handoff.Event {
	if at.Do == handoff.Complain && s.trouble == nil {
		what := "see whether it runs anywhere"
		if at.To == handoff.Lamenting {
			what = fmt.Sprintf("with memory that it misses at %s: godwit resolve %s --source-is-dead ends it there", s.peer, s.id)
		}
		s.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the copy of pid %d here is gone, %s: %w", s.req.Pid, what, errTreeGone)
	}
	ctx, to, blame := s.a.informing, wire.State_STATE_ABORTED, func(*wire.Record) {}
	if s.rec == nil {
		blame = s.blame(s.cause) // nobody has asked it what was the cause
	}
	add := func(r *wire.Record) {
		r.SourceReport = s.report
		if blame(r); s.trouble != nil {
			r.Error = failure(s.trouble, s.a.cfg.Host, s.phase()).Proto()
			r.Reason = r.Error.Message
		}
	}
	if at.Do == handoff.Complain {
		to = wire.State_STATE_ABORTING
	}
	_, err := s.ledger.move(ctx, to, add)
	if err != nil && !errors.Is(err, errUndecided) {
		_, err = s.ledger.note(ctx, add) // it is there already
	}
	s.state.Store(int32(wire.State_STATE_ABORTED))
	if err == nil {
		return handoff.Told
	}
	s.log.Warn("the record could not be brought up to date", "error", err)
	if wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND {
		return handoff.Told // there is nobody to tell
	}
	if at.Do == handoff.Conclude {
		if err := s.note(entry{Pid: int(s.req.Pid)}); err != nil {
			s.log.Debug("the journal still has the tree, which does no harm", "error", err)
		}
	}
	return handoff.Untold
}

// discard ends the frozen copy: the tree runs at the destination.
func (s *source) discard() handoff.Event {
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
	s.sum()
	s.enter(wire.State_STATE_COMPLETED, "pid", s.req.Pid, "frozen_ms", s.report.FrozenUs/1000)
	if err != nil {
		s.cause = err
		s.log.Error("the tree runs at the destination, but its frozen copy here could not be killed; it must never run again, kill it", "pid", s.req.Pid, "error", err)
		return handoff.Unkilled
	}
	return handoff.Killed
}

// accountFor adds to the record of a tree that runs at the destination what this side
// measured, and whether a frozen copy is left.
func (s *source) accountFor(in handoff.State) handoff.Event {
	ctx, cancel := s.brief()
	defer cancel()
	defer s.point("discarded")
	if _, err := s.ledger.note(ctx, func(r *wire.Record) {
		r.SourceReport = s.report
		if in == handoff.Owing {
			r.Error = failure(wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the frozen copy of pid %d could not be killed; it must never run again: %w", s.req.Pid, s.cause), s.a.cfg.Host, wire.State_STATE_COMPLETED).Proto()
		}
	}); err != nil {
		s.log.Warn("the record could not be brought up to date", "error", err)
		return handoff.Untold
	}
	return handoff.Told
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
	s.report.Lane, s.report.Compression = s.req.Lane.Text(), st.Compression
	if s.req.Lane.GetDirect() && st.Detoured {
		s.report.Lane += ", then cluster (the direct connections were lost)"
	}
}

// giveUp ends a migration that failed before the tree was frozen.
func (s *source) giveUp() handoff.Event {
	if s.out != nil {
		transferred(s.report, s.out.Stats(), s.sink.pages.Load())
	}
	blame := s.blame(s.cause)
	report := func(r *wire.Record) { r.SourceReport = s.report } // whose absence the operator's command waits for
	rec, err := s.ledger.move(s.a.informing, wire.State_STATE_ABORTED, func(r *wire.Record) {
		blame(r)
		report(r)
	})
	s.log.Log(severity(wire.CodeOf(s.cause)), "the migration ended before the tree was frozen, nothing was touched", "pid", s.req.Pid, "reason", s.cause)
	if err != nil && rec.GetState() == wire.State_STATE_ABORTED {
		_, err = s.ledger.note(s.a.informing, report)
	}
	if err != nil {
		s.log.Warn("the record could not be brought up to date", "error", err)
		if errors.Is(err, errUndecided) {
			return handoff.Untold
		}
	}
	return handoff.Told
}
