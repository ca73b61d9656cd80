package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/wire"
)

// ReceiverConfig describes the receiving end of a stream.
type ReceiverConfig struct {
	// Data are the connections for chunks; lane k uses Data[k mod len(Data)].
	// Control is for everything else and must not be one of them.
	Data    []*nats.Conn
	Control *nats.Conn
	// Direct are connections to the sender's own server, if there is one; chunks
	// come over these or over Data.
	Direct []*nats.Conn
	// Subject of the stream (StreamSubject), and its ID, which both ends know.
	Subject string
	ID      string
	// Peer names the other end in errors, such as "agent alpha".
	Peer string

	Window int // bytes received and not released; 0 means 8 MiB
	Lanes  int // most that it takes; 0 means 2

	IdleTimeout time.Duration // without a word of the sender; 0 means 15 s
	OpenTimeout time.Duration // until the sender opens the stream; 0 means 30 s
	Logger      hclog.Logger
}

// maxCorrupt is how many corrupt frames a receiver asks for again. One is an
// accident that the resend heals; more means that something on the way damages
// data.
const maxCorrupt = 64

// Receiver is the receiving end of a stream. Recv is for one goroutine at a
// time; the other methods may be called from any.
type Receiver struct {
	stream   uint64
	session  uint64
	subject  string
	peer     string
	log      hclog.Logger
	t        timing
	data     []link
	direct   []link
	ctl      link
	window   int64
	maxLanes int

	wg    sync.WaitGroup
	stop  chan struct{}
	subs  []func()
	kick  chan struct{} // an acknowledgement is due
	ready chan struct{} // Recv should look again
	bye   chan struct{} // closed when the sender knows everything

	mu      sync.Mutex
	err     error
	down    bool
	begun   time.Time
	heard   time.Time
	sender  uint64 // session of the sender; 0 until it opened the stream
	epoch   uint32
	nak     bool // something of this epoch is lost; said in every ack until the next epoch
	lanes   []laneQueue
	deliver uint64 // next chunk for Recv
	applied uint64 // first chunk that was not released
	handed  []handed
	held    int64 // cost of what was received and not released
	total   *wire.FrameTotal
	endSeq  uint64
	eof     bool // Recv has verified the end
	left    bool // bye is closed
	tally   *tally
	due     int64     // cost received or released since the last ack
	broken  time.Time // since when a direct connection is down; zero: none is
	cut     bool      // for longer than a moment

	meter meter
	stats Stats
}

type laneQueue struct {
	next   uint64 // first chunk that has not arrived
	chunks []chunk
}

type chunk struct {
	seq     uint64
	payload []byte
	crc     uint32
	coded   *wire.CodedHeader // payload is what its codec made of the chunk; nil: it is the chunk
	cost    int64
}

// handed is a chunk that Recv gave out.
type handed struct {
	cost int64
	buf  []byte // to be used again; may be nil
}

// NewReceiver starts to listen for a stream; from when it returns a sender may
// open it.
func NewReceiver(ctx context.Context, cfg ReceiverConfig) (*Receiver, error) {
	if len(cfg.Data) == 0 || cfg.Control == nil {
		return nil, errors.New("listen for a stream: data and control connections are required")
	}
	r, err := newReceiver(cfg, natsLinks(cfg.Direct), natsLinks(cfg.Data), newNATSLink(cfg.Control), timings(cfg.IdleTimeout, cfg.OpenTimeout))
	if err != nil {
		return nil, err
	}
	// The servers must know the subscriptions before the sender is told.
	for _, nc := range slices.Concat([]*nats.Conn{cfg.Control}, cfg.Data, cfg.Direct) {
		if err := flush(ctx, nc); err != nil {
			r.Abort(err)
			return nil, fmt.Errorf("listen for stream %s: %w", cfg.ID, err)
		}
	}
	return r, nil
}

func newReceiver(cfg ReceiverConfig, direct, data []link, ctl link, t timing) (*Receiver, error) {
	r := &Receiver{
		stream:   wire.StreamKey(cfg.ID),
		session:  newSession(),
		subject:  cfg.Subject,
		peer:     cfg.Peer,
		log:      logger(cfg.Logger).Named("receiver").With("stream", cfg.ID),
		t:        t,
		data:     data,
		direct:   direct,
		ctl:      ctl,
		window:   int64(cfg.Window),
		maxLanes: cfg.Lanes,
		stop:     make(chan struct{}),
		kick:     make(chan struct{}, 1),
		ready:    make(chan struct{}, 1),
		bye:      make(chan struct{}),
		begun:    time.Now(),
		tally:    newTally(),
	}
	if r.peer == "" {
		r.peer = "the sender"
	}
	if r.window <= 0 {
		r.window = DefaultWindow
	}
	r.window = max(r.window, minWindow)
	if r.maxLanes <= 0 {
		r.maxLanes = DefaultLanes
	}
	r.maxLanes = min(r.maxLanes, wire.MaxLanes)
	listen := func(l link, subject string) error {
		unsub, err := l.subscribe(subject, r.onFrame)
		if err == nil {
			r.subs = append(r.subs, unsub)
		}
		return err
	}
	err := listen(ctl, r.subject+".ctl")
	for _, ls := range [][]link{data, direct} {
		for k := 0; k < r.maxLanes && len(ls) > 0 && err == nil; k++ {
			err = listen(ls[k%len(ls)], laneSubject(r.subject, k))
		}
	}
	if err != nil {
		r.teardown()
		return nil, fmt.Errorf("listen for stream %s: %w", cfg.ID, err)
	}
	r.wg.Go(r.run)
	return r, nil
}

// signal makes a receive from c possible without waiting.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// onFrame takes what comes from the sender, on any of the connections. It
// never waits, so subscriptions do not fill up.
func (r *Receiver) onFrame(b []byte) {
	h, payload, err := wire.ParseFrame(b)
	if err != nil {
		if errors.Is(err, wire.ErrFrameVersion) {
			r.fail(fmt.Errorf("%s: %w", r.peer, err), true)
			return
		}
		r.mu.Lock()
		r.stats.Corrupt++
		n := r.stats.Corrupt
		if r.sender != 0 {
			r.nak = true
		}
		r.mu.Unlock()
		if n > maxCorrupt {
			r.fail(fmt.Errorf("%s: %d frames arrived damaged: %w", r.peer, n, err), true)
			return
		}
		r.log.Warn("frame dropped, asking for it again", "error", err)
		signal(r.kick)
		return
	}
	if h.Stream != r.stream {
		r.fail(fmt.Errorf("%s: %w", r.peer, wire.ErrForeign), true)
		return
	}
	if err := r.take(h, payload); err != nil {
		r.fail(fmt.Errorf("%s: %w", r.peer, err), !errors.Is(err, ErrPeerAborted))
	}
}

// take applies one sound frame of this stream.
func (r *Receiver) take(h wire.FrameHeader, payload []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || r.down {
		return nil
	}
	now := time.Now()
	if r.sender == 0 {
		if h.Type == wire.FrameAbort {
			return r.aborted(payload)
		}
		if h.Type != wire.FramePing {
			r.stats.Stale++
			return nil
		}
		r.sender = h.Session
		r.lanes = make([]laneQueue, min(int(h.Lanes), r.maxLanes))
		for k := range r.lanes {
			r.lanes[k].next = uint64(k)
		}
		r.log.Debug("stream opened", "lanes", len(r.lanes), "window", r.window)
	}
	if h.Session != r.sender {
		r.stats.Stale++
		if h.Type == wire.FramePing {
			signal(r.kick) // the ack names the one that it belongs to
		}
		return nil
	}
	r.heard = now
	if h.Type == wire.FrameBye {
		if r.eof && !r.left {
			r.left = true
			close(r.bye)
		}
		return nil
	}
	if h.Type == wire.FrameAbort {
		return r.aborted(payload)
	}
	if h.Epoch > r.epoch {
		r.epoch, r.nak = h.Epoch, false
	}
	switch h.Type {
	case wire.FramePing:
		signal(r.kick)
		return nil
	case wire.FrameData, wire.FrameCompressed, wire.FrameEnd, wire.FrameProbe:
	default:
		return fmt.Errorf("%w: a frame of type %s", ErrProtocol, h.Type)
	}
	if int(h.Lanes) != len(r.lanes) {
		return fmt.Errorf("%w: %d lanes where %d were agreed", ErrProtocol, h.Lanes, len(r.lanes))
	}
	r.stats.WireBytes += uint64(wire.FrameHeaderLen + len(payload))
	if h.Epoch < r.epoch {
		r.stats.Stale++
		return nil
	}
	q := &r.lanes[h.Lane]
	switch {
	case h.Type == wire.FrameProbe:
		if h.Seq > q.next {
			r.nak = true
		}
		signal(r.kick)
		return nil
	case h.Seq > q.next:
		// Only a loss lets a lane jump.
		if !r.nak {
			r.nak = true
			signal(r.kick)
		}
		return nil
	case h.Seq < q.next:
		r.stats.Duplicates++
		r.stats.ResentBytes += uint64(wire.FrameHeaderLen + len(payload))
		return nil
	}
	c := cost(len(payload))
	if h.Type == wire.FrameEnd {
		if r.total != nil {
			return fmt.Errorf("%w: a second end", ErrProtocol)
		}
		t, err := wire.ParseFrameTotal(payload)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		r.total, r.endSeq = &t, h.Seq
	} else {
		if r.total != nil && h.Seq > r.endSeq {
			return fmt.Errorf("%w: chunk %d after the end at %d", ErrProtocol, h.Seq, r.endSeq)
		}
		if r.held+c > r.window {
			return fmt.Errorf("%w: chunk %d would make %d bytes of at most %d", ErrWindow, h.Seq, r.held+c, r.window)
		}
		ch := chunk{seq: h.Seq, payload: payload, crc: h.BodyCRC, cost: c}
		n := len(payload)
		if h.Type == wire.FrameCompressed {
			coded, body, err := wire.ParseCoded(payload, MaxChunkSize)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrProtocol, err)
			}
			ch.payload, ch.crc, ch.coded, n = body, coded.CRC, &coded, int(coded.Length)
		}
		r.held += c
		r.meter.add(n, now)
		q.chunks = append(q.chunks, ch)
	}
	q.next += uint64(len(r.lanes))
	r.pay(c)
	if h.Seq == r.deliver {
		signal(r.ready)
	}
	return nil
}

func (r *Receiver) aborted(payload []byte) error {
	e, err := parseAbort(payload)
	if err != nil {
		return fmt.Errorf("%w without a reason that can be read: %w", ErrPeerAborted, err)
	}
	return fmt.Errorf("%w: %w", ErrPeerAborted, e.Err())
}

// pay counts towards the next acknowledgement: one for each eighth of the
// window that passes, and each byte is counted when it comes and when it goes.
//
// Preconditions: mu is held.
func (r *Receiver) pay(c int64) {
	r.due += c
	if r.due >= r.window/4 {
		signal(r.kick)
	}
}

// Recv returns the next chunk. The bytes belong to the caller until it calls
// Release for it. After the last chunk, once count, bytes and digest of the
// whole stream have been verified, it returns io.EOF.
func (r *Receiver) Recv(ctx context.Context) ([]byte, error) {
	for {
		r.mu.Lock()
		if r.err != nil {
			defer r.mu.Unlock()
			return nil, r.err
		}
		if r.eof {
			r.mu.Unlock()
			return nil, io.EOF
		}
		if len(r.lanes) > 0 {
			q := &r.lanes[r.deliver%uint64(len(r.lanes))]
			if len(q.chunks) > 0 {
				c := q.chunks[0]
				q.chunks[0] = chunk{}
				q.chunks = q.chunks[1:]
				r.deliver++
				if c.coded != nil {
					r.mu.Unlock()
					return r.open(c)
				}
				r.handed = append(r.handed, handed{cost: c.cost})
				r.tally.add(len(c.payload), c.crc)
				r.mu.Unlock()
				return c.payload, nil
			}
			if r.total != nil && r.deliver == r.endSeq {
				if got := r.tally.total(); got != *r.total {
					want := *r.total
					r.mu.Unlock()
					err := fmt.Errorf("%s: %w: %d chunks and %d bytes arrived, %d and %d were sent", r.peer, ErrTotal, got.Chunks, got.Bytes, want.Chunks, want.Bytes)
					if got.Chunks == want.Chunks && got.Bytes == want.Bytes {
						err = fmt.Errorf("%s: %w: the digests differ", r.peer, ErrTotal)
					}
					r.fail(err, true)
					return nil, err
				}
				r.eof = true
				r.finish()
				r.mu.Unlock()
				return nil, io.EOF
			}
			if r.due > 0 {
				signal(r.kick) // the sender may be waiting for what is not yet a whole eighth
			}
		}
		r.mu.Unlock()
		select {
		case <-r.ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for data of %s: %w", r.peer, ctx.Err())
		}
	}
}

// open gives out a compressed chunk.
func (r *Receiver) open(c chunk) ([]byte, error) {
	buf := getFrame(int(c.coded.Length))
	if err := expand(*c.coded, buf, c.payload); err != nil {
		err = fmt.Errorf("%s: chunk %d: %w", r.peer, c.seq, err)
		r.fail(err, true)
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.handed = append(r.handed, handed{cost: c.cost, buf: buf})
	r.tally.add(len(buf), c.crc)
	return buf, nil
}

// Release says that the oldest chunk that Recv returned and that was not
// released yet has been applied: its share of the window is free again, and
// the sender may count it as done.
func (r *Receiver) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.handed) == 0 {
		panic("transport: Release without a chunk of Recv")
	}
	c := r.handed[0]
	r.handed[0] = handed{}
	r.handed = r.handed[1:]
	r.held -= c.cost
	r.applied++
	r.pay(c.cost)
	if c.buf != nil {
		putFrame(c.buf)
	}
	r.finish()
}

// finish makes the end applied once all before it is.
//
// Preconditions: mu is held.
func (r *Receiver) finish() {
	if r.eof && r.applied == r.endSeq {
		r.applied++
		signal(r.kick)
	}
}

// run sends acknowledgements and looks for what did not happen.
func (r *Receiver) run() {
	tick := time.NewTicker(r.t.tick)
	defer tick.Stop()
	var acked time.Time
	last := time.Now()
	lives := r.lives()
	for {
		beat := false
		select {
		case <-r.kick:
		case <-tick.C:
			beat = true
		case <-r.stop:
			return
		}
		now := time.Now()
		if beat {
			if l := r.lives(); l != lives {
				// What was sent to this end in between is lost.
				lives = l
				r.mu.Lock()
				r.nak = r.sender != 0
				r.mu.Unlock()
				beat = false
			}
			if r.look(now) {
				beat = false // at once
			}
			r.watch(now, r.t.stalled(last, now))
			last = now
		}
		if beat && now.Sub(acked) < r.t.heartbeat {
			continue
		}
		acked = now
		r.acknowledge()
	}
}

// lives is the sum over all connections.
func (r *Receiver) lives() uint64 {
	return r.ctl.lives() + livesOf(r.data) + livesOf(r.direct)
}

// look sees whether the direct connections stand; true means that the sender is to
// be told. One that comes back within a moment is as good as before.
func (r *Receiver) look(now time.Time) bool {
	down := slices.ContainsFunc(r.direct, func(l link) bool { return !l.up() })
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.cut
	switch {
	case !down:
		r.broken, r.cut = time.Time{}, false
	case r.broken.IsZero():
		r.broken = now
	default:
		r.cut = now.Sub(r.broken) >= r.t.probe
	}
	return r.cut != was
}

// watch fails the stream if the sender has not been heard for too long, not
// counting the time that this process was stalled itself.
func (r *Receiver) watch(now time.Time, stalled time.Duration) {
	r.mu.Lock()
	r.heard, r.begun = r.heard.Add(stalled), r.begun.Add(stalled)
	r.meter.sample(now)
	var err error
	switch silent := now.Sub(r.heard); {
	case r.err != nil || r.left:
	case r.sender == 0:
		if now.Sub(r.begun) > r.t.open {
			err = fmt.Errorf("%s: %w: it did not open the stream within %s", r.peer, ErrPeerSilent, r.t.open)
		}
	case silent > r.t.idle && r.eof && r.applied > r.endSeq:
		// Everything is done; only the sender's last word is missing.
		r.left = true
		close(r.bye)
	case silent > r.t.idle:
		err = fmt.Errorf("%s: %w for %s", r.peer, ErrPeerSilent, silent.Round(100*time.Millisecond))
		if !r.ctl.up() {
			err = fmt.Errorf("%w for %s: %s cannot be heard", ErrDisconnected, silent.Round(100*time.Millisecond), r.peer)
		}
	}
	r.mu.Unlock()
	if err != nil {
		r.fail(err, true)
	}
}

// acknowledge tells the sender where this end is, or that it failed.
func (r *Receiver) acknowledge() {
	r.mu.Lock()
	if r.err != nil {
		r.mu.Unlock()
		return
	}
	h := wire.FrameHeader{Type: wire.FrameAck, Lanes: uint8(max(len(r.lanes), 1)), Stream: r.stream, Session: r.session, Epoch: r.epoch, Seq: r.applied}
	a := wire.AckBody{Peer: r.sender, Window: uint64(r.window), Resend: r.nak, Done: r.eof && r.applied > r.endSeq, Cut: r.cut}
	direct := len(r.direct) > 0 && r.broken.IsZero()
	for _, q := range r.lanes {
		a.Next = append(a.Next, q.next)
	}
	r.due = 0
	r.mu.Unlock()
	frame := h.Frame(a.Append(nil))
	if direct {
		_ = r.direct[0].send(r.subject+".ack", frame)
	}
	_ = r.ctl.send(r.subject+".ack", frame) // the next one says the same and more
}

// Abort ends the stream with an error, which the sender gets too, and tears it
// down. After Close it does nothing.
func (r *Receiver) Abort(err error) {
	if err == nil {
		err = ErrClosed
	}
	r.fail(err, true)
	r.teardown()
}

func (r *Receiver) fail(err error, tell bool) {
	r.mu.Lock()
	if r.err != nil || r.down {
		r.mu.Unlock()
		return
	}
	r.err = err
	h := wire.FrameHeader{Type: wire.FrameAbort, Lanes: uint8(max(len(r.lanes), 1)), Stream: r.stream, Session: r.session, Epoch: r.epoch, Seq: r.sender}
	// Nobody takes what is still queued.
	for k := range r.lanes {
		r.lanes[k].chunks = nil
	}
	r.mu.Unlock()
	signal(r.ready)
	r.log.Debug("stream failed", "error", err)
	if tell {
		_ = r.ctl.send(r.subject+".ack", h.Frame(abortBody(err)))
	}
}

// Close leaves the stream. After io.EOF and the last Release it first waits
// until the sender knows that everything was applied, has fallen silent for
// the idle timeout, or ctx ends. Before that it aborts the stream.
func (r *Receiver) Close(ctx context.Context) error {
	r.mu.Lock()
	whole := r.eof && r.applied > r.endSeq && r.err == nil && !r.down
	err := r.err
	r.mu.Unlock()
	if !whole {
		r.Abort(ErrClosed)
		if errors.Is(err, ErrClosed) {
			return nil
		}
		return err
	}
	select {
	case <-r.bye:
	case <-ctx.Done():
		err = fmt.Errorf("wait for the last word of %s: %w", r.peer, ctx.Err())
	}
	r.teardown()
	return err
}

func (r *Receiver) teardown() {
	r.mu.Lock()
	if r.down {
		r.mu.Unlock()
		return
	}
	r.down = true
	if r.err == nil && !r.eof {
		r.err = ErrClosed
	}
	close(r.stop)
	r.mu.Unlock()
	signal(r.ready)
	for _, unsub := range r.subs {
		unsub()
	}
	r.wg.Wait()
	for _, l := range slices.Concat(r.data, r.direct) {
		l.close()
	}
	r.ctl.close()
}

// Stats returns the figures so far.
func (r *Receiver) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	st := r.stats
	st.Chunks, st.Bytes = r.tally.chunks, r.tally.bytes
	st.First, st.Last = r.meter.first, r.meter.last
	st.BytesPerSecond = r.meter.perSecond(time.Now())
	return st
}
