package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"godwit/transport/bus"
)

// startBus starts an embedded server on a free port and stops it with the test.
func startBus(t testing.TB, cfg bus.Config) *bus.Server {
	t.Helper()
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	if cfg.StoreDir == "" {
		cfg.StoreDir = t.TempDir()
	}
	b, err := bus.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Shutdown)
	return b
}

func connect(t testing.TB, url, name string) *nats.Conn {
	t.Helper()
	nc, err := Connect(Config{URLs: []string{url}, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// realPair opens a stream over a real server, each lane and each control with
// a connection of its own.
type realPair struct {
	sData, rData []*nats.Conn
	sCtl, rCtl   *nats.Conn
	s            *Sender
	r            *Receiver
}

func newRealPair(t testing.TB, url string, lanes int, cfg SenderConfig) *realPair {
	t.Helper()
	p := &realPair{sCtl: connect(t, url, "source control"), rCtl: connect(t, url, "destination control")}
	for range lanes {
		p.sData = append(p.sData, connect(t, url, "source data"))
		p.rData = append(p.rData, connect(t, url, "destination data"))
	}
	id := NewID()
	var err error
	p.r, err = NewReceiver(t.Context(), ReceiverConfig{Data: p.rData, Control: p.rCtl, Subject: StreamSubject(id), ID: id, Lanes: lanes, Window: cfg.Window, Peer: "agent alpha"})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Data, cfg.Control, cfg.Subject, cfg.ID, cfg.Lanes, cfg.Peer = p.sData, p.sCtl, StreamSubject(id), id, lanes, "agent beta"
	p.s, err = NewSender(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.s.Abort(nil)
		p.r.Abort(nil)
	})
	return p
}

// pump sends n numbered chunks and calls at with the number of each chunk that
// arrives, before it is released.
func pump(t testing.TB, p *realPair, n uint64, size int, at func(i uint64)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	sent := make(chan error, 1)
	pattern := bytes.Repeat([]byte("godwit.."), size/8)
	go func() {
		for i := range n {
			b, err := p.s.Buffer(ctx, size)
			if err != nil {
				sent <- err
				return
			}
			copy(b.Bytes(), pattern)
			binary.LittleEndian.PutUint64(b.Bytes(), i)
			if err := p.s.Send(b); err != nil {
				sent <- err
				return
			}
		}
		sent <- p.s.Close(ctx)
	}()
	for i := range n {
		got, err := p.r.Recv(ctx)
		if err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if len(got) != size || binary.LittleEndian.Uint64(got) != i || !bytes.Equal(got[8:], pattern[8:]) {
			t.Fatalf("chunk %d is not what was sent", i)
		}
		if at != nil {
			at(i)
		}
		p.r.Release()
	}
	if _, err := p.r.Recv(ctx); err != io.EOF {
		t.Fatalf("after the last chunk: %v", err)
	}
	if err := <-sent; err != nil {
		t.Fatalf("sender: %v", err)
	}
	if err := p.r.Close(ctx); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func TestRealStream(t *testing.T) {
	b := startBus(t, bus.Config{})
	for _, lanes := range []int{1, 2, 4} {
		notResent(t, fmt.Sprintf("nothing, with %d lanes,", lanes), func() *realPair {
			p := newRealPair(t, b.URL(), lanes, SenderConfig{})
			if p.s.MaxChunk() != MaxChunkSize {
				t.Errorf("MaxChunk %d", p.s.MaxChunk())
			}
			pump(t, p, 40, 256<<10, nil)
			if st := p.s.Stats(); st.WireBytes < st.Bytes {
				t.Errorf("%d lanes: %+v", lanes, st)
			}
			return p
		})
	}
}

func TestRealStreamSmallPayloads(t *testing.T) {
	b := startBus(t, bus.Config{MaxPayload: 64 << 10})
	p := newRealPair(t, b.URL(), 2, SenderConfig{})
	if got, want := p.s.MaxChunk(), 64<<10-48; got != want {
		t.Errorf("MaxChunk %d, want %d", got, want)
	}
	pump(t, p, 150, 64<<10-48, nil)
}

// The server is stopped and started again at the same port while a stream
// runs, three times.
func TestRealStreamServerRestart(t *testing.T) {
	dir := t.TempDir()
	b, err := bus.Start(bus.Config{Listen: "127.0.0.1:0", StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	listen := strings.TrimPrefix(b.URL(), "nats://")
	defer func() { b.Shutdown() }()
	p := newRealPair(t, b.URL(), 2, SenderConfig{})
	pump(t, p, 400, 32<<10, func(i uint64) {
		if i%100 != 50 || i > 300 {
			return
		}
		b.Shutdown()
		if b, err = bus.Start(bus.Config{Listen: listen, StoreDir: dir}); err != nil {
			t.Fatal(err)
		}
	})
	t.Logf("sender %+v", p.s.Stats())
	t.Logf("receiver %+v", p.r.Stats())
}

// Each connection in turn is cut while a stream runs.
func TestRealStreamReconnects(t *testing.T) {
	b := startBus(t, bus.Config{})
	p := newRealPair(t, b.URL(), 2, SenderConfig{})
	conns := []*nats.Conn{p.sData[0], p.rData[0], p.sCtl, p.rCtl, p.sData[1], p.rData[1]}
	pump(t, p, 600, 16<<10, func(i uint64) {
		if i%80 == 40 && len(conns) > 0 {
			if err := conns[0].ForceReconnect(); err != nil {
				t.Errorf("cut %s: %v", conns[0].Opts.Name, err)
			}
			conns = conns[1:]
		}
	})
	if len(conns) != 0 {
		t.Errorf("%d connections were not cut", len(conns))
	}
	t.Logf("sender %+v", p.s.Stats())
	t.Logf("receiver %+v", p.r.Stats())
}

// notResent runs a transfer after which nothing was sent again; a busy machine may
// cause that once, but not each time.
func notResent(t *testing.T, what string, transfer func() *realPair) {
	t.Helper()
	var n uint64
	for range 5 {
		if n = transfer().s.Stats().ResentBytes; n == 0 || t.Failed() {
			return
		}
	}
	t.Errorf("%s caused %d bytes to be sent again", what, n)
}

func TestRealStreamBandwidthCap(t *testing.T) {
	b := startBus(t, bus.Config{})
	const rate = 16 << 20
	notResent(t, "the cap", func() *realPair {
		p := newRealPair(t, b.URL(), 2, SenderConfig{Rate: rate})
		start := time.Now()
		pump(t, p, 64, 256<<10, nil) // 16 MiB
		if took := time.Since(start); took < 850*time.Millisecond {
			t.Errorf("16 MiB at 16 MiB/s took %s", took)
		}
		return p
	})
}

func TestRealStreamSlowConsumer(t *testing.T) {
	b := startBus(t, bus.Config{})
	notResent(t, "a slow consumer", func() *realPair {
		p := newRealPair(t, b.URL(), 2, SenderConfig{Window: 1 << 20})
		var most int64
		pump(t, p, 100, 128<<10, func(uint64) {
			p.r.mu.Lock()
			most = max(most, p.r.held)
			p.r.mu.Unlock()
			<-time.After(2 * time.Millisecond)
		})
		if most > 1<<20 {
			t.Errorf("the receiver held %d bytes of a window of %d", most, 1<<20)
		}
		return p
	})
}

// The other end's process dies: its connections close without a word.
func TestRealStreamPeerDies(t *testing.T) {
	b := startBus(t, bus.Config{})
	p := newRealPair(t, b.URL(), 1, SenderConfig{IdleTimeout: 400 * time.Millisecond})
	p.rCtl.Close()
	p.rData[0].Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var err error
	for err == nil {
		err = p.s.Write(ctx, make([]byte, 256<<10))
	}
	if !errors.Is(err, ErrPeerSilent) || !strings.Contains(err.Error(), "agent beta") {
		t.Errorf("%v, want ErrPeerSilent of agent beta", err)
	}
}

// BenchmarkStream prints the share of a raw TCP stream of the same run.
func BenchmarkStream(b *testing.B) {
	raw := rawTCP(b, 512<<20)
	srv := startBus(b, bus.Config{})
	for _, bc := range []struct {
		name  string
		lanes int
	}{{"lanes=1", 1}, {"lanes=2", 2}, {"lanes=4", 4}} {
		b.Run(bc.name, func(b *testing.B) {
			const size = MaxChunkSize
			p := newRealPair(b, srv.URL(), bc.lanes, SenderConfig{})
			b.SetBytes(size)
			b.ResetTimer()
			ctx := b.Context()
			done := make(chan error, 1)
			go func() {
				for {
					_, err := p.r.Recv(ctx)
					if err != nil {
						done <- err
						return
					}
					p.r.Release()
				}
			}()
			start := time.Now()
			for range b.N {
				buf, err := p.s.Buffer(ctx, size)
				if err != nil {
					b.Fatal(err)
				}
				if err := p.s.Send(buf); err != nil {
					b.Fatal(err)
				}
			}
			if err := p.s.Close(ctx); err != nil {
				b.Fatal(err)
			}
			if err := <-done; err != io.EOF {
				b.Fatal(err)
			}
			rate := float64(b.N) * size / time.Since(start).Seconds()
			b.ReportMetric(rate/raw, "of-raw-TCP")
			if err := p.r.Close(ctx); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// rawTCP is what a plain TCP stream does over loopback, bytes per second.
func rawTCP(b *testing.B, total int) float64 {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	got := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- err
			return
		}
		defer func() { _ = c.Close() }()
		buf := make([]byte, 512<<10)
		for n := 0; n < total; {
			m, err := c.Read(buf)
			if err != nil {
				got <- err
				return
			}
			n += m
		}
		got <- nil
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	buf := make([]byte, 512<<10)
	start := time.Now()
	for n := 0; n < total; n += len(buf) {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-got; err != nil {
		b.Fatal(err)
	}
	return float64(total) / time.Since(start).Seconds()
}
