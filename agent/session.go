package agent

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"godwit/transport"
	"godwit/wire"
)

// session is what the two sides of a migration have in common.
//
// It has two lifetimes. work ends when the migration must not go on towards the
// commit: aborted, timed out, the agent told to stop. Whatever decides who runs
// the tree afterwards is under no context at all: it goes on until the record
// has been read and the tree runs in one place, however long the bus is away.
type session struct {
	a    *Agent
	id   string
	role wire.Role
	peer string // the other host
	log  hclog.Logger

	ledger *ledger
	feed   *feed
	work   context.Context
	cancel context.CancelCauseFunc
	unfeed context.CancelFunc

	// ready is closed once the request that made the session is answered by
	// refusal; a duplicate of the request gets the same answer.
	ready   chan struct{}
	refusal error

	// committed says that the record was seen at or past the commit.
	committed atomic.Bool
	state     atomic.Int32           // wire.State for progress
	remark    atomic.Pointer[string] // of progress, for people; nil: none
	// trouble is set before done is closed if the tree runs nowhere now.
	trouble error
	// noted says that the journal has an entry.
	noted bool
	done  chan struct{}
}

func (a *Agent) newSession(id string, role wire.Role, peer string) *session {
	s := &session{
		a: a, id: id, role: role, peer: peer,
		log:   a.log.Named(role.String()).With("migration", id, "peer", peer),
		ready: make(chan struct{}),
		done:  make(chan struct{}),
	}
	s.ledger = &ledger{records: a.cfg.Records, id: id, host: a.cfg.Host, role: role, log: s.log}
	s.work, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// watch follows the record from now on: a migration that somebody aborts ends
// the work here.
func (s *session) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	s.unfeed = cancel
	s.feed = s.ledger.follow(ctx, func(rec *wire.Record) {
		if err := ended(rec); err != nil {
			s.cancel(err)
		}
	})
}

// answer lets the request that made the session, and its duplicates, return err.
func (s *session) answer(err error) {
	s.refusal = err
	close(s.ready)
}

// await waits for the answer to the request that made the session.
func (s *session) await(ctx context.Context) error {
	select {
	case <-s.ready:
		return s.refusal
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// enter logs the beginning of a phase.
func (s *session) enter(st wire.State, kv ...any) {
	s.state.Store(int32(st))
	s.log.Info(st.Word(), kv...)
}

func (s *session) phase() wire.State { return wire.State(s.state.Load()) }

// abort asks the session to end with the tree running at the source, and waits
// until it has. It is an error if the migration is committed.
func (s *session) abort(ctx context.Context, reason string) error {
	s.cancel(&wire.Failure{Code: wire.Code_CODE_ABORTED, Message: reason})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if s.committed.Load() {
			return wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is committed and can no longer be aborted", s.id)
		}
		select {
		case <-s.done:
			if s.committed.Load() {
				continue
			}
			return s.trouble
		case <-ctx.Done():
			return wire.Errorf(wire.Code_CODE_UNAVAILABLE, "migration %s is being aborted, which takes longer than the caller waits", s.id)
		case <-tick.C:
		}
	}
}

// blame is the change of a record that says why its migration ends. Who came
// first had the cause, what follows are consequences.
func (s *session) blame(cause error) func(*wire.Record) {
	f := failure(cause, s.a.cfg.Host, s.phase())
	return func(r *wire.Record) {
		if r.Reason == "" {
			r.Reason = f.Message
		}
		if r.Error == nil {
			r.Error = f.Proto()
		}
	}
}

// brief is a context for what only informs: the outcome is the same without
// it, so it must not hold up a stopping agent.
func (s *session) brief() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.a.informing, 30*time.Second)
}

// forever is the context of what decides who runs the tree.
func forever() context.Context { return context.Background() }

// meter is what a stream has moved so far.
type meter interface {
	Stats() transport.Stats
}

// report publishes progress until ctx ends.
func (s *session) report(ctx context.Context, m meter, pages func() uint64, total uint64) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		st := m.Stats()
		p := &wire.Progress{
			Id: s.id, Host: s.a.cfg.Host, State: s.phase(), BytesDone: st.Bytes, BytesTotal: max(total, st.Bytes),
			PagesDone: pages(), UnixMs: time.Now().UnixMilli(),
		}
		if text := s.remark.Load(); text != nil {
			p.Message = *text
		}
		if st.Bytes >= 1<<20 { // before that a rate means nothing
			p.BytesPerSecond = st.BytesPerSecond
		}
		s.a.cfg.Progress(p)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

const progressEvery = 150 * time.Millisecond

// transferred fills in what both sides report of a stream.
func transferred(r *wire.Report, st transport.Stats, pages uint64) {
	r.Bytes, r.ResentBytes, r.Pages, r.StreamBytes = st.WireBytes, st.ResentBytes, pages, st.Bytes
	if d := st.Last.Sub(st.First); d > 0 {
		r.TransferUs = us(d)
		r.BytesPerSecond = uint64(float64(st.Bytes) / d.Seconds())
	}
	r.PeakRssBytes = peakRSS()
}

// severity is how an end without a handoff is logged: what somebody asked for
// is no failure.
func severity(c wire.Code) hclog.Level {
	if c == wire.Code_CODE_ABORTED {
		return hclog.Warn
	}
	return hclog.Error
}

func us(d time.Duration) uint64 { return uint64(max(d.Microseconds(), 0)) }

// checkProtocol refuses a request of another protocol version.
func checkProtocol(v uint32) error {
	if v != wire.Version {
		return wire.Errorf(wire.Code_CODE_VERSION, "the request is of protocol version %d, this agent speaks %d: bring both to the same release", v, wire.Version)
	}
	return nil
}

func invalid(format string, args ...any) error {
	return wire.Errorf(wire.Code_CODE_INVALID, format, args...)
}

// belongs checks that a record is the one that a request speaks of.
func belongs(rec *wire.Record, source, destination string) error {
	if rec.Source != source || rec.Destination != destination {
		return invalid("the record of migration %s is about %s to %s, the request about %s to %s",
			rec.Id, rec.Source, rec.Destination, source, destination)
	}
	if rec.Protocol != 0 && rec.Protocol != wire.Version {
		return checkProtocol(rec.Protocol)
	}
	switch rec.State {
	case wire.State_STATE_REQUESTED, wire.State_STATE_PREFLIGHT, wire.State_STATE_PRE_COPYING:
		return nil
	}
	if err := ended(rec); err != nil {
		return err
	}
	return wire.Errorf(wire.Code_CODE_CONFLICT, "migration %s is already %s", rec.Id, rec.State.Word())
}

// pledge is something that is being done meanwhile; nil: nothing.
type pledge struct {
	done chan struct{}
	err  error
}

// promise begins to do something.
func promise(do func() error) *pledge {
	p := &pledge{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = do()
	}()
	return p
}

// wait waits until it is done, and says how it went.
func (p *pledge) wait() error {
	if p == nil {
		return nil
	}
	<-p.done
	return p.err
}
