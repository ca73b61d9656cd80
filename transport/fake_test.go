package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeNet is a bus in memory on which frames can be lost, damaged, doubled and
// reordered.
type fakeNet struct {
	mu   sync.Mutex
	subs map[string][]*fakeSub
	// fault says what arrives in place of a frame; nil: the frame itself.
	fault func(subject string, frame []byte) [][]byte
}

func newFakeNet() *fakeNet { return &fakeNet{subs: map[string][]*fakeSub{}} }

type fakeSub struct {
	mu     sync.Mutex
	cond   *sync.Cond
	queue  [][]byte
	closed bool
}

type fakeLink struct {
	net  *fakeNet
	mu   sync.Mutex
	n    uint64
	down bool
	max  int
}

func (n *fakeNet) link() *fakeLink { return &fakeLink{net: n, max: 1 << 20} }

var errDown = errors.New("link is down")

func (l *fakeLink) send(subject string, frame []byte) error {
	l.mu.Lock()
	down := l.down
	l.mu.Unlock()
	if down {
		return errDown
	}
	n := l.net
	n.mu.Lock()
	defer n.mu.Unlock()
	out := [][]byte{bytes.Clone(frame)}
	if n.fault != nil {
		out = n.fault(subject, out[0])
	}
	for _, s := range n.subs[subject] {
		s.mu.Lock()
		for _, f := range out {
			s.queue = append(s.queue, bytes.Clone(f))
		}
		s.cond.Signal()
		s.mu.Unlock()
	}
	return nil
}

func (l *fakeLink) subscribe(subject string, fn func([]byte)) (func(), error) {
	s := &fakeSub{}
	s.cond = sync.NewCond(&s.mu)
	go func() {
		for {
			s.mu.Lock()
			for len(s.queue) == 0 && !s.closed {
				s.cond.Wait()
			}
			if s.closed {
				s.mu.Unlock()
				return
			}
			f := s.queue[0]
			s.queue = s.queue[1:]
			s.mu.Unlock()
			fn(f)
		}
	}()
	l.net.mu.Lock()
	l.net.subs[subject] = append(l.net.subs[subject], s)
	l.net.mu.Unlock()
	return func() {
		s.mu.Lock()
		s.closed = true
		s.cond.Signal()
		s.mu.Unlock()
	}, nil
}

func (l *fakeLink) lives() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

func (l *fakeLink) up() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.down
}

func (l *fakeLink) set(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down && !down {
		l.n++
	}
	l.down = down
}

func (l *fakeLink) maxPayload() int { return l.max }
func (l *fakeLink) close()          {}

var fastTiming = timing{
	tick:      2 * time.Millisecond,
	heartbeat: 20 * time.Millisecond,
	probe:     10 * time.Millisecond,
	blind:     100 * time.Millisecond,
	blindMax:  400 * time.Millisecond,
	idle:      20 * time.Second,
	open:      20 * time.Second,
}

// pair opens a stream over fake links.
type pair struct {
	net        *fakeNet
	sData      []*fakeLink
	rData      []*fakeLink
	sCtl, rCtl *fakeLink
	// Of a pair with a direct lane.
	sDirect, rDirect []*fakeLink
	direct           *fakeNet
	s                *Sender
	r                *Receiver
}

func links(ls []*fakeLink) []link {
	out := make([]link, len(ls))
	for i, l := range ls {
		out[i] = l
	}
	return out
}

func newPair(t testing.TB, n *fakeNet, lanes, chunk, window int, tm timing) *pair {
	t.Helper()
	return newPairBy(t, n, nil, SenderConfig{Lanes: lanes, ChunkSize: chunk, Window: window}, tm)
}

// newPairBy opens a stream with a direct lane over the net direct; nil: without.
func newPairBy(t testing.TB, n, direct *fakeNet, cfg SenderConfig, tm timing) *pair {
	t.Helper()
	lanes, window := cfg.Lanes, cfg.Window
	p := &pair{net: n, direct: direct, sCtl: n.link(), rCtl: n.link()}
	for range lanes {
		p.sData = append(p.sData, n.link())
		p.rData = append(p.rData, n.link())
		if direct != nil {
			p.sDirect = append(p.sDirect, direct.link())
			p.rDirect = append(p.rDirect, direct.link())
		}
	}
	var err error
	p.r, err = newReceiver(ReceiverConfig{Subject: "s", ID: "id", Lanes: lanes, Window: window, Peer: "agent alpha"}, links(p.rDirect), links(p.rData), p.rCtl, tm)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Subject, cfg.ID, cfg.Peer = "s", "id", "agent beta"
	p.s, err = newSender(t.Context(), cfg, links(p.sDirect), links(p.sData), p.sCtl, tm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.s.Abort(nil)
		p.r.Abort(nil)
	})
	return p
}

// testChunk is chunk i of a stream: its size and bytes follow from i and seed.
func testChunk(seed uint64, i uint64, most int) []byte {
	rng := rand.New(rand.NewPCG(seed, i))
	n := 0
	switch rng.IntN(4) {
	case 0:
		n = rng.IntN(64)
	case 1:
		n = most
	default:
		n = rng.IntN(most + 1)
	}
	b := make([]byte, n)
	var w [8]byte
	for j := 0; j < n; j += 8 {
		binary.LittleEndian.PutUint64(w[:], rng.Uint64())
		copy(b[j:], w[:])
	}
	return b
}

// transfer moves n chunks and checks that they arrive in order, whole, once.
func transfer(t testing.TB, s *Sender, r *Receiver, n uint64, most int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	sent := make(chan error, 1)
	go func() {
		for i := range n {
			c := testChunk(7, i, most)
			if err := s.Write(ctx, c[:len(c)/2], c[len(c)/2:]); err != nil {
				sent <- err
				return
			}
		}
		sent <- s.Close(ctx)
	}()
	var bytesGot uint64
	for i := range n {
		got, err := r.Recv(ctx)
		if err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if want := testChunk(7, i, most); !bytes.Equal(got, want) {
			t.Fatalf("chunk %d differs: %d bytes, want %d", i, len(got), len(want))
		}
		bytesGot += uint64(len(got))
		r.Release()
	}
	if _, err := r.Recv(ctx); err != io.EOF {
		t.Fatalf("after the last chunk: %v, want io.EOF", err)
	}
	if err := <-sent; err != nil {
		t.Fatalf("sender: %v", err)
	}
	if err := r.Close(ctx); err != nil {
		t.Fatalf("close the receiver: %v", err)
	}
	ss, rs := s.Stats(), r.Stats()
	if ss.Chunks != n || rs.Chunks != n || ss.Bytes != bytesGot || rs.Bytes != bytesGot {
		t.Errorf("stats: sender %d chunks %d bytes, receiver %d and %d, want %d and %d", ss.Chunks, ss.Bytes, rs.Chunks, rs.Bytes, n, bytesGot)
	}
}

func isLane(subject string) bool { return strings.Contains(subject, ".lane") }
