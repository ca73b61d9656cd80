package transport

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"godwit/wire"
)

// SenderConfig describes the sending end of a stream.
type SenderConfig struct {
	// Data are the connections for chunks; lane k uses Data[k mod len(Data)].
	// Control is for everything else and must not be one of them.
	Data    []*nats.Conn
	Control *nats.Conn
	// Direct, if there are any, are used for chunks in place of Data until they
	// carry nothing any more. They lead to the receiver's Direct.
	Direct []*nats.Conn
	// OnlyDirect ends the stream if they do, in place of going on over Data.
	OnlyDirect bool
	// Subject of the stream (StreamSubject), and its ID, which both ends know.
	Subject string
	ID      string
	// Peer names the other end in errors, such as "agent beta".
	Peer string

	ChunkSize int    // largest payload of a chunk, bytes; 0 means 512 KiB, the most; less if the bus allows less
	Window    int    // bytes under way; 0 means 8 MiB; the smaller of both ends' counts
	Lanes     int    // 0 means 2; the smaller of both ends' counts
	Rate      uint64 // cap, bytes per second on the wire; 0: none
	// Compression of chunks; the zero value is none.
	Compression Compression

	IdleTimeout time.Duration // without a word of the receiver; 0 means 15 s
	OpenTimeout time.Duration // until the receiver answers; 0 means 30 s
	Logger      hclog.Logger
}

// Sender is the sending end of a stream. Its methods may be called from any
// goroutine; the order of the chunks is that of the calls of Send.
type Sender struct {
	stream  uint64
	session uint64
	subject string
	peer    string
	log     hclog.Logger
	t       timing
	ctl     link
	limit   limiter
	chunk   int
	only    bool // data is all that may be used

	wg   sync.WaitGroup
	stop chan struct{} // closed: goroutines end
	subs []func()

	mu      sync.Mutex
	changed chan struct{} // closed and replaced whenever waiting callers should look again
	err     error         // first failure; nothing is sent after it
	down    bool          // torn down

	data   []link    // in use
	spare  []link    // for when they carry nothing any more
	idling []link    // carry nothing any more
	cut    time.Time // since when the receiver says so; zero: it does not
	adapt  *adapter

	lanes    int // 0 until the receiver has answered
	window   int64
	used     int64 // bytes of the window in use, reservations included
	flying   int64 // the same, counted as chunks are in memory even when they are compressed; at most twice the window
	peerSess uint64
	heard    time.Time

	entries []*entry // base … next-1
	base    uint64   // first chunk that was not applied
	next    uint64   // number of the next chunk
	ended   bool     // the end has been numbered
	done    bool     // the receiver applied everything
	tally   *tally

	epoch     uint32
	laneSend  []uint64 // next chunk to send, per lane
	laneAcked []uint64 // first chunk that the receiver lacks, per lane
	probe     []bool
	wake      []chan struct{}

	progress time.Time // last time that a chunk was published or acknowledged
	sending  int       // lanes that are publishing, or waiting for the bandwidth cap
	probed   time.Time
	blindN   int
	livesSum uint64

	meter meter
	stats Stats
}

// entry is one chunk between Send and its being applied.
type entry struct {
	seq    uint64
	typ    wire.FrameType
	frame  []byte // header and payload; nil once the receiver has it
	n      int    // bytes of payload
	crc    uint32
	cost   int64
	memory int        // bytes of the chunk
	codec  wire.Codec // the choice when it was first sent
	coded  bool       // codec has been chosen
	busy   bool       // a lane is publishing frame, or compressing it
	acked  bool
	sent   bool
}

// Buffer is a chunk that is being filled; see Sender.Buffer.
type Buffer struct {
	s     *Sender
	frame []byte
	n     int
	cost  int64
}

// Bytes is the payload, to be filled in place.
func (b *Buffer) Bytes() []byte { return b.frame[wire.FrameHeaderLen : wire.FrameHeaderLen+b.n] }

// Trim shortens the payload to its first n bytes.
func (b *Buffer) Trim(n int) {
	if n < 0 || n > b.n {
		panic(fmt.Sprintf("transport: trim a buffer of %d bytes to %d", b.n, n))
	}
	b.n = n
}

// NewSender opens a stream: it returns once the receiver has answered. Errors
// wrap ErrPeerSilent if none did, ErrBusy if it belongs to another sender.
func NewSender(ctx context.Context, cfg SenderConfig) (*Sender, error) {
	if len(cfg.Data) == 0 || cfg.Control == nil {
		return nil, errors.New("open a stream: data and control connections are required")
	}
	return newSender(ctx, cfg, natsLinks(cfg.Direct), natsLinks(cfg.Data), newNATSLink(cfg.Control), timings(cfg.IdleTimeout, cfg.OpenTimeout))
}

func newSender(ctx context.Context, cfg SenderConfig, direct, data []link, ctl link, t timing) (*Sender, error) {
	var spare []link
	if len(direct) > 0 {
		data, spare = direct, data
	}
	s := &Sender{
		stream:  wire.StreamKey(cfg.ID),
		session: newSession(),
		subject: cfg.Subject,
		peer:    cfg.Peer,
		log:     logger(cfg.Logger).Named("sender").With("stream", cfg.ID),
		t:       t,
		data:    data,
		spare:   spare,
		only:    cfg.OnlyDirect,
		ctl:     ctl,
		adapt:   newAdapter(cfg.Compression),
		chunk:   cfg.ChunkSize,
		stop:    make(chan struct{}),
		changed: make(chan struct{}),
		window:  int64(cfg.Window),
		tally:   newTally(),
	}
	s.limit.rate = float64(cfg.Rate)
	if s.peer == "" {
		s.peer = "the receiver"
	}
	if s.window <= 0 {
		s.window = DefaultWindow
	}
	s.window = max(s.window, minWindow)
	if s.chunk <= 0 || s.chunk > MaxChunkSize {
		s.chunk = DefaultChunkSize
	}
	for _, l := range slices.Concat(spare, data) {
		s.chunk = min(s.chunk, l.maxPayload()-wire.FrameHeaderLen)
	}
	if s.chunk < 1<<10 {
		s.closeLinks()
		return nil, fmt.Errorf("open stream %s: chunks of %d bytes are too small, the bus must allow messages of at least %d", cfg.ID, s.chunk, 1<<10+wire.FrameHeaderLen)
	}
	lanes := cfg.Lanes
	if lanes <= 0 {
		lanes = DefaultLanes
	}
	lanes = min(lanes, wire.MaxLanes)

	acks := []link{ctl}
	if len(spare) > 0 {
		acks = append(acks, data[0]) // the shorter way
	}
	for _, l := range acks {
		unsub, err := l.subscribe(s.subject+".ack", s.onFrame)
		if err != nil {
			s.teardown()
			return nil, fmt.Errorf("open stream %s: %w", cfg.ID, err)
		}
		s.subs = append(s.subs, unsub)
	}
	if err := s.open(ctx, lanes); err != nil {
		s.fail(err, !errors.Is(err, ErrBusy))
		s.teardown()
		return nil, fmt.Errorf("open stream %s: %w", cfg.ID, err)
	}
	for k := range s.lanes {
		s.wg.Go(func() { s.runLane(k) })
	}
	s.wg.Go(s.runTicker)
	return s, nil
}

func newSession() uint64 {
	var b [8]byte
	for {
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		if v := binary.LittleEndian.Uint64(b[:]); v != 0 {
			return v
		}
	}
}

// open pings until the receiver answers.
func (s *Sender) open(ctx context.Context, lanes int) error {
	start := time.Now()
	var sendErr error
	for wait := 20 * time.Millisecond; ; wait = min(wait*2, s.t.heartbeat) {
		s.mu.Lock()
		changed, opened, err := s.changed, s.lanes != 0, s.err
		s.mu.Unlock()
		switch {
		case err != nil:
			return err
		case opened:
			return nil
		case time.Since(start) > s.t.open:
			if sendErr != nil {
				return fmt.Errorf("%w: %w", ErrDisconnected, sendErr)
			}
			return fmt.Errorf("%s: %w: it did not answer for %s", s.peer, ErrPeerSilent, s.t.open)
		}
		s.mu.Lock()
		h := s.header(wire.FramePing)
		s.mu.Unlock()
		h.Lanes = uint8(lanes)
		sendErr = s.ctl.send(s.subject+".ctl", h.Frame(nil))
		select {
		case <-changed:
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// header is a header of this sender; the caller adds what belongs to the type.
//
// Preconditions: mu is held.
func (s *Sender) header(t wire.FrameType) wire.FrameHeader {
	return wire.FrameHeader{Type: t, Lanes: uint8(max(s.lanes, 1)), Stream: s.stream, Session: s.session, Epoch: s.epoch}
}

// MaxChunk is the largest payload that Buffer and Write take, in bytes.
func (s *Sender) MaxChunk() int { return s.chunk }

// broadcast lets everybody who waits look again.
//
// Preconditions: mu is held.
func (s *Sender) broadcast() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Buffer waits for room in the window and returns a buffer with a payload of n
// bytes, at most MaxChunk, to be filled in place and given to Send or Discard.
// Whoever holds several must not wait for one more than the window holds.
func (s *Sender) Buffer(ctx context.Context, n int) (*Buffer, error) {
	if n < 0 || n > s.chunk {
		return nil, fmt.Errorf("send %d bytes in one chunk: at most %d are allowed", n, s.chunk)
	}
	c := cost(n)
	var since time.Time
	for {
		s.mu.Lock()
		if err := s.usable(); err != nil {
			s.mu.Unlock()
			return nil, err
		}
		if s.used+c <= s.window && s.flying+c <= 2*s.window {
			s.used += c
			s.flying += c
			if !since.IsZero() {
				s.adapt.wait(time.Since(since))
			}
			s.mu.Unlock()
			return &Buffer{s: s, frame: getFrame(wire.FrameHeaderLen + n), n: n, cost: c}, nil
		}
		changed := s.changed
		s.mu.Unlock()
		if since.IsZero() {
			since = time.Now()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %s to take data: %w", s.peer, ctx.Err())
		}
	}
}

// usable is the error that ends all sending, if there is one.
//
// Preconditions: mu is held.
func (s *Sender) usable() error {
	switch {
	case s.err != nil:
		return s.err
	case s.ended || s.down:
		return ErrClosed
	}
	return nil
}

// Send puts the buffer's payload into the stream; the buffer belongs to the
// stream from then on, whatever Send returns. It does not wait for the network.
func (s *Sender) Send(b *Buffer) error {
	crc := wire.BodyCRC(b.Bytes())
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		s.drop(b)
		return err
	}
	s.tally.add(b.n, crc)
	s.meter.add(b.n, time.Now())
	s.append(&entry{typ: wire.FrameData, frame: b.frame[:wire.FrameHeaderLen+b.n], n: b.n, memory: b.n, crc: crc, cost: cost(b.n)})
	s.used -= b.cost - cost(b.n)
	s.flying -= b.cost - cost(b.n)
	if b.cost != cost(b.n) {
		s.broadcast()
	}
	b.frame = nil
	return nil
}

// append numbers a chunk and wakes its lane.
//
// Preconditions: mu is held, the entry's cost is in used.
func (s *Sender) append(e *entry) {
	if s.base == s.next {
		s.adapt.pause()
	}
	e.seq = s.next
	s.next++
	s.entries = append(s.entries, e)
	s.kick(int(e.seq % uint64(s.lanes)))
}

func (s *Sender) kick(lane int) {
	select {
	case s.wake[lane] <- struct{}{}:
	default:
	}
}

// Discard gives a buffer back unsent.
func (s *Sender) Discard(b *Buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(b)
}

func (s *Sender) drop(b *Buffer) {
	if b.frame == nil {
		return
	}
	s.used -= b.cost
	s.flying -= b.cost
	putFrame(b.frame)
	b.frame = nil
	s.broadcast()
}

// Write sends a copy of the parts, one after the other, as one chunk of at
// most MaxChunk bytes. It waits for room in the window.
func (s *Sender) Write(ctx context.Context, parts ...[]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	b, err := s.Buffer(ctx, n)
	if err != nil {
		return err
	}
	at := b.Bytes()
	for _, p := range parts {
		at = at[copy(at, p):]
	}
	return s.Send(b)
}

// Close ends the stream: it sends the end with the totals and waits until the
// receiver has applied everything. If ctx ends first the stream is still there
// and Close may be called again, or Abort. After an error of the stream it
// returns that error and everything is torn down.
func (s *Sender) Close(ctx context.Context) error {
	for {
		s.mu.Lock()
		if s.err == nil && !s.ended && !s.down && s.used+cost(totalLen) <= s.window {
			s.ended = true
			total := s.tally.total()
			frame := append(getFrame(wire.FrameHeaderLen + totalLen)[:wire.FrameHeaderLen], total.Append(nil)...)
			c := cost(totalLen)
			s.used += c
			s.append(&entry{typ: wire.FrameEnd, frame: frame, n: totalLen, crc: wire.BodyCRC(frame[wire.FrameHeaderLen:]), cost: c})
		}
		changed, done, err := s.changed, s.done, s.err
		s.mu.Unlock()
		if done || err != nil {
			if done {
				err = nil
				// The receiver stays until it hears this; if it is lost it
				// leaves by itself.
				s.mu.Lock()
				h := s.header(wire.FrameBye)
				s.mu.Unlock()
				_ = s.ctl.send(s.subject+".ctl", h.Frame(nil))
			}
			s.teardown()
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to apply everything: %w", s.peer, ctx.Err())
		}
	}
}

// totalLen is the length of an encoded wire.FrameTotal.
const totalLen = 48

// Abort ends the stream with an error, which the receiver gets too, and tears
// it down. After Close succeeded it does nothing.
func (s *Sender) Abort(err error) {
	if err == nil {
		err = ErrClosed
	}
	s.fail(err, true)
	s.teardown()
}

// fail makes err the stream's end, if it has none yet, and tells the receiver.
func (s *Sender) fail(err error, tell bool) {
	s.mu.Lock()
	if s.err != nil || s.done || s.down {
		s.mu.Unlock()
		return
	}
	s.err = err
	h := s.header(wire.FrameAbort)
	s.broadcast()
	s.mu.Unlock()
	s.log.Debug("stream failed", "error", err)
	if tell {
		_ = s.ctl.send(s.subject+".ctl", h.Frame(abortBody(err)))
	}
}

// teardown ends the goroutines and gives all memory back. It may be called twice.
func (s *Sender) teardown() {
	s.mu.Lock()
	if s.down {
		s.mu.Unlock()
		return
	}
	s.down = true
	if s.err == nil && !s.done {
		s.err = ErrClosed
	}
	close(s.stop)
	s.broadcast()
	s.mu.Unlock()
	for _, unsub := range s.subs {
		unsub()
	}
	s.wg.Wait()
	s.mu.Lock()
	for _, e := range s.entries {
		s.free(e)
	}
	s.entries = nil
	s.mu.Unlock()
	s.closeLinks()
}

func (s *Sender) closeLinks() {
	for _, l := range slices.Concat(s.data, s.spare, s.idling) {
		l.close()
	}
	s.ctl.close()
}

// free gives an entry's frame back unless a lane is using it.
//
// Preconditions: mu is held.
func (s *Sender) free(e *entry) {
	if e.frame != nil && !e.busy {
		putFrame(e.frame)
		e.frame = nil
	}
}

// idle reports whether the receiver has everything that was sent.
//
// Preconditions: mu is held.
func (s *Sender) idle() bool {
	for k := range s.laneSend {
		if s.laneSend[k] > s.laneAcked[k] {
			return false
		}
	}
	return true
}

// rewind starts a new epoch and lets each lane go back to what the receiver lacks.
//
// Preconditions: mu is held.
func (s *Sender) rewind(why string) {
	s.epoch++
	s.stats.Rewinds++
	for k := range s.laneSend {
		s.laneSend[k] = s.laneAcked[k]
		s.probe[k] = false
		s.kick(k)
	}
	s.log.Debug("going back", "why", why, "epoch", s.epoch, "chunk", s.base)
}

// runLane publishes the chunks of one lane.
func (s *Sender) runLane(k int) {
	subject := laneSubject(s.subject, k)
	var coder coder
	for {
		s.mu.Lock()
		var e *entry
		var h wire.FrameHeader
		for {
			if s.err != nil || s.down {
				s.mu.Unlock()
				return
			}
			if seq := s.laneSend[k]; seq < s.next {
				e = s.entries[seq-s.base]
				h = s.header(e.typ)
				h.Seq = seq
				e.busy = true
				s.sending++
				s.laneSend[k] += uint64(s.lanes)
				break
			}
			if s.probe[k] {
				s.probe[k] = false
				h = s.header(wire.FrameProbe)
				h.Seq = s.laneSend[k]
				break
			}
			s.mu.Unlock()
			select {
			case <-s.wake[k]:
			case <-s.stop:
				return
			}
			s.mu.Lock()
		}
		l := s.data[k%len(s.data)]
		s.mu.Unlock()
		h.Lane = uint8(k)

		if e == nil {
			_ = l.send(subject, h.Frame(nil)) // another probe follows
			continue
		}
		s.compress(&coder, e)
		h.Type, h.Length, h.BodyCRC = e.typ, uint32(e.n), e.crc
		err := s.sleep(s.limit.reserve(len(e.frame), time.Now()))
		s.mu.Lock()
		stale := s.epoch != h.Epoch
		s.mu.Unlock()
		if err == nil && !stale {
			h.Put(e.frame)
			err = l.send(subject, e.frame)
		}
		s.mu.Lock()
		e.busy = false
		s.sending--
		if err == nil && !stale {
			s.progress = time.Now()
			s.stats.WireBytes += uint64(wire.FrameHeaderLen + e.n)
			if e.sent {
				s.stats.ResentBytes += uint64(wire.FrameHeaderLen + e.n)
			}
			e.sent = true
		}
		if e.acked {
			s.free(e)
		}
		epoch := h.Epoch
		s.mu.Unlock()
		if err != nil && !errors.Is(err, ErrClosed) {
			if s.awaitLink(k, l) != nil {
				return
			}
			s.mu.Lock()
			if s.epoch == epoch && s.err == nil {
				s.rewind("publishing failed: " + err.Error())
			}
			s.mu.Unlock()
		}
	}
}

func laneSubject(subject string, k int) string { return fmt.Sprintf("%s.lane%d", subject, k) }

// sleep waits, or returns ErrClosed if the stream ends before.
func (s *Sender) sleep(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-s.stop:
		return ErrClosed
	}
}

// awaitLink waits until the connection of a lane stands again, or another one
// has taken its place.
func (s *Sender) awaitLink(k int, l link) error {
	for {
		if err := s.sleep(20 * time.Millisecond); err != nil {
			return err
		}
		s.mu.Lock()
		other := s.data[k%len(s.data)] != l
		s.mu.Unlock()
		if other || l.up() {
			return nil
		}
	}
}

// runTicker sends signs of life and looks for what did not happen.
func (s *Sender) runTicker() {
	tick := time.NewTicker(s.t.tick)
	defer tick.Stop()
	var pinged time.Time
	last := time.Now()
	ctlLives := s.ctl.lives()
	for {
		select {
		case <-tick.C:
		case <-s.stop:
			return
		}
		now := time.Now()
		var lives uint64
		allUp := true
		s.mu.Lock()
		data := s.data
		s.mu.Unlock()
		for _, l := range data {
			lives += l.lives()
			allUp = allUp && l.up()
		}
		cl := s.ctl.lives()
		allUp = allUp && s.ctl.up()

		s.mu.Lock()
		if s.err != nil {
			s.mu.Unlock()
			return
		}
		s.meter.sample(now)
		s.heard = s.heard.Add(s.t.stalled(last, now))
		last = now
		if silent := now.Sub(s.heard); silent > s.t.idle {
			s.mu.Unlock()
			err := fmt.Errorf("%s: %w for %s", s.peer, ErrPeerSilent, silent.Round(100*time.Millisecond))
			if !s.ctl.up() {
				err = fmt.Errorf("%w for %s: %s cannot be heard", ErrDisconnected, silent.Round(100*time.Millisecond), s.peer)
			}
			s.fail(err, true)
			return
		}
		if !s.cut.IsZero() && s.only && now.Sub(s.cut) > s.t.idle {
			s.mu.Unlock()
			s.fail(fmt.Errorf("%s: %w for %s, and nothing else may be used", s.peer, ErrCut, now.Sub(s.cut).Round(100*time.Millisecond)), true)
			return
		}
		if lives != s.livesSum && len(data) > 0 && data[0] == s.data[0] {
			s.livesSum = lives
			s.rewind("a connection was made again")
		}
		ping := now.Sub(pinged) >= s.t.heartbeat || cl != ctlLives
		ctlLives = cl
		// While a lane is publishing, slowness is the network's or the cap's.
		if !s.idle() && allUp && s.sending == 0 {
			stalled := now.Sub(s.progress)
			if stalled >= s.t.probe && now.Sub(s.probed) >= s.t.probe {
				s.probed = now
				ping = true
				for k := range s.probe {
					if s.laneSend[k] > s.laneAcked[k] {
						s.probe[k] = true
						s.kick(k)
					}
				}
			}
			if stalled >= min(s.t.blind<<s.blindN, s.t.blindMax) {
				s.blindN = min(s.blindN+1, 10)
				s.progress = now
				s.rewind("no progress and no answer to probes")
			}
		}
		h := s.header(wire.FramePing)
		h.Seq = s.next
		s.mu.Unlock()
		if ping {
			pinged = now
			_ = s.ctl.send(s.subject+".ctl", h.Frame(nil)) // the next one follows
		}
	}
}

// onFrame takes what comes from the receiver.
func (s *Sender) onFrame(b []byte) {
	h, payload, err := wire.ParseFrame(b)
	if err != nil {
		if errors.Is(err, wire.ErrFrameVersion) {
			s.fail(fmt.Errorf("%s: %w", s.peer, err), true)
			return
		}
		s.mu.Lock()
		s.stats.Corrupt++
		s.mu.Unlock()
		return // the next acknowledgement says the same and more
	}
	if h.Stream != s.stream {
		s.fail(fmt.Errorf("%s: %w", s.peer, wire.ErrForeign), true)
		return
	}
	switch h.Type {
	case wire.FrameAbort:
		// The receiver addresses the sender that it means in seq.
		if h.Seq == s.session || h.Seq == 0 {
			s.fail(abortError(payload, s.peer), false)
		}
	case wire.FrameAck:
		a, err := wire.ParseAckBody(payload)
		if err != nil {
			s.fail(fmt.Errorf("%s: %w: %w", s.peer, ErrProtocol, err), true)
			return
		}
		if err := s.onAck(h, a); err != nil {
			s.fail(fmt.Errorf("%s: %w", s.peer, err), !errors.Is(err, ErrBusy))
		}
	}
}

// onAck applies an acknowledgement. Old ones that come late change nothing.
func (s *Sender) onAck(h wire.FrameHeader, a wire.AckBody) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.down {
		return nil
	}
	if a.Peer == 0 {
		return nil // it does not know of us yet; a ping is on its way
	}
	if a.Peer != s.session {
		return ErrBusy
	}
	if s.peerSess == 0 {
		if len(a.Next) == 0 || int(h.Lanes) != len(a.Next) {
			return fmt.Errorf("%w: it offers no lanes", ErrProtocol)
		}
		s.opened(h, a)
		return nil
	}
	if h.Session != s.peerSess {
		return ErrPeerRestarted
	}
	if len(a.Next) != s.lanes || h.Seq > s.next {
		return fmt.Errorf("%w: it acknowledges chunk %d of %d on %d of %d lanes", ErrProtocol, h.Seq, s.next, len(a.Next), s.lanes)
	}
	now := time.Now()
	s.heard = now
	s.heardCut(a.Cut, now)
	moved := false
	for k, n := range a.Next {
		if n <= s.laneAcked[k] {
			continue
		}
		if n%uint64(s.lanes) != uint64(k) || n >= s.next+uint64(s.lanes) {
			return fmt.Errorf("%w: it claims chunk %d on lane %d, %d were sent", ErrProtocol, n, k, s.next)
		}
		for seq := s.laneAcked[k]; seq < n; seq += uint64(s.lanes) {
			if seq >= s.base && seq < s.next {
				e := s.entries[seq-s.base]
				e.acked = true
				s.free(e)
			}
		}
		s.laneAcked[k] = n
		s.laneSend[k] = max(s.laneSend[k], n)
		moved = true
	}
	for s.base < h.Seq {
		e := s.entries[0]
		if !e.acked {
			return fmt.Errorf("%w: it applied chunk %d without having it", ErrProtocol, e.seq)
		}
		s.used -= e.cost
		if e.typ != wire.FrameEnd {
			s.flying -= cost(e.memory)
		}
		if e.coded {
			s.adapt.arrived(now, e.codec, e.memory, e.n)
		}
		s.entries[0] = nil
		s.entries = s.entries[1:]
		s.base++
		moved = true
	}
	if moved {
		s.progress, s.blindN = now, 0
		s.broadcast()
	}
	if a.Done && s.ended && s.base == s.next && !s.done {
		s.done = true
		s.broadcast()
	}
	if a.Resend && h.Epoch == s.epoch {
		s.rewind("the receiver lacks something")
	}
	return nil
}

// opened takes over what the receiver offers.
//
// Preconditions: mu is held.
func (s *Sender) opened(h wire.FrameHeader, a wire.AckBody) {
	s.peerSess = h.Session
	s.lanes = len(a.Next)
	s.window = max(min(s.window, int64(a.Window)), minWindow)
	// A chunk must leave room for another one in the window.
	s.chunk = min(s.chunk, int(s.window)/2-int(cost(0)))
	now := time.Now()
	s.heard, s.progress = now, now
	s.laneSend = make([]uint64, s.lanes)
	s.laneAcked = make([]uint64, s.lanes)
	s.probe = make([]bool, s.lanes)
	s.wake = make([]chan struct{}, s.lanes)
	for k := range s.lanes {
		s.laneSend[k], s.laneAcked[k] = uint64(k), uint64(k)
		s.wake[k] = make(chan struct{}, 1)
	}
	s.livesSum = livesOf(s.data)
	s.broadcast()
}

// Stats returns the figures so far.
func (s *Sender) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Chunks, st.Bytes = s.tally.chunks, s.tally.bytes
	st.Compression, st.Detoured = s.adapt.text(), len(s.idling) > 0
	st.First, st.Last = s.meter.first, s.meter.last
	st.BytesPerSecond = s.meter.perSecond(time.Now())
	return st
}

// abortBody is the payload of an abort frame; the message is kept short enough
// for any bus.
func abortBody(err error) []byte {
	e := wire.ErrorOf(err)
	if len(e.Message) > 4<<10 {
		e.Message = e.Message[:4<<10]
	}
	b, merr := proto.Marshal(e)
	if merr != nil || len(b) > 256<<10 {
		// Not valid UTF-8, cut in the middle, or too many problems.
		b, _ = proto.Marshal(&wire.Error{Code: e.Code, Message: "see the log of that side"})
	}
	return b
}

func parseAbort(payload []byte) (*wire.Error, error) {
	e := &wire.Error{}
	if err := proto.Unmarshal(payload, e); err != nil {
		return nil, err
	}
	return e, nil
}
