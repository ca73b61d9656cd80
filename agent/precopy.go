package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"godwit/engine"
	"godwit/wire"
)

const (
	defaultDowntime = 100 * time.Millisecond
	defaultRounds   = 30
	defaultCopies   = 4 // times the memory that travels before the freeze

	// downtimeShare is the part of the downtime that memory may take: the freeze, the
	// look at the whole tree, the descriptors and the handoff take the others.
	downtimeShare = 3
	// leastPending is what is not worth another round, bytes.
	leastPending = 1 << 20
	// stuckRounds without progress mean that rounds do not converge.
	stuckRounds = 3
)

// wantsPrecopy says whether the memory of the tree travels while it runs.
func (s *source) wantsPrecopy(rec *wire.Record) bool {
	o := s.req.Options
	switch {
	case o.GetCopyMode() == wire.CopyMode_COPY_MODE_STOP:
		return false
	case o.GetCopyMode() == wire.CopyMode_COPY_MODE_AUTO && rec.MemoryBytes < wire.PrecopyWorth:
		return false
	case o.GetAttach() != nil, slices.ContainsFunc(o.GetProxied(), (*wire.Proxy).GetTerminal):
		s.report.CopyNote = "a tree that gets another terminal is not copied while it runs"
	default:
		return true
	}
	s.log.Info("the memory travels while the tree is frozen", "reason", s.report.CopyNote)
	return false
}

// precopy sends the content of files that travel and the memory of the running tree,
// again and again what was written meanwhile, and brings the record to Freezing.
func (s *source) precopy() error {
	ctx, stop := context.WithCancel(s.work)
	defer stop()
	go s.session.report(ctx, s.out, s.sink.pages.Load, s.memory)
	begun := time.Now()
	err := s.precopyFiles()
	if err == nil && s.pages {
		err = s.precopyMemory()
	}
	s.report.PrecopyUs = us(time.Since(begun))
	if err != nil {
		return s.because(err)
	}
	s.point("precopied")
	if _, err := s.ledger.move(s.work, wire.State_STATE_FREEZING, nil); err != nil {
		return s.because(err)
	}
	s.enter(wire.State_STATE_FREEZING, "pid", s.req.Pid, "rounds", s.report.Rounds, "precopied_bytes", s.report.PrecopyBytes, "file_bytes", s.report.EarlyFileBytes)
	return nil
}

// precopyMemory sends the memory.
func (s *source) precopyMemory() error {
	live, err := s.a.cfg.Engine.StartLive(s.work, int(s.req.Pid), s.a.dumpOptions(s.req.Options, s.req.Resolutions), s.sink)
	switch {
	case errors.Is(err, engine.ErrNotLive):
		s.report.CopyNote = err.Error()
		s.log.Warn("the memory travels while the tree is frozen", "reason", err)
		return nil
	case err != nil:
		return fmt.Errorf("begin to copy the tree of pid %d: %w", s.req.Pid, err)
	}
	s.live = live
	s.point("followed")
	switch s.req.Options.GetCopyMode() {
	case wire.CopyMode_COPY_MODE_POSTCOPY:
		s.postcopy = true
		// The destination gets ready meanwhile.
		return errors.Join(s.sink.flush(), s.live.Look())
	case wire.CopyMode_COPY_MODE_HYBRID:
		s.postcopy = true
	}
	return s.rounds(newConvergence(s.req.Options, s.memory))
}

// fileLooks bounds how often the files are looked at before the memory.
const fileLooks = 5

// precopyFiles sends the content of files, until little of it is written meanwhile.
func (s *source) precopyFiles() error {
	if s.early == nil {
		return nil
	}
	o := s.a.dumpOptions(s.req.Options, s.req.Resolutions)
	last := ^uint64(0)
	for range fileLooks {
		s.say("content of files travels")
		n, err := s.a.cfg.Engine.EarlyFiles(s.work, int(s.req.Pid), o, s.early, s.sink)
		if errors.Is(err, engine.ErrNotLive) {
			s.log.Warn("the content of files travels while the tree is frozen", "reason", err)
			return nil
		}
		if err := s.sentFiles(n, err); err != nil {
			return err
		}
		if n <= leastPending || n > last/4*3 {
			break // what is left is little, or does not get less
		}
		last = n
	}
	s.log.Debug("content of files sent", "files", s.early.Files(), "bytes", s.report.EarlyFileBytes)
	return nil
}

// sentFiles takes in that so much content of files was sent.
func (s *source) sentFiles(n uint64, err error) error {
	s.report.EarlyFileBytes += n
	if err == nil {
		err = s.sink.flush()
	}
	if err != nil {
		return fmt.Errorf("copy the files of the running tree of pid %d to %s: %w", s.req.Pid, s.req.Destination, err)
	}
	return nil
}

// filesAgain sends what was written to the files meanwhile: while memory travelled
// that may be much.
func (s *source) filesAgain() error {
	if s.early == nil {
		return nil
	}
	return s.sentFiles(s.early.Again(s.work, s.sink))
}

// rounds copies until what is left is worth a freeze.
func (s *source) rounds(c *convergence) error {
	brake := &brake{s: s}
	defer brake.release()
	for {
		if err := s.filesAgain(); err != nil {
			return err
		}
		start := time.Now()
		n, err := s.live.Round(s.work, s.sink)
		if err == nil {
			err = s.sink.flush()
		}
		if err != nil {
			return fmt.Errorf("copy the running tree of pid %d to %s: %w", s.req.Pid, s.req.Destination, err)
		}
		took := time.Since(start)
		pending, err := s.live.Pending()
		if err != nil {
			return fmt.Errorf("look at what the tree of pid %d wrote: %w", s.req.Pid, err)
		}
		next := c.round(n, took, pending)
		s.report.Rounds, s.report.PrecopyBytes = uint32(c.rounds), c.sent
		s.report.DirtyBytesPerSecond = uint64(c.dirty)
		s.say("round %d: %s sent, %s written meanwhile; frozen for about %s", c.rounds, mib(n), mib(pending), c.expected(pending).Round(time.Millisecond))
		s.log.Debug("round", "number", c.rounds, "bytes", n, "duration_ms", took.Milliseconds(), "pending_bytes", pending, "next", next)
		switch next {
		case copyFreeze:
			if c.why != "" {
				s.report.CopyNote = c.why
				s.log.Warn("the tree is frozen for longer than was asked for", "reason", c.why, "expected_ms", c.expected(pending).Milliseconds())
			}
			return nil
		case copyPostcopy:
			s.postcopy = true
			s.report.CopyNote = c.why
			s.log.Info("what is left travels when the tree runs at the destination", "reason", c.why)
			return nil
		case copyAbort:
			return wire.Errorf(wire.Code_CODE_ABORTED, "%s; the tree runs on (--on-no-converge abort)", c.why)
		case copyThrottle:
			brake.tighten()
		}
	}
}

// say tells people what goes on.
func (s *session) say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.remark.Store(&text)
}

func mib(n uint64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// copyStep is what follows a round.
type copyStep string

const (
	copyAgain    copyStep = "another round"
	copyThrottle copyStep = "slow down" // and another round
	copyFreeze   copyStep = "freeze"
	copyAbort    copyStep = "abort"
	copyPostcopy copyStep = "post-copy" // freeze, and leave the rest to be asked for
)

// convergence decides after each round what comes next; it does nothing by itself.
type convergence struct {
	downtime  time.Duration
	maxRounds int
	maxBytes  uint64
	policy    wire.NoConverge
	once      bool // one round, whatever it leaves (hybrid)

	rounds int
	sent   uint64
	rate   float64 // of the transfer, bytes per second
	dirty  float64 // at which memory was written in the last round, bytes per second
	last   uint64  // pending after the round before
	stuck  int     // rounds without progress, in a row
	why    string  // the freeze takes longer than was asked for, or the copy ends
	slowed int
}

func newConvergence(o *wire.MigrateOptions, memory uint64) *convergence {
	c := &convergence{
		downtime: time.Duration(o.GetMaxDowntimeMs()) * time.Millisecond, maxRounds: int(o.GetMaxRounds()), maxBytes: o.GetMaxCopyBytes(), policy: o.GetNoConverge(),
	}
	c.once = o.GetCopyMode() == wire.CopyMode_COPY_MODE_HYBRID
	if c.downtime == 0 {
		c.downtime = defaultDowntime
	}
	if c.maxRounds == 0 {
		c.maxRounds = defaultRounds
	}
	if c.maxBytes == 0 {
		c.maxBytes = max(defaultCopies*memory, 1<<30)
	}
	return c
}

// expected is how long the pending memory takes.
func (c *convergence) expected(pending uint64) time.Duration {
	if c.rate == 0 {
		return 0
	}
	return time.Duration(float64(pending) / c.rate * float64(time.Second))
}

// round notes a round that sent so many bytes, after which pending were written again.
func (c *convergence) round(sent uint64, took time.Duration, pending uint64) copyStep {
	c.rounds++
	c.sent += sent
	// A small round says more of latencies than of the rate.
	if sec := took.Seconds(); sec > 0 && (c.rate == 0 || sent >= 16<<20) {
		c.rate = float64(sent) / sec
	}
	if sec := took.Seconds(); sec > 0 {
		c.dirty = float64(pending) / sec
	}
	before := c.last
	c.last = pending
	if c.once {
		return copyFreeze
	}
	fits := c.expected(pending) <= c.downtime/downtimeShare
	shrinks := c.rounds == 1 || pending < before/10*9
	if c.stuck++; shrinks {
		c.stuck = 0
	}
	over := ""
	switch {
	case c.rounds >= c.maxRounds:
		over = fmt.Sprintf("after %d rounds", c.rounds)
	case c.sent+pending > c.maxBytes:
		over = fmt.Sprintf("after %s were sent", mib(c.sent))
	}
	switch {
	case pending <= leastPending || fits && (c.stuck > 0 || over != ""):
		c.why = ""
		return copyFreeze
	case fits:
		return copyAgain // as long as it shrinks a round costs little and shortens the freeze
	case over == "" && c.stuck < stuckRounds:
		return copyAgain
	case c.expected(pending) <= c.downtime/3*2: // more than it should, but it may do
		c.why = ""
		return copyFreeze
	}
	c.why = fmt.Sprintf("memory is written at %s/s and travels at %s/s: %s %s are left, which take %s", mib(uint64(c.dirty)), mib(uint64(c.rate)), over, mib(pending), c.expected(pending).Round(time.Millisecond))
	switch c.policy {
	case wire.NoConverge_NO_CONVERGE_ABORT:
		return copyAbort
	case wire.NoConverge_NO_CONVERGE_POSTCOPY:
		return copyPostcopy
	case wire.NoConverge_NO_CONVERGE_THROTTLE:
		if c.slowed < maxBrake && c.rounds < 2*c.maxRounds {
			c.slowed++
			c.stuck = 0
			return copyThrottle
		}
	}
	return copyFreeze
}

// brakePeriod is how often a tree that is slowed down is stopped, maxBrake how many
// times it is slowed down more.
const (
	brakePeriod = 50 * time.Millisecond
	maxBrake    = 9
)

// brake slows a tree down: it stands still for a part of each period, a tenth more
// each time that it is tightened.
type brake struct {
	s     *source
	share int // tenths
	stop  context.CancelFunc
	done  chan struct{}
}

// tighten has the tree stand still for longer.
func (b *brake) tighten() {
	b.release()
	b.share++
	ctx, cancel := context.WithCancel(b.s.work)
	b.stop, b.done = cancel, make(chan struct{})
	b.s.log.Info("the tree is slowed down: it writes faster than its memory travels", "percent", b.share*10)
	go b.run(ctx, brakePeriod*time.Duration(b.share)/10)
}

func (b *brake) run(ctx context.Context, still time.Duration) {
	defer close(b.done)
	for {
		tree, err := b.s.a.cfg.Engine.Freeze(ctx, int(b.s.req.Pid), engine.DumpOptions{Timeout: b.s.a.cfg.Timeouts.Freeze})
		if err == nil {
			time.Sleep(still)
			err = tree.Thaw()
		}
		if err != nil {
			if ctx.Err() == nil {
				b.s.log.Warn("the tree is not slowed down any more", "error", err)
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(brakePeriod - still):
		}
	}
}

// release lets the tree run as fast as it can.
func (b *brake) release() {
	if b.stop == nil {
		return
	}
	b.stop()
	<-b.done
	b.stop = nil
}
