package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"godwit/agent/handoff"
	"godwit/engine"
	"godwit/wire"
)

// destination is the session of the host where a tree lands.
//
//	prepare ─► checked, files held, stream open ─► Restoring ─► Staged ══► HandingOff ─► running ─► Completed
//	    │                  │                           │           │            │
//	    └─ refused         └───────── Aborting, whatever was built is discarded │
//	                                                               Run failed:  └─► discarded ─► Returning
//
// What it does when is the table handoff.Destination; here is how.
//
// ══► is the commit: a compare-and-set. No task of the tree has run before its
// success is known, and none runs without.
type destination struct {
	*session
	req  *wire.PrepareRequest
	held *holdings
	lane *wire.Lane // that the stream is to travel over
	// landed says that the tree was let go here.
	landed bool
	in     inStream
	src    *streamSource
	tree   engine.Standing
	// entry is the journal's, and landing its writing for the commit.
	entry   entry
	landing *pledge
	// pager brings memory that comes when the tree runs; nil: there is none.
	pager *pagerProcess
	paged bool // it has something to bring
	// dead is since when the pager is seen to be dead.
	dead time.Time

	// cause is why the tree does not stay here; nil: it does.
	cause error
	// alive is what lives of a tree that an agent left which died, lives whether that is
	// all that is to live.
	alive []engine.Held
	lives bool
	// recovered says that such an agent left it, here that it runs here, or did.
	recovered, here bool

	report *wire.Report
}

// inStream is the receiving end of a stream.
type inStream interface {
	chunkReader
	// Close ends the stream; err, if not nil, is what the sender is told.
	Close(err error)
	meter
}

// Prepare checks that a tree can land here, and gets ready to receive it.
func (a *Agent) Prepare(ctx context.Context, req *wire.PrepareRequest) (*wire.PrepareReply, error) {
	if err := checkProtocol(req.Protocol); err != nil {
		return nil, err
	}
	if req.Id == "" || req.Source == "" || req.Requirements == nil {
		return nil, invalid("the request lacks the migration's id, source or requirements")
	}
	if err := checkOptions(req.Options); err != nil {
		return nil, err
	}
	d, isNew, err := a.admitDestination(req)
	if err != nil {
		return nil, err
	}
	if isNew {
		go d.run()
	}
	if err := d.await(ctx); err != nil {
		return nil, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	return &wire.PrepareReply{Stream: d.id, Lane: d.lane, Codecs: wire.Codecs}, nil
}

// admitDestination makes the session for a request, or finds the one that an
// earlier request made, as long as nothing has come in for it.
func (a *Agent) admitDestination(req *wire.PrepareRequest) (d *destination, isNew bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.destinations[req.Id]; old != nil {
		if old.req.Source != req.Source || old.phase() != wire.State_STATE_PREFLIGHT {
			return nil, false, wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is already under way here", req.Id)
		}
		return old, false, nil
	}
	if a.stopping {
		return nil, false, errStopping(a.cfg.Host)
	}
	if err := a.mayLand(); err != nil {
		return nil, false, failure(err, a.cfg.Host, wire.State_STATE_PREFLIGHT)
	}
	d = &destination{session: a.newSession(req.Id, wire.RoleDestination, req.Source), req: req, report: &wire.Report{}}
	d.state.Store(int32(wire.State_STATE_PREFLIGHT))
	a.destinations[req.Id] = d
	return d, true, nil
}

func (d *destination) run() {
	d.drive(handoff.Destination.First)
}

// drive brings the session from a step to its end.
func (d *destination) drive(from handoff.Step) {
	last := handoff.Destination.Run(from, d.perform)
	if d.unfeed != nil {
		d.unfeed()
	}
	if d.held != nil {
		d.held.close(d.landed)
	}
	d.pager.close()
	if last.Do != handoff.Keep {
		d.tidy()
		d.forget()
	}
	d.cancel(nil)
	d.leave()
	close(d.done)
}

// perform carries out the action of a step.
func (d *destination) perform(at handoff.Step) handoff.Event {
	switch at.Do {
	case handoff.Prepare:
		return d.prepare()
	case handoff.Receive:
		return d.went(handoff.Built, d.receive())
	case handoff.Stage:
		return d.went(handoff.Staged, d.stage())
	case handoff.Commit:
		return d.went(handoff.Owner, d.commit())
	case handoff.Run:
		return d.land()
	case handoff.NoteRan:
		return d.noteRan()
	case handoff.Complete:
		return d.complete()
	case handoff.Tell:
		return d.tell(at.To)
	case handoff.Drop:
		return d.drop(at.To)
	case handoff.Return:
		return d.giveBack()
	case handoff.Complain:
		return d.complain()
	case handoff.Kill:
		return d.fence(at.To)
	case handoff.Read:
		return d.read(at.To)
	case handoff.Watch:
		return d.watchPager()
	case handoff.Await:
		return d.pause(at.To)
	case handoff.Look:
		if d.committed.Store(true); d.lives {
			return handoff.Lives
		}
		return handoff.Partial
	case handoff.Doom:
		return d.doom()
	case handoff.Concede:
		return d.concede()
	}
	panic("a destination does not " + string(at.Do))
}

// went is what came of an action that ends the migration here if it fails.
func (d *destination) went(well handoff.Event, err error) handoff.Event {
	if err == nil {
		return well
	}
	d.cause = err
	return handoff.Failed
}

func (d *destination) prepare() handoff.Event {
	err := d.begin()
	if err != nil {
		d.forget()
		d.leave() // before the answer: whoever is refused may ask again at once
	}
	d.answer(err)
	if err != nil {
		d.log.Info("refused", "reason", err)
		return handoff.Refused
	}
	return handoff.Prepared
}

// leave takes the session off the agent's list.
func (d *destination) leave() {
	d.a.mu.Lock()
	defer d.a.mu.Unlock()
	if d.a.destinations[d.id] == d {
		delete(d.a.destinations, d.id)
	}
}

// begin looks whether the tree can land and opens the stream.
func (d *destination) begin() error {
	ctx := limit(d.work, d.a.cfg.Timeouts.Begin)
	rec, err := d.ledger.read(ctx)
	if err != nil {
		return err
	}
	if err := belongs(rec, d.req.Source, d.a.cfg.Host); err != nil {
		return err
	}
	d.watch()
	// The source is looked for while all else is looked at.
	reached := promise(func() error {
		d.lane = d.a.reach(ctx, d.req.Direct, d.req.Options.GetLane())
		return nil
	})
	defer func() { _ = reached.wait() }()
	// Before anything is made.
	d.entry.Places = append(places(d.req.Resolutions), created(d.req.Resolutions)...)
	if err := d.note(d.entry); err != nil {
		return err
	}
	if d.held, err = d.a.hold(ctx, d.req, d.noteCreated); err != nil {
		return err
	}
	if err := d.a.cfg.Engine.Check(ctx, planOf(d.req.Requirements), d.options()); err != nil {
		return err
	}
	if err := d.pageWith(); err != nil {
		return err
	}
	_ = reached.wait() // always nil
	if err := directly(d.req.Options.GetLane(), d.lane); err != nil {
		return err
	}
	d.in, err = d.a.cfg.Streams.Receive(d.work, d.id, d.id, d.req.Source, d.a.cfg.Timeouts.Prepared, d.lane, d.req.Direct)
	if err != nil && d.lane.Direct && d.req.Options.GetLane() != wire.LaneChoice_LANE_CHOICE_DIRECT {
		d.lane = &wire.Lane{Reason: brief(err)}
		d.in, err = d.a.cfg.Streams.Receive(d.work, d.id, d.id, d.req.Source, d.a.cfg.Timeouts.Prepared, d.lane, nil)
	}
	if err != nil {
		return fmt.Errorf("open the stream from %s: %w", d.req.Source, err)
	}
	d.point("prepared")
	d.log.Info("prepared", "lane", d.lane.Text(), "processes", len(d.req.Requirements.Tasks), "bytes", d.req.Requirements.MemoryBytes, "inherited", len(d.held.files))
	return nil
}

func (d *destination) options() engine.RestoreOptions {
	o := engine.RestoreOptions{
		Files:   engine.FileRestoreOptions{Policy: policy(d.req.Resolutions), Proxied: d.held.far},
		Inherit: d.held.files, NewPidNamespace: d.req.Options.GetPidNamespaceNew(), Host: d.a.cfg.Host,
		FileLocks: true, ExtUnixSk: true, TCPEstablished: true, Carry: places(d.req.Resolutions),
		Mark: engine.MarkOf(d.id), Note: d.noteMade,
	}
	if d.pager != nil {
		o.Paging = func(spaces []engine.Space) error {
			d.paged = true
			defer d.point("paging")
			return d.pager.serve(spaces)
		}
	}
	// A terminal whose master stays is that of a session in the tree.
	o.Lead = slices.ContainsFunc(d.req.Resolutions, func(r *wire.Resolution) bool { return r.Proxy.GetTerminal() })
	if d.held.terminal != nil {
		o.ShellJob, o.Lead, o.Terminal = true, true, d.held.terminal
	}
	return o
}

// receive builds the tree from the stream.
func (d *destination) receive() error {
	d.src = newStreamSource(d.in)
	hello, err := d.src.hello(d.work, d.a.cfg.Timeouts.Prepared)
	if err != nil {
		return d.because(err)
	}
	if err := checkProtocol(hello.Protocol); err != nil {
		return err
	}
	if hello.Id != d.id || hello.Source != d.req.Source {
		return invalid("the stream is that of migration %s from %s", hello.Id, hello.Source)
	}
	d.state.Store(int32(wire.State_STATE_FREEZING))
	ctx, stop := context.WithCancel(d.work)
	defer stop()
	go d.session.report(ctx, d.in, d.src.pages.Load, d.req.Requirements.MemoryBytes)

	d.src.begun = func() {
		d.enter(wire.State_STATE_PRE_COPYING)
		d.point("outlined")
	}
	// The record is brought up to date while the tree is built.
	var told *pledge
	d.src.complete = func() error {
		told = promise(func() error {
			if _, err := d.ledger.move(d.work, wire.State_STATE_RESTORING, nil); err != nil {
				return err
			}
			d.enter(wire.State_STATE_RESTORING)
			return nil
		})
		return nil
	}
	tree, err := d.a.cfg.Engine.Restore(d.work, d.src, d.options())
	d.tree = tree // nil after an error
	if terr := told.wait(); terr != nil {
		return d.because(terr)
	}
	if err != nil {
		return d.because(fmt.Errorf("build the tree from %s: %w", d.req.Source, err))
	}
	d.point("built")
	if err := d.drained(); err != nil {
		return d.because(err)
	}
	st := d.in.Stats()
	d.report.RestoreUs = us(time.Since(st.First))
	transferred(d.report, st, d.src.pages.Load())
	d.in.Close(nil)
	return nil
}

// stage brings the record to Staged.
func (d *destination) stage() error {
	// What the commit needs is written to the disk meanwhile.
	d.landing = promise(d.noteLanding)
	if _, err := d.ledger.move(d.work, wire.State_STATE_STAGED, func(r *wire.Record) {
		r.LandedPid = int32(d.tree.Root())
	}); err != nil {
		return d.because(errors.Join(err, d.landing.wait()))
	}
	d.point("staged")
	d.enter(wire.State_STATE_STAGED, "pid", d.tree.Root(), "processes", len(d.tree.Pids()))
	return nil
}

// drained makes sure that the stream came to its verified end: a tree with
// memory missing must never run.
func (d *destination) drained() error {
	_, _, p, err := d.src.Next(d.work)
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return fmt.Errorf("receive the end of the stream from %s: %w", d.req.Source, err)
	}
	return wire.Errorf(wire.Code_CODE_INTERNAL, "the tree was built although %d bytes of it had not been read", len(p))
}

// commit makes the destination the owner. An error means that it is not, and
// that it can no longer become it.
func (d *destination) commit() error {
	if err := d.landing.wait(); err != nil {
		return err
	}
	if d.work.Err() != nil {
		return context.Cause(d.work)
	}
	d.point("noted")
	// From the first attempt on, the answer is needed whatever else happens: the
	// change may have been made although nothing was heard of it.
	if _, err := d.ledger.move(forever(), wire.State_STATE_HANDING_OFF, nil); err != nil {
		return d.because(err)
	}
	d.committed.Store(true)
	d.point("handing")
	return nil
}

// noteLanding tells the journal of a tree that may run from now on.
func (d *destination) noteLanding() error {
	var err error
	if d.entry.Waiting, err = d.tree.Waiting(); err != nil {
		return err
	}
	d.entry.Pid = d.tree.Root()
	if d.paged {
		d.entry.Pager = &d.pager.who
	}
	if d.a.cfg.Journal == nil {
		return nil
	}
	for _, pid := range d.tree.Pids() {
		h, err := identify(pid)
		if err != nil {
			return err
		}
		d.entry.Tree = append(d.entry.Tree, h)
	}
	return d.note(d.entry)
}

// noteCreated tells the journal of a file that was made, before it has its name.
func (d *destination) noteCreated(f createdFile) error {
	d.entry.Created = append(d.entry.Created, f)
	return d.note(d.entry)
}

// noteMade tells it of what is going to be made in its place.
func (d *destination) noteMade(paths []string) error {
	d.entry.Made = append(d.entry.Made, paths...)
	return d.note(d.entry)
}

// land lets the tree run. The destination owns it.
func (d *destination) land() handoff.Event {
	d.enter(wire.State_STATE_HANDING_OFF, "pid", d.tree.Root())
	committed := time.Now()
	err := d.held.start(forever())
	if err == nil {
		err = d.tree.Run()
	}
	if err != nil {
		return d.went(handoff.Ran, fmt.Errorf("start the tree: %w", err))
	}
	d.landed = true
	resumed := time.Now()
	if d.paged {
		if err := d.pager.tell(pagerAnswer{}); err != nil {
			d.log.Warn("the pager has ended", "error", err)
		}
	}
	d.point("ran")
	d.report.ResumeUs = us(resumed.Sub(committed))
	if last := d.in.Stats().Last; !last.IsZero() {
		d.report.FrozenUs = us(resumed.Sub(last))
	}
	d.report.ResumedAtUnixUs = resumed.UnixMicro()
	d.report.PeakRssBytes = peakRSS()
	return handoff.Ran
}

// noteRan tells the journal that all of the tree was let go.
func (d *destination) noteRan() handoff.Event {
	defer d.a.adopt(d.tree.Child(), d.tree.Root(), d.id)
	d.entry.Ran = true
	d.alive = d.entry.Tree
	if err := d.note(d.entry); err != nil {
		d.log.Warn("should this agent die now, the next one takes processes that have ended meanwhile for some that never ran", "error", err)
		return handoff.Failed
	}
	return handoff.Noted
}

// complete tells the record that the tree runs here.
func (d *destination) complete() handoff.Event {
	to, event := wire.State_STATE_COMPLETED, handoff.Told
	if d.paged {
		to, event = wire.State_STATE_PAGING, handoff.Pages
	}
	d.here = true
	rec, err := d.ledger.move(forever(), to, func(r *wire.Record) {
		if r.LandedPid = int32(d.entry.Pid); d.landed {
			r.LandedPid, r.DestinationReport = int32(d.tree.Root()), d.report
		}
	})
	if err != nil {
		event = handoff.Denied(handoff.Saw(rec))
	}
	switch {
	case event == handoff.Overruled:
	case event == handoff.Refused:
		d.trouble = err
		d.log.Error("the tree runs here, but the record cannot say so; the source keeps a frozen copy that must be killed", "pid", d.entry.Pid, "error", err)
	case event == handoff.Told:
		d.point("completed")
		d.enter(to, "pid", d.entry.Pid, "bytes", d.report.Bytes, "restore_ms", d.report.RestoreUs/1000, "resume_ms", d.report.ResumeUs/1000)
	default:
		d.enter(to, "pager", d.entry.Pager.Pid)
	}
	return event
}

// giveBack returns the ownership: nothing of the tree is left here.
func (d *destination) giveBack() handoff.Event {
	d.log.Error("the tree could not be started here and goes back to the source", "error", d.cause)
	rec, err := d.ledger.move(forever(), wire.State_STATE_RETURNING, d.blame(d.cause))
	if err == nil {
		return handoff.Told
	}
	d.log.Warn("the record could not be brought up to date", "error", err)
	return handoff.Denied(handoff.Saw(rec))
}

// drop removes what was built of the tree.
func (d *destination) drop(in handoff.State) handoff.Event {
	event := handoff.Dropped
	if d.tree != nil {
		if err := d.tree.Discard(); err != nil {
			event = handoff.Undropped
			if in == handoff.GivingBack {
				// Parts of it may run: the source must not.
				err = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the tree could neither be started nor removed here, so the source stays frozen until an operator has looked: %w", errors.Join(d.cause, err))
			}
			d.trouble = err
			d.log.Error("what was built of the tree could not be removed; kill it", "pids", d.tree.Pids(), "error", err)
		}
	}
	if event == handoff.Dropped && in != handoff.GivingBack {
		d.log.Log(severity(wire.CodeOf(d.cause)), "the migration was aborted; nothing of the tree is left here", "reason", d.cause)
	}
	return event
}

// complain notes in the record that an operator must look.
func (d *destination) complain() handoff.Event {
	ctx, cancel := d.brief()
	defer cancel()
	if _, err := d.ledger.note(ctx, func(r *wire.Record) { d.blame(d.trouble)(r) }); err != nil {
		d.log.Warn("the record could not be brought up to date", "error", err)
		return handoff.Untold
	}
	return handoff.Told
}

// tell writes into the record why this side gives up, unless the migration ends already.
func (d *destination) tell(in handoff.State) handoff.Event {
	ctx := d.a.informing
	switch in {
	case handoff.Abandoning:
		d.in.Close(d.cause)
		// The record first: the source waits for it with a frozen tree.
		ctx = limit(ctx, 2*time.Second)
	case handoff.Withdrawn:
		ctx = limit(ctx, 30*time.Second)
	}
	event, err := d.telling(ctx, d.blame(d.cause))
	if err != nil && in != handoff.Abandoning {
		d.log.Warn("the record could not be brought up to date; the source finds out by itself", "error", err)
	}
	return event
}

func (d *destination) telling(ctx context.Context, blame func(*wire.Record)) (handoff.Event, error) {
	for {
		rec, err := d.ledger.read(ctx)
		if wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND {
			return handoff.Told, err // there is nobody to tell
		}
		if err != nil {
			return handoff.Untold, err
		}
		if wire.Committed(rec.State) {
			return handoff.Overtaken, nil
		}
		if s := rec.State; wire.Terminal(s) || s == wire.State_STATE_ABORTING {
			return handoff.Told, nil
		}
		to := wire.State_STATE_ABORTING
		if rec.State < wire.State_STATE_PRE_COPYING {
			to = wire.State_STATE_ABORTED // before the source has begun nothing is to be thawed
		}
		switch _, err = d.ledger.move(ctx, to, blame); {
		case err == nil:
			return handoff.Told, nil
		case errors.Is(err, errUndecided):
			return handoff.Untold, err
		}
		// Somebody went a step further meanwhile: look again.
	}
}

// read looks who is to run the tree, for an agent that finds it in the journal.
func (d *destination) read(in handoff.State) handoff.Event {
	rec, err := d.ledger.read(forever())
	if err != nil {
		d.here = len(d.entry.Tree) > 0
		return d.unread(err)
	}
	sight := handoff.Saw(rec)
	if in == handoff.Answering {
		d.here = sight == handoff.SawComplete || sight == handoff.SawPaging || sight == handoff.SawGivenUp
	}
	return sight
}

// unread says what a record is that cannot be read, although the bus is there.
func (d *destination) unread(err error) handoff.Event {
	d.log.Error("the record cannot be read, so the migration is left as it is", "error", err)
	if wire.CodeOf(err) == wire.Code_CODE_NOT_FOUND {
		return handoff.Unreadable
	}
	return handoff.Damaged
}

// pause waits for news of the record, or of the pager.
func (d *destination) pause(in handoff.State) handoff.Event {
	wait := recordPoll
	var end <-chan struct{}
	if in == handoff.Paging {
		wait /= 4
		if d.pager != nil && d.dead.IsZero() {
			end = d.pager.done
		}
	}
	select {
	case <-d.feed.changed:
	case <-end:
	case <-time.After(wait):
	}
	return handoff.News
}

// fence kills what runs here of a tree, with everything that it has started since: it
// belongs to the source, or must not run on.
func (d *destination) fence(in handoff.State) handoff.Event {
	d.here = false
	killed, left := killTrees(d.alive)
	if len(left) > 0 {
		d.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "some of the tree runs here and could not be killed; it must not run, kill it, for %s has the other copy", d.req.Source)
		d.log.Error("a part of the tree runs here that could not be killed; an operator must look", "pids", left)
		return handoff.Unkilled
	}
	if killed > 0 && in == handoff.Fencing {
		d.log.Error("the copy of the tree here was killed", "source", d.req.Source, "processes", killed)
	}
	return handoff.Killed
}
