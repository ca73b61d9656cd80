package transport

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"sync"
	"time"

	"godwit/wire"
)

// A stream carries chunks from one sender to one receiver in order and exactly
// once, whatever the connections in between do.
//
//	sender                                                     receiver
//	Buffer ─► Send ─► window ─► lane goroutines ══ SUBJECT.laneK ══► lane queues ─► Recv ─► Release
//	                    ▲                                                 │                 │
//	                    └──────────────── SUBJECT.ack (have, applied) ◄───┴─────────────────┘
//	            ping, abort, bye ─────── SUBJECT.ctl ──────────────────► (ack at once)
//
// Chunk n travels on lane n mod lanes, and NATS keeps the order of a lane, so
// within a lane a number that is too high proves a loss. The receiver then
// asks for a resend; the sender starts a new epoch and goes back, on each lane,
// to the first chunk that the receiver lacks. Frames of older epochs are
// dropped. The sender also goes back when one of its connections was made
// again or a publish failed, and the receiver asks for it when one of its own
// was. A loss at the very end of what was sent is found by a probe that the
// sender sends behind the data of each lane after 300 ms without progress; only
// if nothing at all comes back it goes back blindly, at growing intervals, so
// that a slow link is not flooded with repetitions.
//
// There may be two sets of connections for data: the direct ones, which are the
// receiver's to a server in the sender's process, and those over the cluster. The
// receiver listens on both, the sender uses the direct ones. When the receiver tells
// that they are lost for longer than a moment, the sender goes back, as after any loss,
// and on over the cluster; numbers, epochs and windows know nothing of it.
// Acknowledgements take both ways.
//
// A lane compresses a chunk before it first sends it (adapter says whether and by
// what). A chunk whose codec makes nothing of it travels as it is.
//
// The window counts bytes from Buffer until the receiver's Release, as they are in
// memory until they are compressed and as they are on the wire from then on. So it
// bounds memory at both ends, but for one chunk that the receiver works on. What is under
// way counts twice that at most as it is in memory, too: it would be waited for while a
// tree is frozen. A chunk's memory at the sender is free again as
// soon as the receiver has it, its share of the window when it was applied.
//
// Both ends tell each other twice a second that they live, on the control
// connection, so that a source that is busy freezing a tree is not taken for
// dead and one that died is.

// Defaults of streams.
const (
	DefaultChunkSize   = 512 << 10 // bytes of payload
	DefaultWindow      = 8 << 20   // bytes, all lanes together
	DefaultLanes       = 2
	DefaultIdleTimeout = 15 * time.Second
	DefaultOpenTimeout = 30 * time.Second
)

// MaxChunkSize bounds the payload of a chunk, in bytes.
const MaxChunkSize = 512 << 10

// minWindow holds a few chunks for each lane.
const minWindow = 64 << 10

var (
	// ErrPeerSilent: nothing was heard of the other end for the idle timeout.
	ErrPeerSilent = errors.New("nothing is heard of the other end")
	// ErrPeerRestarted: the other end began anew and lost what it had.
	ErrPeerRestarted = errors.New("the other end has restarted and lost its state")
	// ErrPeerAborted: the other end ended the stream with an error, which is
	// wrapped beside it.
	ErrPeerAborted = errors.New("the other end aborted the stream")
	// ErrBusy: the receiver already belongs to another sender.
	ErrBusy = errors.New("the receiver belongs to another sender")
	// ErrWindow: the sender sent more than the window allows.
	ErrWindow = errors.New("the sender overran the window")
	// ErrTotal: what arrived is not what the sender says it sent.
	ErrTotal = errors.New("the stream does not add up")
	// ErrProtocol: the other end broke the rules of the stream.
	ErrProtocol = errors.New("the other end broke the stream protocol")
	// ErrCut: the connections of the direct lane are lost.
	ErrCut = errors.New("the direct connections to the source are lost")
	// ErrClosed: this end has been closed.
	ErrClosed = errors.New("the stream is closed")
)

// Stats are the figures of one end of a stream.
type Stats struct {
	Chunks         uint64    // given to Send, or given out by Recv
	Bytes          uint64    // their payload
	WireBytes      uint64    // of frames on the lanes, headers and repetitions included
	ResentBytes    uint64    // sender: sent again; receiver: dropped because it had them
	Rewinds        uint64    // sender: how often it went back
	Duplicates     uint64    // receiver: chunks that it had already
	Stale          uint64    // receiver: frames of older epochs or of other senders
	Corrupt        uint64    // frames that were dropped because of their checksum
	BytesPerSecond uint64    // of payload, smoothed over about a second
	Compression    string    // sender: how the chunks travelled, for people
	Detoured       bool      // sender: the direct lane was given up
	First, Last    time.Time // when the first and the last payload was sent or received; zero: never
}

// timing are the intervals of a stream; tests shorten them.
type timing struct {
	tick      time.Duration // how often time-outs are looked at
	heartbeat time.Duration // ping and ack without any cause
	probe     time.Duration // no progress: ask for what is missing
	blind     time.Duration // no answer either: go back; doubles up to blindMax
	blindMax  time.Duration
	idle      time.Duration // nothing heard: give up
	open      time.Duration // nothing heard at the beginning: give up
}

func timings(idle, open time.Duration) timing {
	t := timing{
		tick:      50 * time.Millisecond,
		heartbeat: 500 * time.Millisecond,
		probe:     300 * time.Millisecond,
		blind:     2 * time.Second,
		blindMax:  16 * time.Second,
		idle:      idle,
		open:      open,
	}
	if t.idle <= 0 {
		t.idle = DefaultIdleTimeout
	}
	if t.open <= 0 {
		t.open = DefaultOpenTimeout
	}
	// A short idle timeout must still span several signs of life.
	if t.heartbeat > t.idle/4 {
		t.heartbeat = t.idle / 4
	}
	return t
}

// stalled is how long this process did not run between two ticks (stopped, its
// machine suspended or overloaded): what came meanwhile is still to be read, so
// that time says nothing about the other end.
func (t timing) stalled(last, now time.Time) time.Duration {
	if gap := now.Sub(last); gap > t.idle/8+2*t.tick {
		return gap
	}
	return 0
}

// cost is what a payload of n bytes takes of the window: the frame and what
// the queues need to remember it, so that tiny chunks are bounded too. Both
// ends count the same.
func cost(n int) int64 { return int64(n) + wire.FrameHeaderLen + 208 }

// tally is the running digest of a stream (wire.FrameTotal).
type tally struct {
	chunks, bytes uint64
	sum           hash.Hash
}

func newTally() *tally { return &tally{sum: sha256.New()} }

func (t *tally) add(n int, crc uint32) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], t.chunks)
	binary.LittleEndian.PutUint32(b[8:], uint32(n))
	binary.LittleEndian.PutUint32(b[12:], crc)
	_, _ = t.sum.Write(b[:]) // a hash never fails
	t.chunks++
	t.bytes += uint64(n)
}

func (t *tally) total() wire.FrameTotal {
	f := wire.FrameTotal{Chunks: t.chunks, Bytes: t.bytes}
	t.sum.Sum(f.Digest[:0])
	return f
}

// meter smooths a rate.
type meter struct {
	bytes       uint64
	first, last time.Time
	at          time.Time // of the last sample
	seen        uint64    // bytes at that time
	rate        float64   // bytes per second
	warm        bool
}

func (m *meter) add(n int, now time.Time) {
	if m.first.IsZero() {
		m.first, m.at = now, now
	}
	m.last = now
	m.bytes += uint64(n)
}

// sample folds the time since the last sample into the rate. The average
// forgets with a time constant of one second.
func (m *meter) sample(now time.Time) {
	dt := now.Sub(m.at).Seconds()
	if m.first.IsZero() || dt < 0.05 {
		return
	}
	cur := float64(m.bytes-m.seen) / dt
	if !m.warm {
		m.rate, m.warm = cur, true
	} else {
		w := min(dt, 1)
		m.rate += (cur - m.rate) * w
	}
	m.at, m.seen = now, m.bytes
}

// perSecond is the smoothed rate, or the plain one while there is no sample.
func (m *meter) perSecond(now time.Time) uint64 {
	if m.warm {
		return uint64(m.rate)
	}
	if d := now.Sub(m.first).Seconds(); !m.first.IsZero() && d > 0 {
		return uint64(float64(m.bytes) / max(d, 0.001))
	}
	return 0
}

// limiter is a bandwidth cap, shared by the lanes: a bucket that fills with
// rate bytes per second and holds a twentieth of a second, or one frame.
type limiter struct {
	mu   sync.Mutex
	rate float64 // bytes per second; 0: no cap
	next time.Time
}

// reserve takes n bytes and returns how long to wait before sending them.
func (l *limiter) reserve(n int, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rate <= 0 {
		return 0
	}
	if earliest := now.Add(-50 * time.Millisecond); l.next.Before(earliest) {
		l.next = earliest
	}
	wait := l.next.Sub(now)
	l.next = l.next.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	return max(wait, 0)
}

// buffer sizes, frame header included: a chunk takes the smallest that holds it.
var poolSizes = [...]int{1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, wire.FrameHeaderLen + MaxChunkSize}

var pools [len(poolSizes)]sync.Pool

func getFrame(n int) []byte {
	for i, size := range poolSizes {
		if n <= size {
			if p, ok := pools[i].Get().(*[]byte); ok {
				return (*p)[:n]
			}
			return make([]byte, n, size)
		}
	}
	return make([]byte, n)
}

func putFrame(b []byte) {
	for i, size := range poolSizes {
		if cap(b) == size {
			b = b[:size]
			pools[i].Put(&b)
			return
		}
	}
}

// abortError is the error that the other end ended the stream with.
func abortError(payload []byte, peer string) error {
	e, err := parseAbort(payload)
	if err != nil {
		return fmt.Errorf("%s: %w without a reason that can be read: %w", peer, ErrPeerAborted, err)
	}
	return fmt.Errorf("%s: %w: %w", peer, ErrPeerAborted, e.Err())
}
