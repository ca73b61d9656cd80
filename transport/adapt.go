package transport

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"godwit/wire"
)

// Compression says how the chunks of a stream travel.
type Compression struct {
	// Auto chooses by measurement among Codecs, and none; else Codec is used for
	// every chunk that becomes smaller by it.
	Auto   bool
	Codec  wire.Codec
	Codecs []wire.Codec // that the receiver knows
}

const (
	// An interval is what a measurement takes: so many bytes of memory in at least so
	// much time, or what came in a longer time.
	intervalBytes = 4 << 20
	intervalLeast = 40 * time.Millisecond
	intervalMost  = 400 * time.Millisecond
	// sampleEvery is how many bytes pass between two samples, sampleBytes how much of a
	// chunk is compressed for one.
	sampleEvery = 4 << 20
	sampleBytes = 64 << 10
	// worth is by how much a codec must promise to be faster to be tried, gain what it
	// must have brought to stay.
	worth = 1.25
	gain  = 1.1
	// maxHold bounds the intervals for which nothing is tried after something was in vain.
	maxHold = 256
	// recheck is after how many intervals with a codec none is tried again: the link
	// may have become faster.
	recheck = 128
)

// adapter chooses the codec of chunks by what was measured. It is plain
// arithmetic: no clock, no lock.
//
// Compressing helps only where the link is what the sender waits for. So while the
// sender waits for the window, the rate at which memory arrives is compared with what
// samples promise: the lesser of what one core compresses and what the link would then
// carry. A codec that promises enough is tried and kept if it brought something.
type adapter struct {
	auto   bool
	cur    wire.Codec
	codecs []wire.Codec
	known  [3]estimate // by codec
	due    int64       // bytes until the next sample

	begun        time.Time // of the interval; zero: it begins with the next chunk
	memory, wire int64     // that arrived in it
	waited       time.Duration

	rate   float64 // at which memory arrived in the last whole interval, bytes per second
	trial  bool    // cur is on trial
	from   wire.Codec
	before float64 // rate before the trial
	hold   int     // intervals until something may be tried
	vain   int     // trials in vain, in a row
	age    int     // intervals since cur was chosen

	took [3]uint64 // bytes of memory by codec
}

// estimate is what is known of a codec.
type estimate struct {
	ratio float64 // compressed to plain
	rate  float64 // of one core, bytes of memory per second
	n     int
}

func newAdapter(c Compression) *adapter {
	a := &adapter{auto: c.Auto, cur: c.Codec}
	if a.auto {
		a.cur = wire.CodecNone
		a.codecs = c.Codecs
	}
	return a
}

// wants says by which codecs a sample of the next chunk of n bytes is to be taken.
func (a *adapter) wants(n int) []wire.Codec {
	if !a.auto || n < leastCoded {
		return nil
	}
	if a.due -= int64(n); a.due > 0 {
		return nil
	}
	a.due = sampleEvery
	var cs []wire.Codec
	for _, c := range a.codecs {
		// A slow codec is only worth looking at on a slow link.
		if c == a.cur || c == wire.CodecZstd && (a.rate == 0 || a.rate > 256<<20) {
			continue
		}
		cs = append(cs, c)
	}
	return cs
}

// learn takes in that n bytes became so many in d of one core.
func (a *adapter) learn(c wire.Codec, n, coded int, d time.Duration) {
	e := &a.known[c]
	ratio, rate := float64(coded)/float64(n), float64(n)/max(d, time.Microsecond).Seconds()
	if e.n++; e.n == 1 {
		e.ratio, e.rate = ratio, rate
		return
	}
	e.ratio += (ratio - e.ratio) * 0.3
	e.rate += (rate - e.rate) * 0.3
}

// wait takes in that the sender waited for the window.
func (a *adapter) wait(d time.Duration) { a.waited += d }

// pause ends an interval: there was nothing to send.
func (a *adapter) pause() { a.begun = time.Time{} }

// arrived takes in that a chunk was applied: n bytes of memory, so many of the
// wire, sent when codec was the choice.
func (a *adapter) arrived(now time.Time, codec wire.Codec, n, onWire int) {
	a.took[codec] += uint64(n)
	if !a.auto || codec != a.cur {
		return // sent before the choice
	}
	if a.begun.IsZero() {
		a.begun, a.memory, a.wire, a.waited = now, 0, 0, 0
		return
	}
	a.memory += int64(n)
	a.wire += int64(onWire)
	d := now.Sub(a.begun)
	if d < intervalLeast || a.memory < intervalBytes && d < intervalMost {
		return
	}
	a.rate = float64(a.memory) / d.Seconds()
	link, bound := float64(a.wire)/d.Seconds(), a.waited*4 >= d
	a.pause()
	a.decide(link, bound)
}

// decide chooses after an interval in which the link carried so many bytes per
// second; bound says that the sender waited for it.
func (a *adapter) decide(link float64, bound bool) {
	a.age++
	if a.trial {
		a.trial = false
		if a.rate < a.before*gain && a.cur != wire.CodecNone {
			a.vain++
			a.hold = min(4<<min(a.vain, 10), maxHold)
			a.choose(a.from)
			return
		}
		a.vain = 0
	}
	if a.cur != wire.CodecNone && a.age >= recheck {
		a.choose(wire.CodecNone)
		return
	}
	if a.hold > 0 {
		a.hold--
		return
	}
	if !bound {
		return
	}
	best, promise := a.cur, a.rate*worth
	for _, c := range a.codecs {
		e := a.known[c]
		if c == a.cur || e.n == 0 {
			continue
		}
		if p := min(e.rate, link/max(e.ratio, 0.01)); p > promise {
			best, promise = c, p
		}
	}
	if best != a.cur {
		a.trial, a.from, a.before = true, a.cur, a.rate
		a.choose(best)
	}
}

func (a *adapter) choose(c wire.Codec) { a.cur, a.age = c, 0 }

// text says for people how the chunks travelled.
func (a *adapter) text() string {
	if !a.auto {
		return a.cur.String()
	}
	var all uint64
	for _, n := range a.took {
		all += n
	}
	var parts []string
	for _, c := range []wire.Codec{wire.CodecS2, wire.CodecZstd} {
		if n := a.took[c]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s for %d %%", c, (100*n+all/2)/all))
		}
	}
	if len(parts) > 0 {
		return "auto: " + strings.Join(parts, ", ")
	}
	s := "auto: none"
	if i := slices.IndexFunc(a.codecs, func(c wire.Codec) bool { return a.known[c].n > 0 }); i >= 0 {
		e := a.known[a.codecs[i]]
		s += fmt.Sprintf(" (%s would make %.0f %% of it at %.0f MB/s a core", a.codecs[i], 100*e.ratio, e.rate/1e6)
		if a.rate > 0 {
			s += fmt.Sprintf(", memory arrives at %.0f MB/s", a.rate/1e6)
		}
		s += ")"
	}
	return s
}
