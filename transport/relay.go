package transport

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/nats-io/nats.go"

	"godwit/wire"
)

// A relay carries the bytes of an object that stays on its host to and from the
// host where a tree that has it open runs: in order, exactly once, both ways.
// Unlike a stream it has no time-outs and outlives connections, and its tree's
// end can be taken over by another host.
//
//	object ─► Put ─► unacknowledged ══ data ══► queue ─► Next, Took ─► tree
//	(home)  ◄─ Next, Took ─ queue ◄══ data ══ unacknowledged ◄─ Put ◄─ (tree)
//
// Bytes are counted from the object's first one on. The home's end takes what it
// gets when it has it in memory; the tree's end when Took says that the tree has
// it, so that what a tree has not got is still at home when the tree moves on.
// The side that takes says up to where it does (limit), which bounds memory. What is
// lost is found by its gap, or by time without progress, and sent again.
//
// A tree's end begins by attaching with its epoch, one more than that of the
// host where the tree was before; the answer tells both counts. Frames of other
// epochs are dropped. Before a tree is moved on, its old end settles: everything
// that the tree wrote is at home, and home knows what the tree got.

// Defaults of relays.
const (
	DefaultRelayWindow = 4 << 20 // bytes each way
	// relaySlack is what a home's end takes above its window from a tree that is
	// about to move: what pipes and sockets hold at most.
	relaySlack = 16 << 20

	relayTick      = 200 * time.Millisecond
	relayHeartbeat = 2 * time.Second
	relayRetry     = time.Second // without progress: send again; doubles up to relayRetryMax
	relayRetryMax  = 8 * time.Second
	relayLinger    = 30 * time.Second // after the end: the other side may still ask
	// An answer that nobody knows of the relay is believed when it was given
	// relayGoneTimes times over at least relayGoneFor.
	relayGoneTimes = 3
	relayGoneFor   = 3 * time.Second
	// RelayStalled is after what silence a relay counts as stalled.
	RelayStalled = 5 * time.Second
)

// ErrRelayGone: the other end's agent has lost the relay, with what was in it.
var ErrRelayGone = errors.New("the agent of the other end has lost the object")

// RelaySend publishes a frame for the end of a relay that a host has.
type RelaySend func(host, id string, toHome bool, frame []byte) error

// RelayConfig describes one end of a relay.
type RelayConfig struct {
	ID    string
	Home  bool   // the object's end; else the tree's
	Host  string // of this end
	Peer  string // of the other end; a home's end learns it
	Epoch uint32 // of a tree's end
	// Reads says that this end will Put what it reads, Writes that it will take.
	Reads, Writes bool
	Send          RelaySend
	Chunk         int // largest payload, bytes; 0: wire.MaxRelayPayload
	Window        int // bytes; 0: DefaultRelayWindow
	Logger        hclog.Logger
}

// Relay is one end of a relay. Its methods may be called from any goroutine.
type Relay struct {
	cfg  RelayConfig
	log  hclog.Logger
	kick chan struct{}
	stop chan struct{}
	idle chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	changed chan struct{} // closed and replaced whenever waiting callers should look again
	active  bool
	left    bool
	err     error
	epoch   uint32
	peer    string
	opened  bool // both sides' counts are known

	// what goes out
	parts                  []relayPart
	base, next, end, limit uint64
	fin, peerShut          bool
	flushing               bool
	echo                   uint64 // how much of what came in the other side knows to be taken

	// what comes in
	queue                      [][]byte
	expected, given, peerEnd   uint64
	peerFin, shut              bool
	ackDue, resendDue, awaited bool

	progress, sent, heard, overAt time.Time
	retry                         time.Duration
	gone                          int
	goneSince                     time.Time
}

type relayPart struct {
	off  uint64
	data []byte
}

// RelayStats are the figures of one end.
type RelayStats struct {
	Peer     string
	Epoch    uint32
	Sent     uint64 // bytes of ours that the other end has taken
	Received uint64 // bytes that were given out by Next and Took
	Waiting  uint64 // bytes in memory here
	Opened   bool
	Over     bool
	Heard    time.Time // zero: never
}

// NewRelay makes one end. It does nothing until Activate.
func NewRelay(cfg RelayConfig) *Relay {
	if cfg.Chunk <= 0 || cfg.Chunk > wire.MaxRelayPayload {
		cfg.Chunk = wire.MaxRelayPayload
	}
	if cfg.Window <= 0 {
		cfg.Window = DefaultRelayWindow
	}
	return &Relay{
		cfg: cfg, log: logger(cfg.Logger).Named("relay").With("relay", cfg.ID), peer: cfg.Peer, epoch: cfg.Epoch,
		kick: make(chan struct{}, 1), stop: make(chan struct{}), idle: make(chan struct{}), changed: make(chan struct{}),
		fin: !cfg.Reads, shut: !cfg.Writes, retry: relayRetry,
	}
}

// Heir makes a tree's end that goes on with what the other end has not taken, towards
// another one that begins anew. This end is of no use afterwards.
// Preconditions: nobody calls Put or Took meanwhile.
func (r *Relay) Heir(cfg RelayConfig) *Relay {
	n := NewRelay(cfg)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.parts {
		if p.off < r.base {
			p.data = p.data[min(uint64(len(p.data)), r.base-p.off):]
		}
		n.Put(p.data)
	}
	return n
}

// Activate lets the end speak and listen.
func (r *Relay) Activate() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.active && !r.left {
		r.active = true
		go r.run()
	}
}

// Leave ends this end without a word to the other one, whose side somebody else
// has taken over, or that never was asked.
func (r *Relay) Leave() {
	r.mu.Lock()
	was := r.active
	if !r.left {
		r.left = true
		close(r.stop)
		r.broadcast()
	}
	r.mu.Unlock()
	if was {
		<-r.idle
	}
}

// Farewell tells the other end that this one ends for good. Leave has to follow.
func (r *Relay) Farewell() {
	r.mu.Lock()
	tell := r.active && r.opened && !r.over()
	peer, h := r.peer, wire.RelayHeader{Type: wire.RelayGone, Flags: wire.RelayFin, Epoch: r.epoch}
	r.mu.Unlock()
	if tell {
		_ = r.cfg.Send(peer, r.cfg.ID, !r.cfg.Home, h.Frame(nil)) // else it is found out by asking
	}
}

// Chunk is how much one Put takes at most, bytes.
func (r *Relay) Chunk() int { return r.cfg.Chunk }

// broadcast lets everybody who waits look again. Preconditions: mu is held.
func (r *Relay) broadcast() {
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *Relay) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// wait calls ready, with mu held, until it says true, or stop is closed.
func (r *Relay) wait(stop <-chan struct{}, ready func() bool) bool {
	r.mu.Lock()
	for {
		if ready() {
			r.mu.Unlock()
			return true
		}
		changed := r.changed
		r.mu.Unlock()
		select {
		case <-changed:
		case <-stop:
			return false
		}
		r.mu.Lock()
	}
}

// Room waits until something may be read of the object, and says how much:
// 0 when nobody wants more, or stop was closed.
func (r *Relay) Room(stop <-chan struct{}) (n int) {
	r.wait(stop, func() bool {
		if r.ended() || r.peerShut || r.fin {
			n = 0
			return true
		}
		if n = r.room(); n > 0 {
			return true
		}
		return false
	})
	return n
}

// room is how many bytes may be read. Preconditions: mu is held.
func (r *Relay) room() int {
	if !r.opened {
		return 0
	}
	if r.flushing {
		return r.cfg.Chunk
	}
	left := int64(r.cfg.Window) - int64(r.end-r.base)
	left = min(left, int64(r.limit)-int64(r.end), int64(r.cfg.Chunk))
	return int(max(left, 0))
}

// ended says whether there is no more use for this end. Preconditions: mu is held.
func (r *Relay) ended() bool { return r.left || r.err != nil }

// Put takes over what was read of the object.
func (r *Relay) Put(p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(p) == 0 || r.fin || r.peerShut { // who takes no more may say so while it is read
		return
	}
	if r.base == r.end {
		r.progress = time.Now()
	}
	r.parts = append(r.parts, relayPart{r.end, p})
	r.end += uint64(len(p))
	r.wake()
}

// Fin says that the object has come to its end.
func (r *Relay) Fin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fin, r.ackDue = true, true
	r.wake()
}

// Next waits for bytes that are to be written. fin: there are none any more.
// ok is false when the end is over, or stop was closed. The bytes stay the relay's
// until Took.
func (r *Relay) Next(stop <-chan struct{}) (p []byte, fin, ok bool) {
	ok = r.wait(stop, func() bool {
		p, fin = nil, false
		switch {
		case len(r.queue) > 0 && !r.left:
			p = r.queue[0]
		case r.peerFin && r.opened && r.given == r.peerEnd, r.err != nil:
			fin = true
		case !r.left && !r.shut:
			return false
		}
		return true
	})
	return p, fin, ok && (len(p) > 0 || fin)
}

// Took says that the first n bytes of what Next gave have been written.
func (r *Relay) Took(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) == 0 { // shut meanwhile
		return
	}
	if r.queue[0] = r.queue[0][n:]; len(r.queue[0]) == 0 {
		r.queue[0] = nil
		r.queue = r.queue[1:]
	}
	r.given += uint64(n)
	r.ackDue = true
	r.wake()
}

// Shut says that nothing is taken any more: nobody reads it, or all has been.
func (r *Relay) Shut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shut {
		return
	}
	r.shut, r.ackDue, r.queue = true, true, nil
	r.broadcast()
	r.wake()
}

// Flush lets everything that is there still be read and sent, above the window:
// the tree stands still and is about to move.
func (r *Relay) Flush(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flushing = on
	r.broadcast()
	r.wake()
}

// Settle waits until the other end has taken all that was put, and knows what was
// taken here. Preconditions: nobody calls Put or Took meanwhile.
func (r *Relay) Settle(ctx context.Context) error {
	done := make(chan struct{})
	defer close(done)
	go func() {
		tick := time.NewTicker(relayTick / 4)
		defer tick.Stop()
		for {
			r.mu.Lock()
			r.ackDue, r.awaited = true, true
			r.wake()
			r.mu.Unlock()
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	}()
	var err error
	if !r.wait(ctx.Done(), func() bool {
		err = r.err
		return r.ended() || r.opened && (r.base == r.end || r.peerShut) && (r.echo >= r.given || r.shut)
	}) {
		return fmt.Errorf("wait for %s to take the bytes of relay %s: %w", r.peer, r.cfg.ID, context.Cause(ctx))
	}
	return err
}

// Over says whether both directions have come to their end.
func (r *Relay) Over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.over()
}

func (r *Relay) over() bool { return r.ended() || r.shut && r.peerShut }

// Done is closed when the end is of no use to anybody any more.
func (r *Relay) Done() <-chan struct{} { return r.idle }

// Err is why the relay ended before its time, if it did.
func (r *Relay) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// PeerShut waits until the other end takes no more; false: stop was closed before.
func (r *Relay) PeerShut(stop <-chan struct{}) bool {
	return r.wait(stop, func() bool { return r.peerShut || r.ended() })
}

// Stats returns the figures so far.
func (r *Relay) Stats() RelayStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return RelayStats{Peer: r.peer, Epoch: r.epoch, Sent: r.base, Received: r.given, Waiting: r.end - r.base + r.expected - r.given,
		Opened: r.opened, Over: r.over(), Heard: r.heard}
}

// run sends what is due.
func (r *Relay) run() {
	defer close(r.idle)
	tick := time.NewTicker(relayTick)
	defer tick.Stop()
	for {
		peer, frame, off := r.frame()
		if frame != nil {
			if err := r.cfg.Send(peer, r.cfg.ID, !r.cfg.Home, frame); err != nil {
				r.log.Debug("a frame could not be sent", "error", err)
				r.mu.Lock()
				r.next = max(min(r.next, off), r.base)
				r.mu.Unlock()
			} else {
				select {
				case <-r.stop:
					return
				default:
					continue
				}
			}
		} else {
			select {
			case <-r.kick:
				continue
			case <-tick.C:
			case <-r.stop:
				return
			}
		}
		// The bus is away, or time has passed.
		select {
		case <-r.stop:
			return
		case <-time.After(relayTick / 4):
		}
		if r.lapse(time.Now()) {
			return
		}
	}
}

// lapse does what time alone makes due; true: the linger is over.
func (r *Relay) lapse(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.base < r.next && now.Sub(r.progress) > r.retry {
		r.next, r.progress = r.base, now
		r.retry = min(2*r.retry, relayRetryMax)
		r.log.Debug("sending again", "from", r.base)
	}
	if now.Sub(r.sent) > relayHeartbeat {
		r.ackDue = true
	}
	if !r.over() {
		return false
	}
	if r.overAt.IsZero() {
		r.overAt, r.ackDue = now, true
	}
	return now.Sub(r.overAt) > relayLinger
}

// frame makes the next frame that is due, if any. off is where to go on from if it
// cannot be sent.
func (r *Relay) frame() (peer string, frame []byte, off uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	h := wire.RelayHeader{Type: wire.RelayState, Epoch: r.epoch, End: r.end, Base: r.base, Taken: r.taken()}
	h.Limit = max(r.given+uint64(r.cfg.Window), h.Taken)
	off = r.next
	switch {
	case r.left || r.peer == "" || r.cfg.Home && !r.opened:
		return "", nil, off
	case !r.opened:
		if now.Sub(r.sent) < relayTick {
			return "", nil, off
		}
		r.sent = now
		return r.peer, wire.RelayHeader{Type: wire.RelayAttach, Epoch: r.epoch}.Frame([]byte(r.cfg.Host)), off
	}
	if r.fin {
		h.Flags |= wire.RelayFin
	}
	if r.shut {
		h.Flags |= wire.RelayShut
	}
	if r.resendDue {
		h.Flags |= wire.RelayResend
	}
	limit := r.limit
	if r.flushing {
		limit = r.end
	}
	if p := r.part(); p != nil && r.next < limit && !r.peerShut {
		p = p[:min(uint64(len(p)), limit-r.next)]
		h.Type, h.Offset = wire.RelayData, r.next
		if r.base == r.next {
			r.progress = now
		}
		r.next += uint64(len(p))
		r.sent, r.ackDue, r.resendDue = now, false, false
		return r.peer, h.Frame(p), h.Offset
	}
	if !r.ackDue {
		return "", nil, off
	}
	if r.awaited { // an answer is asked for by telling nothing new
		h.Type, h.Offset = wire.RelayData, r.next
		r.awaited = false
	}
	r.sent, r.ackDue, r.resendDue = now, false, false
	return r.peer, h.Frame(nil), off
}

// part is what follows at next. Preconditions: mu is held.
func (r *Relay) part() []byte {
	for _, p := range r.parts {
		if end := p.off + uint64(len(p.data)); r.next < end {
			return p.data[r.next-p.off:]
		}
	}
	return nil
}

// taken is what this side has taken over for good. Preconditions: mu is held.
func (r *Relay) taken() uint64 {
	if r.cfg.Home {
		return r.expected
	}
	return r.given
}

// Handle takes a frame that came for this end; payload is copied if it is kept.
func (r *Relay) Handle(h wire.RelayHeader, payload []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.active || r.left {
		return
	}
	switch h.Type {
	case wire.RelayAttach:
		r.attach(h, string(payload))
		return
	case wire.RelayGone:
		r.lost(h)
		return
	}
	if h.Epoch != r.epoch {
		return
	}
	if !r.opened {
		if r.cfg.Home {
			return // nobody has attached
		}
		// The counts are those that home has.
		r.expected, r.given, r.echo = h.Base, h.Base, h.Base
		r.base, r.next = h.Taken, h.Taken
		// A tree that moves on before home has answered has its bytes put already.
		for i := range r.parts {
			r.parts[i].off += h.Taken
		}
		r.end += h.Taken
		r.opened, r.ackDue = true, true
	}
	r.heard, r.gone = time.Now(), 0
	if err := r.acknowledged(h); err != nil {
		r.log.Debug("frame dropped", "error", err)
		return
	}
	r.incoming(h, payload)
	r.broadcast()
	r.wake()
}

// attach lets a tree's end on another host take over. Preconditions: mu is held.
func (r *Relay) attach(h wire.RelayHeader, host string) {
	if !r.cfg.Home || h.Epoch < r.epoch || CheckName(host) != nil || r.opened && h.Epoch == r.epoch && host != r.peer {
		return
	}
	if !r.opened || h.Epoch > r.epoch {
		r.log.Debug("the tree's end has attached", "host", host, "epoch", h.Epoch)
		r.epoch, r.peer, r.opened = h.Epoch, host, true
		r.next, r.limit = r.base, r.base
	}
	r.heard, r.gone, r.ackDue = time.Now(), 0, true
	r.broadcast()
	r.wake()
}

// lost takes the word that the other end's agent knows of no such relay. One that
// is just being made is known a moment later. Preconditions: mu is held.
func (r *Relay) lost(h wire.RelayHeader) {
	if h.Epoch != r.epoch || r.over() {
		return
	}
	now := time.Now()
	if r.gone++; r.gone == 1 {
		r.goneSince = now
	}
	r.ackDue = true
	if h.Flags&wire.RelayFin != 0 || r.gone >= relayGoneTimes && now.Sub(r.goneSince) >= relayGoneFor {
		r.err = fmt.Errorf("%s: %w", r.peer, ErrRelayGone)
		r.broadcast()
	}
}

// acknowledged applies what the other end says to have taken. Preconditions: mu is held.
func (r *Relay) acknowledged(h wire.RelayHeader) error {
	if h.Taken > r.end {
		return fmt.Errorf("%w: %d bytes are acknowledged, %d were read", ErrProtocol, h.Taken, r.end)
	}
	if h.Taken > r.base {
		r.base, r.progress, r.retry = h.Taken, time.Now(), relayRetry
		r.next = max(r.next, r.base)
		for len(r.parts) > 0 && r.parts[0].off+uint64(len(r.parts[0].data)) <= r.base {
			r.parts[0].data = nil
			r.parts = r.parts[1:]
		}
	}
	r.limit = max(r.limit, h.Limit)
	r.echo = max(r.echo, h.Base)
	if h.Flags&wire.RelayShut != 0 {
		r.peerShut, r.parts = true, nil
	}
	if h.Flags&wire.RelayResend != 0 && r.next > r.base {
		r.next = r.base
	}
	return nil
}

// incoming takes the bytes of a frame. Preconditions: mu is held.
func (r *Relay) incoming(h wire.RelayHeader, payload []byte) {
	if h.Flags&wire.RelayFin != 0 && !r.peerFin {
		r.peerFin, r.peerEnd = true, h.End
	}
	if h.Type != wire.RelayData {
		return
	}
	r.ackDue = true
	end := h.Offset + uint64(len(payload))
	switch {
	case r.shut || end <= r.expected:
		return
	case h.Offset > r.expected:
		r.resendDue = true
		return
	}
	payload = payload[r.expected-h.Offset:]
	room := r.cfg.Window
	if r.cfg.Home {
		room += relaySlack
	}
	if int(r.expected-r.given)+len(payload) > room {
		return // it is sent again when there is room
	}
	r.queue = append(r.queue, append([]byte(nil), payload...))
	r.expected = end
}

// RelayBus is the way of relays' frames over the bus.
type RelayBus struct {
	nc   *nats.Conn
	host string
	sub  *nats.Subscription
}

// NewRelayBus lets fn have every frame for the ends that host has, one at a time.
// fn must not wait; false means that there is no such end, which the sender is told.
func NewRelayBus(nc *nats.Conn, host string, fn func(id string, toHome bool, frame []byte) bool) (*RelayBus, error) {
	b := &RelayBus{nc: nc, host: host}
	prefix := Prefix + ".relay." + host + "."
	var err error
	b.sub, err = nc.Subscribe(prefix+">", func(m *nats.Msg) {
		id, end, ok := strings.Cut(strings.TrimPrefix(m.Subject, prefix), ".")
		if len(m.Data) == 0 { // the bus says that no agent listens there: it may come back
			return
		}
		if !ok || CheckName(id) != nil || end != "home" && end != "tree" || fn(id, end == "home", m.Data) {
			return
		}
		if h, _, err := wire.ParseRelayFrame(m.Data); err == nil && h.Type != wire.RelayGone && m.Reply != "" {
			_ = nc.Publish(m.Reply, wire.RelayHeader{Type: wire.RelayGone, Epoch: h.Epoch}.Frame(nil)) // it is asked for again
		}
	})
	if err != nil {
		return nil, fmt.Errorf("listen to relays: %w", err)
	}
	if err := b.sub.SetPendingLimits(-1, pendingLimit); err != nil {
		return nil, errors.Join(fmt.Errorf("listen to relays: %w", err), b.sub.Unsubscribe())
	}
	return b, nil
}

// Send is a RelaySend.
func (b *RelayBus) Send(host, id string, toHome bool, frame []byte) error {
	return b.nc.PublishRequest(relaySubject(host, id, toHome), relaySubject(b.host, id, !toHome), frame)
}

// Chunk is the largest payload of a relay's frame that the bus takes, bytes.
func (b *RelayBus) Chunk() int {
	return min(wire.MaxRelayPayload, int(b.nc.MaxPayload())-wire.RelayHeaderLen)
}

// Close ends the listening; what was sent before is on its way.
func (b *RelayBus) Close() error {
	return errors.Join(b.sub.Unsubscribe(), b.nc.FlushTimeout(2*time.Second))
}

func relaySubject(host, id string, home bool) string {
	if home {
		return Prefix + ".relay." + host + "." + id + ".home"
	}
	return Prefix + ".relay." + host + "." + id + ".tree"
}
