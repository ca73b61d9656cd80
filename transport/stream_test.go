package transport

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"godwit/wire"
)

func TestStreamOverBadLinks(t *testing.T) {
	flip := func(rng *rand.Rand, f []byte) []byte {
		f[rng.IntN(len(f))] ^= 1 << rng.IntN(8)
		return f
	}
	tests := []struct {
		name  string
		lanes int
		fault func(rng *rand.Rand) func(string, []byte) [][]byte
	}{
		{"clean", 2, func(*rand.Rand) func(string, []byte) [][]byte { return nil }},
		{"one lane, loss", 1, func(rng *rand.Rand) func(string, []byte) [][]byte {
			return func(s string, f []byte) [][]byte {
				if isLane(s) && rng.IntN(20) == 0 {
					return nil
				}
				return [][]byte{f}
			}
		}},
		{"loss everywhere", 3, func(rng *rand.Rand) func(string, []byte) [][]byte {
			return func(_ string, f []byte) [][]byte {
				if rng.IntN(15) == 0 {
					return nil
				}
				return [][]byte{f}
			}
		}},
		{"doubled", 2, func(rng *rand.Rand) func(string, []byte) [][]byte {
			return func(_ string, f []byte) [][]byte {
				if rng.IntN(3) == 0 {
					return [][]byte{f, f}
				}
				return [][]byte{f}
			}
		}},
		{"damaged", 2, func(rng *rand.Rand) func(string, []byte) [][]byte {
			left := maxCorrupt / 2
			return func(s string, f []byte) [][]byte {
				// Byte 4 is the version: another one there is no accident.
				if isLane(s) && left > 0 && rng.IntN(10) == 0 {
					left--
					if g := flip(rng, append([]byte(nil), f...)); g[4] == f[4] {
						return [][]byte{g}
					}
				}
				return [][]byte{f}
			}
		}},
		{"reordered", 2, func(rng *rand.Rand) func(string, []byte) [][]byte {
			late := map[string][]byte{}
			return func(s string, f []byte) [][]byte {
				if l := late[s]; l != nil {
					delete(late, s)
					return [][]byte{f, l}
				}
				if rng.IntN(10) == 0 {
					late[s] = f
					return nil
				}
				return [][]byte{f}
			}
		}},
		{"old frames again much later", 2, func(rng *rand.Rand) func(string, []byte) [][]byte {
			var old [][]byte
			return func(s string, f []byte) [][]byte {
				if !isLane(s) {
					return [][]byte{f}
				}
				out := [][]byte{f}
				if len(old) > 0 && rng.IntN(4) == 0 {
					out = append(out, old[rng.IntN(len(old))])
				}
				if len(old) < 20 {
					old = append(old, f)
				}
				return out
			}
		}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newFakeNet()
			p := newPair(t, n, tc.lanes, 4096, 128<<10, fastTiming)
			n.mu.Lock()
			n.fault = tc.fault(rand.New(rand.NewPCG(1, 2)))
			n.mu.Unlock()
			transfer(t, p.s, p.r, 1500, 4096)
			t.Logf("sender %+v", p.s.Stats())
			t.Logf("receiver %+v", p.r.Stats())
		})
	}
}

// A probe that finds the tail lost must heal the stream long before the blind
// interval.
func TestStreamLostTail(t *testing.T) {
	tm := fastTiming
	tm.blind, tm.blindMax = time.Hour, time.Hour
	n := newFakeNet()
	p := newPair(t, n, 2, 4096, 128<<10, tm)
	lost := 0
	n.mu.Lock()
	n.fault = func(s string, f []byte) [][]byte {
		if h, _, err := wire.ParseFrame(f); err == nil && h.Type == wire.FrameEnd && lost < 3 {
			lost++
			return nil
		}
		return [][]byte{f}
	}
	n.mu.Unlock()
	transfer(t, p.s, p.r, 50, 4096)
	if lost != 3 {
		t.Errorf("%d ends were lost, want 3", lost)
	}
}

func TestStreamLinksComeAndGo(t *testing.T) {
	n := newFakeNet()
	p := newPair(t, n, 2, 4096, 64<<10, fastTiming)
	all := append([]*fakeLink{p.sCtl, p.rCtl}, append(p.sData, p.rData...)...)
	// While a receiver's link is down, what is sent to it is lost.
	n.mu.Lock()
	n.fault = func(s string, f []byte) [][]byte {
		var l *fakeLink
		switch {
		case strings.HasSuffix(s, ".lane0"):
			l = p.rData[0]
		case strings.HasSuffix(s, ".lane1"):
			l = p.rData[1]
		case strings.HasSuffix(s, ".ctl"):
			l = p.rCtl
		default:
			l = p.sCtl
		}
		if !l.up() {
			return nil
		}
		return [][]byte{f}
	}
	n.mu.Unlock()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		rng := rand.New(rand.NewPCG(3, 4))
		for {
			l := all[rng.IntN(len(all))]
			l.set(true)
			select {
			case <-time.After(time.Duration(rng.IntN(8)) * time.Millisecond):
			case <-stop:
			}
			l.set(false)
			select {
			case <-time.After(time.Duration(rng.IntN(30)) * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	transfer(t, p.s, p.r, 3000, 4096)
	close(stop)
	<-stopped
	if p.s.Stats().Rewinds == 0 {
		t.Error("the sender never went back: the links did not fail while it sent")
	}
}

func TestStreamErrors(t *testing.T) {
	send := func(t *testing.T, p *pair, subject string, h wire.FrameHeader, body []byte) {
		t.Helper()
		if err := p.sCtl.send(subject, h.Frame(body)); err != nil {
			t.Fatal(err)
		}
	}
	// dataHeader is for frames that the sender knows nothing of; it must not
	// hear of them by acknowledgements.
	dataHeader := func(p *pair) wire.FrameHeader {
		p.net.mu.Lock()
		defer p.net.mu.Unlock()
		p.net.fault = func(_ string, f []byte) [][]byte {
			if h, _, err := wire.ParseFrame(f); err == nil && h.Type == wire.FrameAck {
				return nil
			}
			return [][]byte{f}
		}
		return wire.FrameHeader{Type: wire.FrameData, Lanes: 1, Stream: p.s.stream, Session: p.s.session}
	}
	short := fastTiming
	short.idle = time.Second // more than a busy machine needs to begin
	short.heartbeat = 10 * time.Millisecond
	tests := []struct {
		name     string
		do       func(t *testing.T, p *pair)
		sender   error // nil: not looked at
		receiver error
		text     string // part of the first of them
		timing   timing
	}{
		{"sender aborts", func(_ *testing.T, p *pair) {
			p.s.Abort(wire.Errorf(wire.Code_CODE_ABORTED, "pid 12 died"))
		}, nil, ErrPeerAborted, "agent alpha: the other end aborted the stream: pid 12 died", fastTiming},
		{"receiver aborts", func(_ *testing.T, p *pair) {
			p.r.Abort(errors.New("no memory left"))
		}, ErrPeerAborted, nil, "agent beta: the other end aborted the stream: no memory left", fastTiming},
		{"receiver closed before the end", func(t *testing.T, p *pair) {
			if err := p.r.Close(t.Context()); err != nil {
				t.Errorf("close: %v", err)
			}
		}, ErrPeerAborted, ErrClosed, "", fastTiming},
		{"foreign stream", func(t *testing.T, p *pair) {
			h := dataHeader(p)
			h.Stream++
			send(t, p, "s.lane0", h, []byte("x"))
		}, ErrPeerAborted, wire.ErrForeign, "", fastTiming},
		{"version", func(t *testing.T, p *pair) {
			f := dataHeader(p).Frame([]byte("x"))
			f[4]++
			if err := p.sCtl.send("s.lane0", f); err != nil {
				t.Fatal(err)
			}
		}, ErrPeerAborted, wire.ErrFrameVersion, "", fastTiming},
		{"window overrun", func(t *testing.T, p *pair) {
			for i := range uint64(100) {
				h := dataHeader(p)
				h.Seq = i
				send(t, p, "s.lane0", h, make([]byte, 4096))
			}
		}, ErrPeerAborted, ErrWindow, "", fastTiming},
		{"too many damaged frames", func(t *testing.T, p *pair) {
			for range maxCorrupt + 1 {
				f := dataHeader(p).Frame([]byte("x"))
				f[len(f)-1] ^= 1
				if err := p.sCtl.send("s.lane0", f); err != nil {
					t.Fatal(err)
				}
			}
		}, ErrPeerAborted, wire.ErrCorrupt, "", fastTiming},
		{"end does not add up", func(t *testing.T, p *pair) {
			h := dataHeader(p)
			h.Type = wire.FrameEnd
			send(t, p, "s.lane0", h, wire.FrameTotal{Chunks: 1}.Append(nil))
		}, ErrPeerAborted, ErrTotal, "", fastTiming},
		{"chunk after the end", func(t *testing.T, p *pair) {
			h := dataHeader(p)
			h.Type = wire.FrameEnd
			h.Seq = 0
			p.r.mu.Lock()
			p.r.deliver = 5 // Recv does not look at the end yet
			p.r.mu.Unlock()
			send(t, p, "s.lane0", h, newTally().total().Append(nil))
			h = dataHeader(p)
			h.Seq = 1
			send(t, p, "s.lane0", h, []byte("x"))
		}, ErrPeerAborted, ErrProtocol, "", fastTiming},
		{"receiver restarted", func(t *testing.T, p *pair) {
			h := wire.FrameHeader{Type: wire.FrameAck, Lanes: 1, Stream: p.s.stream, Session: 1}
			send(t, p, "s.ack", h, wire.AckBody{Peer: p.s.session, Window: 1 << 20, Next: []uint64{0}}.Append(nil))
		}, ErrPeerRestarted, ErrPeerAborted, "", fastTiming},
		{"acknowledges what was never sent", func(t *testing.T, p *pair) {
			h := wire.FrameHeader{Type: wire.FrameAck, Lanes: 1, Stream: p.s.stream, Session: p.r.session, Seq: 1 << 40}
			send(t, p, "s.ack", h, wire.AckBody{Peer: p.s.session, Window: 1 << 20, Next: []uint64{1 << 40}}.Append(nil))
		}, ErrProtocol, ErrPeerAborted, "", fastTiming},
		{"nothing gets through any more", func(_ *testing.T, p *pair) {
			p.net.mu.Lock()
			p.net.fault = func(string, []byte) [][]byte { return nil }
			p.net.mu.Unlock()
		}, ErrPeerSilent, ErrPeerSilent, "agent beta: nothing is heard of the other end for ", short},
		{"own connections are down", func(_ *testing.T, p *pair) {
			for _, l := range []*fakeLink{p.sCtl, p.rCtl, p.sData[0], p.rData[0]} {
				l.set(true)
			}
		}, ErrDisconnected, ErrDisconnected, "not connected to the bus for ", short},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, newFakeNet(), 1, 4096, 64<<10, tc.timing)
			tc.do(t, p)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if tc.receiver != nil {
				var err error
				for err == nil {
					_, err = p.r.Recv(ctx)
				}
				if !errors.Is(err, tc.receiver) || tc.sender == nil && !strings.Contains(err.Error(), tc.text) {
					t.Errorf("receiver: %v, want %v with %q", err, tc.receiver, tc.text)
				}
			}
			if tc.sender != nil {
				var err error
				for err == nil {
					err = p.s.Write(ctx, make([]byte, 100))
				}
				if !errors.Is(err, tc.sender) || !strings.Contains(err.Error(), tc.text) {
					t.Errorf("sender: %v, want %v with %q", err, tc.sender, tc.text)
				}
			}
		})
	}
}

func TestStreamOpen(t *testing.T) {
	tm := fastTiming
	tm.open = 50 * time.Millisecond
	n := newFakeNet()
	cfg := SenderConfig{Subject: "s", ID: "id", Peer: "agent beta"}
	_, err := newSender(t.Context(), cfg, nil, []link{n.link()}, n.link(), tm)
	if !errors.Is(err, ErrPeerSilent) || !strings.Contains(err.Error(), "agent beta") {
		t.Errorf("without a receiver: %v, want ErrPeerSilent", err)
	}
	p := newPair(t, n, 1, 0, 0, fastTiming)
	if _, err := newSender(t.Context(), cfg, nil, []link{n.link()}, n.link(), fastTiming); !errors.Is(err, ErrBusy) {
		t.Errorf("second sender: %v, want ErrBusy", err)
	}
	transfer(t, p.s, p.r, 20, 1000) // the first one is not disturbed

	r, err := newReceiver(ReceiverConfig{Subject: "u", ID: "u", Peer: "agent alpha"}, nil, []link{n.link()}, n.link(), tm)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Recv(t.Context()); !errors.Is(err, ErrPeerSilent) || !strings.Contains(err.Error(), "agent alpha") {
		t.Errorf("without a sender: %v, want ErrPeerSilent", err)
	}
	r.Abort(nil)
}

// An idle sender whose owner is busy elsewhere must not be taken for dead, nor
// a receiver that applies slowly.
func TestStreamIdleButAlive(t *testing.T) {
	tm := fastTiming
	tm.idle, tm.blind, tm.blindMax = time.Second, 20*time.Second, 20*time.Second
	p := newPair(t, newFakeNet(), 2, 4096, 64<<10, tm)
	ctx := t.Context()
	if err := p.s.Write(ctx, []byte("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.r.Recv(ctx); err != nil {
		t.Fatal(err)
	}
	<-time.After(2 * tm.idle)
	p.r.Release()
	if err := p.s.Write(ctx, []byte("b")); err != nil {
		t.Fatal(err)
	}
	if got, err := p.r.Recv(ctx); err != nil || string(got) != "b" {
		t.Fatalf("%q, %v", got, err)
	}
	if n := p.s.Stats().Rewinds; n != 0 {
		t.Errorf("the sender went back %d times for nothing", n)
	}
}

func TestStreamSlowConsumerBoundsTheSender(t *testing.T) {
	const window = 64 << 10
	p := newPair(t, newFakeNet(), 2, 4096, window, fastTiming)
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	n := 0
	var err error
	for ; err == nil; n++ {
		err = p.s.Write(ctx, make([]byte, 4000))
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("write into a full window: %v", err)
	}
	if most := window/4000 + 1; n > most {
		t.Errorf("%d chunks of 4000 bytes fit into a window of %d", n, window)
	}
	// As soon as the consumer releases, it goes on.
	got := make(chan error, 1)
	go func() { got <- p.s.Write(t.Context(), make([]byte, 4000)) }()
	for range 6 {
		if _, err := p.r.Recv(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.r.Release()
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestStreamCloseWaitsUntilApplied(t *testing.T) {
	p := newPair(t, newFakeNet(), 2, 4096, 64<<10, fastTiming)
	if err := p.s.Write(t.Context(), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.r.Recv(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Millisecond)
	defer cancel()
	if err := p.s.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("close before the chunk was released: %v", err)
	}
	if _, err := p.r.Recv(t.Context()); err != io.EOF {
		t.Fatal(err)
	}
	p.r.Release()
	if err := p.s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.r.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.s.Write(t.Context(), []byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	p.s.Abort(nil) // nothing left to abort
}

func TestStreamBuffers(t *testing.T) {
	p := newPair(t, newFakeNet(), 1, 4096, 64<<10, fastTiming)
	if p.s.MaxChunk() != 4096 {
		t.Fatalf("MaxChunk %d", p.s.MaxChunk())
	}
	if _, err := p.s.Buffer(t.Context(), 4097); err == nil {
		t.Error("a buffer beyond MaxChunk was given")
	}
	a, err := p.s.Buffer(t.Context(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.s.Buffer(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	p.s.Discard(b)
	p.s.Discard(b) // a second time changes nothing
	copy(a.Bytes(), "hello")
	a.Trim(5)
	if err := p.s.Send(a); err != nil {
		t.Fatal(err)
	}
	got, err := p.r.Recv(t.Context())
	if err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
	p.r.Release()
	if err := p.s.Write(t.Context()); err != nil { // an empty chunk is one, too
		t.Fatal(err)
	}
	if got, err = p.r.Recv(t.Context()); err != nil || len(got) != 0 {
		t.Fatalf("%q, %v", got, err)
	}
}

// Whatever is reserved, sent, dropped and released, and in which order: neither
// end holds more than the window, and in the end nothing is held.
func TestWindowAccounting(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		window := rapid.IntRange(minWindow, 4*minWindow).Draw(rt, "window")
		lanes := rapid.IntRange(1, 4).Draw(rt, "lanes")
		n := newFakeNet()
		lose := rapid.IntRange(0, 10).Draw(rt, "loss percent")
		p := newPair(t, n, lanes, 8<<10, window, fastTiming)
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		n.mu.Lock()
		n.fault = func(_ string, f []byte) [][]byte {
			if rng.IntN(100) < lose {
				return nil
			}
			return [][]byte{f}
		}
		n.mu.Unlock()
		check := func() {
			p.s.mu.Lock()
			used := p.s.used
			p.s.mu.Unlock()
			p.r.mu.Lock()
			held := p.r.held
			p.r.mu.Unlock()
			if used < 0 || used > p.s.window || held < 0 || held > p.r.window {
				rt.Fatalf("sender holds %d of %d, receiver %d of %d", used, p.s.window, held, p.r.window)
			}
		}
		ops := rapid.SliceOfN(rapid.IntRange(0, 8<<10), 1, 60).Draw(rt, "sizes")
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			for i, size := range ops {
				b, err := p.s.Buffer(ctx, size)
				if err != nil {
					rt.Errorf("buffer: %v", err)
					return
				}
				check()
				switch i % 3 {
				case 0:
					b.Trim(size / 2)
				case 1:
					if i%2 == 0 {
						p.s.Discard(b)
						continue
					}
				}
				if err := p.s.Send(b); err != nil {
					rt.Errorf("send: %v", err)
					return
				}
			}
			if err := p.s.Close(ctx); err != nil {
				rt.Errorf("close: %v", err)
			}
		})
		pending := 0
		for {
			_, err := p.r.Recv(ctx)
			if err != nil {
				if err != io.EOF {
					rt.Errorf("recv: %v", err)
				}
				break
			}
			check()
			// Hold back a few, as a consumer that applies in batches does.
			for pending++; pending > 3; pending-- {
				p.r.Release()
			}
		}
		for ; pending > 0; pending-- {
			p.r.Release()
		}
		wg.Wait()
		p.s.mu.Lock()
		used, left := p.s.used, len(p.s.entries)
		p.s.mu.Unlock()
		p.r.mu.Lock()
		held := p.r.held
		p.r.mu.Unlock()
		if diff := cmp.Diff([]int64{0, 0, 0}, []int64{used, int64(left), held}); diff != "" {
			rt.Errorf("left in the window (sender bytes, sender chunks, receiver bytes): %s", diff)
		}
		p.s.Abort(nil)
		p.r.Abort(nil)
	})
}

func TestLimiter(t *testing.T) {
	l := limiter{rate: 1 << 20}
	now := time.Unix(100, 0)
	var waited time.Duration
	for range 64 {
		w := l.reserve(64<<10, now)
		now = now.Add(w)
		waited += w
	}
	// 4 MiB at 1 MiB/s, less what the bucket held and the last frame's own time.
	if want := 4*time.Second - 62500*time.Microsecond - 50*time.Millisecond; waited != want {
		t.Errorf("waited %s, want %s", waited, want)
	}
	free := limiter{}
	if w := free.reserve(1<<30, now); w != 0 {
		t.Errorf("no cap, waited %s", w)
	}
}

func TestMeter(t *testing.T) {
	var m meter
	now := time.Unix(100, 0)
	m.add(0, now)
	for range 100 {
		now = now.Add(100 * time.Millisecond)
		m.add(1000, now)
		m.sample(now)
	}
	if got := m.perSecond(now); got < 9900 || got > 10100 {
		t.Errorf("steady 10,000 B/s measured as %d", got)
	}
	for range 50 {
		now = now.Add(100 * time.Millisecond)
		m.sample(now)
	}
	if got := m.perSecond(now); got > 100 {
		t.Errorf("after 5 s of silence the rate is still %d", got)
	}
}

func TestFramePool(t *testing.T) {
	for _, n := range []int{0, 1, 1 << 10, 1<<10 + 1, 65536, wire.FrameHeaderLen + MaxChunkSize, 1 << 20} {
		b := getFrame(n)
		if len(b) != n {
			t.Errorf("a frame of %d has %d bytes", n, len(b))
		}
		putFrame(b)
	}
}

func TestStalledTimeDoesNotCount(t *testing.T) {
	tm := timings(8*time.Second, 0)
	now := time.Unix(100, 0)
	for gap, want := range map[time.Duration]time.Duration{
		tm.tick:          0,
		time.Second:      0,
		2 * time.Second:  2 * time.Second,
		60 * time.Second: 60 * time.Second,
	} {
		if got := tm.stalled(now, now.Add(gap)); got != want {
			t.Errorf("ticks %s apart: %s do not count, want %s", gap, got, want)
		}
	}
}
