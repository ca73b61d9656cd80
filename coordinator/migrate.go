package coordinator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"godwit/transport"
	"godwit/wire"
)

const (
	// preflightTimeout bounds the source's look at the tree and the
	// destination's check: hashing and comparing large files takes a while.
	preflightTimeout = 30 * time.Second
	// hashTimeout bounds either look where contents are read.
	hashTimeout = 15 * time.Minute
	// startTimeout bounds the source's way to Freezing.
	startTimeout = 20 * time.Second

	// preflightTries is how often what the destination lacks is looked for before
	// it is taken for lasting, preflightPause the time between.
	preflightTries = 3
	preflightPause = 50 * time.Millisecond
	// queuePause is how often a migration that waits for its turn asks again.
	queuePause = 500 * time.Millisecond
)

// migration is one migration as its coordinator sees it, up to the moment when
// the agents drive it by themselves.
type migration struct {
	link   *link
	view   view
	rec    *wire.Record
	stream string // that the destination opened
	// What the destination holds, and the entries that led to it.
	resolutions []*wire.Resolution
	entries     []*wire.Entry
	direct      *wire.DirectOffer // of the source
	lane        *wire.Lane        // that the destination chose
	codecs      []string          // that it knows

	created bool // the record exists
	// prepared: the destination may hold something for the migration.
	prepared bool
	// sent: the source may have got the order to start.
	sent bool
	// reserved: the migration has, or had, a place at the source.
	reserved bool
	// told: the view was told what the tree is.
	told bool
}

// newMigration makes the record of a migration.
func newMigration(source string, pid int32, destination string, o *wire.MigrateOptions) *wire.Record {
	who := coordinatorName
	if host, err := os.Hostname(); err == nil {
		who = fmt.Sprintf("%s (pid %d on %s)", coordinatorName, os.Getpid(), host)
	}
	r := &wire.Record{
		Id: transport.NewID(), Source: source, Destination: destination, Pid: pid, Options: o, Coordinator: who,
	}
	r.Start(coordinatorName, time.Now())
	return r
}

// begin takes a new migration up to the point where the source has started it.
// If it fails, the migration has ended or is told to: the record says so.
func (m *migration) begin(ctx context.Context) error {
	if err := m.claim(ctx); err != nil {
		return err
	}
	m.view.record(m.rec)
	err := m.preflightLasting(ctx)
	if err == nil {
		err = m.start(ctx)
	}
	if err != nil {
		return m.fail(ctx, err)
	}
	return nil
}

// claim creates the record, unless another migration of the same tree is in
// flight.
//
// Two that are created at the same time see each other; the one that was
// created later, by the bucket's count of changes, gives way. One that is
// beyond Requested has not seen the other, which therefore came later.
func (m *migration) claim(ctx context.Context) error {
	if err := m.rivals(ctx, 0); err != nil {
		return err
	}
	revision, err := m.link.records.Create(ctx, m.rec)
	if err != nil {
		return err
	}
	m.created = true
	if err := m.rivals(ctx, revision); err != nil {
		return m.fail(ctx, err)
	}
	return m.advance(ctx, wire.State_STATE_PREFLIGHT, nil)
}

// rivals returns an error if another migration of the tree has precedence over
// the record that was created with the given revision; 0: over a new one.
func (m *migration) rivals(ctx context.Context, revision uint64) error {
	recs, err := m.link.records.List(ctx)
	if err != nil {
		return err
	}
	for _, r := range recs {
		if r.Id == m.rec.Id || r.Source != m.rec.Source || r.Pid != m.rec.Pid || wire.Terminal(r.State) {
			continue
		}
		current, rev, err := m.link.records.Get(ctx, r.Id)
		if err != nil {
			return err
		}
		if wire.Terminal(current.State) || revision != 0 && current.State == wire.State_STATE_REQUESTED && rev > revision {
			continue
		}
		return wire.Errorf(wire.Code_CODE_CONFLICT,
			"migration %s already moves pid %d of %s to %s: it is %s since %s; watch it with \"godwit watch %s\" or end it with \"godwit abort %s\"",
			r.Id, r.Pid, r.Source, r.Destination, current.State.Word(), time.UnixMilli(current.UpdatedUnixMs).Format(time.DateTime), r.Id, r.Id)
	}
	return nil
}

// advance moves the record on.
func (m *migration) advance(ctx context.Context, to wire.State, edit func(*wire.Record)) error {
	return m.change(ctx, func(r *wire.Record) error {
		if err := r.Move(to, wire.RoleCoordinator, coordinatorName, time.Now()); err != nil {
			return aborted(r, err)
		}
		if edit != nil {
			edit(r)
		}
		return nil
	})
}

func (m *migration) change(ctx context.Context, fn func(*wire.Record) error) error {
	rec, err := m.link.records.Change(ctx, m.rec.Id, fn)
	if rec != nil {
		m.rec = rec
	}
	return err
}

// aborted is the error for a migration that somebody else ended meanwhile.
func aborted(r *wire.Record, err error) error {
	if r.State == wire.State_STATE_ABORTING || r.State == wire.State_STATE_ABORTED {
		if f := failureOf(r); f != nil {
			return f
		}
		return wire.Errorf(wire.Code_CODE_ABORTED, "migration %s was aborted meanwhile: %s", r.Id, r.Reason)
	}
	return err
}

// preflightLasting is preflight for programs that open and remove files all the
// time: what the destination lacked counts only if the tree still needs it
// a little later. As long as a host has no place for it, the migration waits.
func (m *migration) preflightLasting(ctx context.Context) error {
	var seen *wire.Requirements
	waits := ""
	for try := 1; ; try++ {
		lacks, err := m.preflight(ctx, &seen)
		pause := preflightPause
		switch {
		case wire.CodeOf(err) == wire.Code_CODE_BUSY:
			try, seen = 0, nil // what it needs by then is looked at anew
			if text := err.Error(); text != waits {
				waits = text
				m.view.note(m.rec.Id, "waits for its turn: "+text)
			}
			pause = queuePause
		case !lacks || try == preflightTries:
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// stillNeeded takes the files out of req that an earlier look, if there was
// one, did not find.
func stillNeeded(req, earlier *wire.Requirements) {
	if earlier == nil {
		return
	}
	req.Files = slices.DeleteFunc(req.Files, func(f *wire.RequiredFile) bool {
		return !slices.ContainsFunc(earlier.Files, func(e *wire.RequiredFile) bool { return e.Path == f.Path && e.Kind == f.Kind })
	})
}

// preflight asks both hosts whether the tree can move, and gets both answers
// even if the first is no. Files that an earlier look, seen, did not find are
// not asked for; seen becomes this look. lacks says that nothing but the
// destination refused.
func (m *migration) preflight(ctx context.Context, seen **wire.Requirements) (lacks bool, _ error) {
	r := m.rec
	found, srcErr := m.survey(ctx, r.Options, looking{})
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err := m.describe(ctx, found, !m.told); err != nil {
		return false, err
	}
	srcErr = together(srcErr, found.lacks())
	if wire.CodeOf(srcErr) == wire.Code_CODE_REFUSED && found.req != nil && found.dstErr == nil {
		// Nothing is held for it, but all that stands in the way is told at once.
		found.dstErr = m.askResolve(ctx, found, r.Options, false, found.req)
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		return false, bothErrors(r, srcErr, together(found.dstErr, found.vain()))
	}
	if found.req == nil || found.dstErr != nil {
		return false, bothErrors(r, srcErr, together(found.dstErr, found.vain()))
	}
	stillNeeded(found.req, *seen)
	*seen = found.req
	if srcErr == nil && len(found.problems) == 0 {
		// A place at the source before one at the destination (package agent, Limits).
		if err := m.reserve(ctx); err != nil {
			return false, bothErrors(r, err, nil)
		}
	}
	m.prepared = true
	m.resolutions, m.entries, m.direct = found.resolutions, found.entries, found.direct
	dstErr := m.prepare(ctx, found.req)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	lacks = srcErr == nil && len(found.problems) == 0 && dstErr != nil && wire.CodeOf(dstErr) == wire.Code_CODE_REFUSED
	return lacks, bothErrors(r, srcErr, together(dstErr, found.vain()))
}

// describe notes in the record what the tree is.
func (m *migration) describe(ctx context.Context, found *survey, say bool) error {
	root, req := found.root, found.req
	if root == nil && req == nil {
		return nil
	}
	if err := m.change(ctx, func(r *wire.Record) error {
		if r.State != wire.State_STATE_PREFLIGHT {
			return aborted(r, nil)
		}
		if r.Options == nil {
			r.Options = &wire.MigrateOptions{}
		}
		r.Options.Proxied = declaring(r.Options, found.resolutions).Proxied
		r.Comm, r.Command = root.GetComm(), root.GetCommand()
		r.Tasks, r.MemoryBytes, r.Threads = uint32(len(req.GetTasks())), req.GetMemoryBytes(), 0
		for _, t := range req.GetTasks() {
			r.Threads += uint32(max(len(t.Tids), 1))
		}
		return nil
	}); err != nil {
		return err
	}
	m.view.record(m.rec)
	if req != nil && say {
		m.told = true
		m.view.note(m.rec.Id, fmt.Sprintf("%s of %s: %s, %s, %s", subject(m.rec), m.rec.Source,
			plural(m.rec.Tasks, "process"), plural(m.rec.Threads, "thread"), formatBytes(m.rec.MemoryBytes)))
	}
	return nil
}

// reserve takes a place at the source.
func (m *migration) reserve(ctx context.Context) error {
	r := m.rec
	call, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	_, err := transport.Call[*wire.ReserveRequest, *wire.ReserveReply](call, m.link.nc, r.Source, "reserve", &wire.ReserveRequest{Protocol: wire.Version, Id: r.Id, Pid: r.Pid})
	m.reserved = m.reserved || err == nil
	return withHosts(ctx, m.link.nc, r.Source, err)
}

// release gives the place at the source back. If that is not heard, it lapses.
func (m *migration) release(ctx context.Context) {
	if !m.reserved || m.sent {
		return
	}
	call, cancel := context.WithTimeout(ctx, abortCallTimeout)
	defer cancel()
	_, _ = transport.Call[*wire.ReserveRequest, *wire.ReserveReply](call, m.link.nc, m.rec.Source, "reserve",
		&wire.ReserveRequest{Protocol: wire.Version, Id: m.rec.Id, Pid: m.rec.Pid, Release: true})
}

// prepare asks the destination to check and to hold everything.
func (m *migration) prepare(ctx context.Context, req *wire.Requirements) error {
	r := m.rec
	call, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	prep, err := transport.Call[*wire.PrepareRequest, *wire.PrepareReply](call, m.link.nc, r.Destination, "prepare", &wire.PrepareRequest{
		Protocol: wire.Version, Id: r.Id, Source: r.Source, Requirements: req, Options: declaring(r.Options, m.resolutions), Resolutions: m.resolutions,
		Direct: m.direct,
	})
	err = withHosts(ctx, m.link.nc, r.Destination, err)
	if err == nil && prep.Stream == "" {
		err = wire.Errorf(wire.Code_CODE_INTERNAL, "the answer does not name the stream").At(r.Destination, wire.State_STATE_PREFLIGHT.Phase())
	}
	m.stream, m.lane, m.codecs = prep.GetStream(), prep.GetLane(), prep.GetCodecs()
	if err == nil && m.lane != nil {
		m.view.note(r.Id, "lane: "+printable(m.lane.Text()))
	}
	return err
}

// bothErrors is what two hosts said as one error; nil if both are.
func bothErrors(r *wire.Record, source, destination error) error {
	phase := wire.State_STATE_PREFLIGHT.Phase()
	at := func(err error, host string) *wire.Failure {
		return wire.ErrorOf(err).Failure().At(host, phase)
	}
	switch {
	case source == nil && destination == nil:
		return nil
	case destination == nil:
		return at(source, r.Source)
	case source == nil:
		return at(destination, r.Destination)
	}
	s, d := at(source, r.Source), at(destination, r.Destination)
	f := &wire.Failure{Code: s.Code, Phase: phase, Cause: errors.Join(source, destination)}
	if d.Code == wire.Code_CODE_REFUSED {
		f.Code = d.Code // the more telling one: nothing was touched
	}
	f.Message = fmt.Sprintf("%s says: %s; %s says: %s", s.Host, s.Message, d.Host, d.Message)
	for _, x := range []*wire.Failure{s, d} {
		for _, p := range x.Problems {
			f.Problems = append(f.Problems, &wire.Problem{Object: p.Object, Reason: "on " + x.Host + ": " + p.Reason, Hint: p.Hint})
		}
	}
	return f
}

// start orders the source to begin.
func (m *migration) start(ctx context.Context) error {
	r := m.rec
	m.sent = true
	call, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	_, err := transport.Call[*wire.StartRequest, *wire.StartReply](call, m.link.nc, r.Source, "start", &wire.StartRequest{
		Protocol: wire.Version, Id: r.Id, Pid: r.Pid, Options: declaring(r.Options, m.resolutions), Destination: r.Destination, Stream: m.stream,
		Resolutions: m.resolutions, Entries: m.entries, Lane: m.lane, Codecs: m.codecs,
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, transport.ErrNoAgent) {
		m.sent = false
	}
	return err
}

// fail ends a migration that could not be started, and returns the error to
// show for it. The record and the agents are told although ctx may have ended.
func (m *migration) fail(ctx context.Context, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*abortCallTimeout)
	defer cancel()
	m.release(ctx)
	f := wire.ErrorOf(cause).Failure()
	var rec *wire.Record
	var err error
	if m.prepared || m.sent {
		rec, err = askAbort(ctx, m.link, m.rec.Id, f.Message, f)
	} else {
		rec, err = m.link.records.Change(ctx, m.rec.Id, func(r *wire.Record) error {
			if r.State == wire.State_STATE_ABORTING || wire.Terminal(r.State) {
				return nil
			}
			if err := r.Move(wire.State_STATE_ABORTED, wire.RoleCoordinator, coordinatorName, time.Now()); err != nil {
				return err
			}
			r.Reason, r.Error = f.Message, f.Proto()
			return nil
		})
	}
	if rec != nil {
		m.rec = rec
	}
	if err != nil && (rec == nil || !wire.Terminal(rec.State)) {
		return wire.Errorf(f.Code, "%w; the migration's record could not be brought up to date: %w", cause, err)
	}
	return cause
}
