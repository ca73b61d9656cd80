package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

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
	defer func() {
		if d.unfeed != nil {
			d.unfeed()
		}
		if d.held != nil {
			d.held.close(d.landed)
		}
		d.pager.close()
		d.forget()
		d.cancel(nil)
		d.leave()
		close(d.done)
	}()
	err := d.begin()
	if err != nil {
		d.forget()
		d.leave() // before the answer: whoever is refused may ask again at once
	}
	d.answer(err)
	if err != nil {
		d.log.Info("refused", "reason", err)
		return
	}
	if err = d.receive(); err == nil {
		err = d.commit()
	}
	if err != nil {
		d.abandon(err)
		return
	}
	d.land()
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
	if err := d.pageWith(ctx); err != nil {
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
	d.log.Info("prepared", "lane", laneText(d.lane, false), "processes", len(d.req.Requirements.Tasks), "bytes", d.req.Requirements.MemoryBytes, "inherited", len(d.held.files))
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

// receive builds the tree from the stream and brings the record to Staged.
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
	// What the commit needs is written to the disk meanwhile.
	d.landing = promise(d.noteLanding)
	if _, err := d.ledger.move(d.work, wire.State_STATE_STAGED, func(r *wire.Record) {
		r.LandedPid = int32(tree.Root())
	}); err != nil {
		return d.because(errors.Join(err, d.landing.wait()))
	}
	d.point("staged")
	d.enter(wire.State_STATE_STAGED, "pid", tree.Root(), "processes", len(tree.Pids()))
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
	if d.a.cfg.Journal == nil {
		return nil
	}
	var err error
	if d.entry.Waiting, err = d.tree.Waiting(); err != nil {
		return err
	}
	d.entry.Pid = d.tree.Root()
	if d.paged {
		d.entry.Pager = &d.pager.who
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
func (d *destination) land() {
	d.enter(wire.State_STATE_HANDING_OFF, "pid", d.tree.Root())
	committed := time.Now()
	err := d.held.start(forever())
	if err == nil {
		err = d.tree.Run()
	}
	if err != nil {
		d.giveBack(err)
		return
	}
	d.landed = true
	resumed := time.Now()
	if d.paged {
		if err := d.pager.tell(pagerAnswer{}); err != nil {
			d.log.Warn("the pager has ended", "error", err)
		}
	}
	d.point("ran")
	d.entry.Ran = true
	if err := d.note(d.entry); err != nil {
		d.log.Warn("should this agent die now, the next one takes processes that have ended meanwhile for some that never ran", "error", err)
	}
	d.a.adopt(d.tree.Child(), d.tree.Root(), d.id)
	d.report.ResumeUs = us(resumed.Sub(committed))
	if last := d.in.Stats().Last; !last.IsZero() {
		d.report.FrozenUs = us(resumed.Sub(last))
	}
	d.report.ResumedAtUnixUs = resumed.UnixMicro()
	d.report.PeakRssBytes = peakRSS()
	to := wire.State_STATE_COMPLETED
	if d.paged {
		to = wire.State_STATE_PAGING
	}
	if _, err := d.ledger.move(forever(), to, func(r *wire.Record) {
		r.LandedPid = int32(d.tree.Root())
		r.DestinationReport = d.report
	}); err != nil {
		d.trouble = err
		if rec, rerr := d.ledger.read(forever()); rerr == nil && overruled(rec) {
			d.trouble = nil
			d.fence(d.entry.Tree)
			return
		}
		d.log.Error("the tree runs here, but the record cannot say so; the source keeps a frozen copy that must be killed", "pid", d.tree.Root(), "error", err)
		return
	}
	if d.paged {
		d.awaitPaging(d.pager.who, d.pager.done, d.entry.Tree)
		return
	}
	d.point("completed")
	d.enter(wire.State_STATE_COMPLETED, "pid", d.tree.Root(), "bytes", d.report.Bytes, "restore_ms", d.report.RestoreUs/1000, "resume_ms", d.report.ResumeUs/1000)
}

// giveBack returns the ownership: the tree could not be started here.
func (d *destination) giveBack(cause error) {
	cause = fmt.Errorf("start the tree: %w", cause)
	blame := d.blame(cause)
	if err := d.tree.Discard(); err != nil {
		// Parts of it may run: the source must not.
		d.trouble = wire.Errorf(wire.Code_CODE_UNKNOWN_STATE, "the tree could neither be started nor removed here, so the source stays frozen until an operator has looked: %w", errors.Join(cause, err))
		d.log.Error("the tree could neither be started nor removed; an operator must look", "pids", d.tree.Pids(), "error", d.trouble)
		ctx, cancel := d.brief()
		defer cancel()
		if _, err := d.ledger.note(ctx, func(r *wire.Record) { d.blame(d.trouble)(r) }); err != nil {
			d.log.Warn("the record could not be brought up to date", "error", err)
		}
		return
	}
	if _, err := d.ledger.move(forever(), wire.State_STATE_RETURNING, blame); err != nil {
		d.log.Warn("the record could not be brought up to date", "error", err)
		d.owes = true
	}
	d.log.Error("the tree could not be started here and goes back to the source", "error", cause)
}

// abandon ends a migration that this side cannot bring to the commit.
func (d *destination) abandon(cause error) {
	d.in.Close(cause)
	// The record first: the source waits for it with a frozen tree.
	err := d.tell(2*time.Second, cause)
	if d.tree != nil {
		if derr := d.tree.Discard(); derr != nil {
			d.trouble = derr
			d.log.Error("what was built of the tree could not be removed; nothing of it has run, kill it", "pids", d.tree.Pids(), "error", derr)
		}
	}
	if err != nil {
		err = d.tell(30*time.Second, cause)
	}
	if err != nil {
		d.log.Warn("the record could not be brought up to date; the source finds out by itself", "error", err)
	}
	d.log.Log(severity(wire.CodeOf(cause)), "the migration was aborted; nothing of the tree is left here", "reason", cause)
}

// tell writes into the record why this side gives up, unless the migration
// already ends.
func (d *destination) tell(patience time.Duration, cause error) error {
	ctx, cancel := context.WithTimeout(d.a.informing, patience)
	defer cancel()
	to := wire.State_STATE_ABORTING
	blame := d.blame(cause)
	for range 3 {
		rec, err := d.ledger.read(ctx)
		if err != nil {
			return err
		}
		if s := rec.State; wire.Terminal(s) || s == wire.State_STATE_ABORTING || wire.Committed(s) {
			return nil
		}
		// Before the source has begun nothing is to be thawed.
		if to = wire.State_STATE_ABORTING; rec.State < wire.State_STATE_PRE_COPYING {
			to = wire.State_STATE_ABORTED
		}
		_, err = d.ledger.move(ctx, to, blame)
		if err == nil || errors.Is(err, errUndecided) {
			return err
		}
		// The source went a step further meanwhile: look again.
	}
	return nil
}
