package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"godwit/wire"
)

// soft is chunk i of a stream whose chunks compress to about a half, some not at all.
func soft(i uint64, n int) []byte {
	b := testChunk(3, i|1<<40, n)
	if i%5 != 4 {
		for j := range b {
			if j%64 < 40 {
				b[j] = byte(i)
			}
		}
	}
	return b
}

// carry moves n chunks of soft and returns how the sender's figures were. at is called before
// chunk i is sent.
func carry(t *testing.T, p *pair, n uint64, size int, at func(i uint64)) (Stats, Stats) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sent := make(chan error, 1)
	go func() {
		for i := range n {
			if at != nil {
				at(i)
			}
			if err := p.s.Write(ctx, soft(i, size)); err != nil {
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
		if !bytes.Equal(got, soft(i, size)) {
			t.Fatalf("chunk %d differs", i)
		}
		p.r.Release()
	}
	if _, err := p.r.Recv(ctx); err != io.EOF {
		t.Fatalf("after the last chunk: %v, want io.EOF", err)
	}
	if err := <-sent; err != nil {
		t.Fatalf("sender: %v", err)
	}
	if err := p.r.Close(ctx); err != nil {
		t.Fatal(err)
	}
	return p.s.Stats(), p.r.Stats()
}

// counted counts the frames of lanes on a net.
func counted(n *fakeNet) *atomic.Int64 {
	var c atomic.Int64
	n.fault = func(subject string, f []byte) [][]byte {
		if isLane(subject) {
			c.Add(1)
		}
		return [][]byte{f}
	}
	return &c
}

// TestCompression: chunks arrive as they were, those that compress take less of the
// wire, and what is sent again is counted once as memory.
func TestCompression(t *testing.T) {
	for _, codec := range []wire.Codec{wire.CodecNone, wire.CodecS2, wire.CodecZstd} {
		t.Run(codec.String(), func(t *testing.T) {
			n := newFakeNet()
			var lost atomic.Int64
			n.fault = func(subject string, f []byte) [][]byte {
				if isLane(subject) && lost.Add(1)%40 == 7 {
					return nil
				}
				return [][]byte{f}
			}
			p := newPairBy(t, n, nil, SenderConfig{Lanes: 2, ChunkSize: 64 << 10, Window: 1 << 20, Compression: Compression{Codec: codec}}, fastTiming)
			st, rst := carry(t, p, 300, 64<<10, nil)
			if st.Bytes != rst.Bytes || st.Rewinds == 0 {
				t.Errorf("sent %d bytes, %d arrived, %d rewinds", st.Bytes, rst.Bytes, st.Rewinds)
			}
			once := st.WireBytes - st.ResentBytes
			if codec == wire.CodecNone && once < st.Bytes || codec != wire.CodecNone && once > st.Bytes*3/4 {
				t.Errorf("%d bytes of the wire for %d of memory", once, st.Bytes)
			}
			p.s.mu.Lock()
			used, flying := p.s.used, p.s.flying
			p.s.mu.Unlock()
			if used != 0 || flying != 0 {
				t.Errorf("%d bytes of the window are in use after the end, %d of memory", used, flying)
			}
		})
	}
}

// TestCompressedWindow: however small chunks become, no more than two windows of memory wait to
// be taken by the receiver.
func TestCompressedWindow(t *testing.T) {
	const window, size = 1 << 20, 32 << 10
	p := newPairBy(t, newFakeNet(), nil, SenderConfig{Lanes: 2, ChunkSize: size, Window: window, Compression: Compression{Codec: wire.CodecS2}}, fastTiming)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	n := 0
	for p.s.Write(ctx, make([]byte, size)) == nil {
		n++
	}
	if got := n * size; got > 2*window || got < 2*window-2*size {
		t.Errorf("%d bytes were taken before the receiver took any, want about %d", got, 2*window)
	}
}

// TestDirect: chunks take the direct connections alone as long as these stand.
func TestDirect(t *testing.T) {
	cluster, direct := newFakeNet(), newFakeNet()
	over, straight := counted(cluster), counted(direct)
	p := newPairBy(t, cluster, direct, SenderConfig{Lanes: 2, ChunkSize: 16 << 10, Window: 1 << 20}, fastTiming)
	st, _ := carry(t, p, 200, 16<<10, nil)
	if over.Load() != 0 || straight.Load() < 200 || st.Detoured || st.ResentBytes != 0 {
		t.Errorf("%d frames over the cluster, %d directly, %d bytes again, detoured %v", over.Load(), straight.Load(), st.ResentBytes, st.Detoured)
	}
}

// TestDirectCut: when the direct connections are lost in the middle, the stream goes on
// over the cluster; nothing is sent again but what the receiver cannot have.
func TestDirectCut(t *testing.T) {
	for _, codec := range []wire.Codec{wire.CodecNone, wire.CodecS2} {
		t.Run(codec.String(), func(t *testing.T) {
			cluster, direct := newFakeNet(), newFakeNet()
			over := counted(cluster)
			var gone atomic.Bool
			direct.fault = func(_ string, f []byte) [][]byte {
				if gone.Load() {
					return nil
				}
				return [][]byte{f}
			}
			const window = 1 << 20
			p := newPairBy(t, cluster, direct, SenderConfig{Lanes: 2, ChunkSize: 16 << 10, Window: window, Compression: Compression{Codec: codec}}, fastTiming)
			st, _ := carry(t, p, 600, 16<<10, func(i uint64) {
				if i == 300 {
					// Frames get lost from now on; the receiver notices that its connections are.
					gone.Store(true)
					for _, l := range p.rDirect {
						l.set(true)
					}
				}
			})
			// Probes that got lost before may have led to a blind rewind, too.
			if !st.Detoured || st.ResentBytes > 3*window || over.Load() < 200 {
				t.Errorf("detoured %v, %d bytes again, %d frames over the cluster", st.Detoured, st.ResentBytes, over.Load())
			}
		})
	}
}

// TestDirectBack: a connection that is made again at once stays in use.
func TestDirectBack(t *testing.T) {
	cluster, direct := newFakeNet(), newFakeNet()
	over := counted(cluster)
	tm := fastTiming
	tm.probe = 5 * time.Second // a moment
	p := newPairBy(t, cluster, direct, SenderConfig{Lanes: 2, ChunkSize: 16 << 10, Window: 1 << 20}, tm)
	st, _ := carry(t, p, 600, 16<<10, func(i uint64) {
		if i == 300 {
			p.rDirect[0].set(true)
			time.Sleep(20 * time.Millisecond)
			p.rDirect[0].set(false)
		}
	})
	if st.Detoured || over.Load() != 0 {
		t.Errorf("detoured %v, %d frames over the cluster", st.Detoured, over.Load())
	}
}

// TestOnlyDirect: without leave to go on over the cluster the stream ends.
func TestOnlyDirect(t *testing.T) {
	tm := fastTiming
	tm.idle = 200 * time.Millisecond
	cluster, direct := newFakeNet(), newFakeNet()
	over := counted(cluster)
	p := newPairBy(t, cluster, direct, SenderConfig{Lanes: 2, ChunkSize: 16 << 10, Window: 1 << 20, OnlyDirect: true}, tm)
	direct.mu.Lock()
	direct.fault = func(string, []byte) [][]byte { return nil }
	direct.mu.Unlock()
	for _, l := range p.rDirect {
		l.set(true)
	}
	err := p.s.Write(t.Context(), soft(1, 1000))
	if err == nil {
		err = p.s.Close(t.Context())
	}
	if !errors.Is(err, ErrCut) || over.Load() != 0 {
		t.Errorf("%v, %d frames over the cluster; want %v", err, over.Load(), ErrCut)
	}
}

// TestBadCompressed: what is no compressed chunk ends the stream with the reason.
func TestBadCompressed(t *testing.T) {
	plain := bytes.Repeat([]byte("godwit"), 1000)
	good, err := squeeze(wire.CodecS2, make([]byte, encodedMost(len(plain))), plain)
	if err != nil {
		t.Fatal(err)
	}
	payload := func(codec wire.Codec, n int, crc uint32, body []byte) []byte {
		b := make([]byte, wire.CodedHeaderLen)
		wire.CodedHeader{Codec: codec, Length: uint32(n), CRC: crc}.Put(b)
		return append(b, body...)
	}
	sum := wire.BodyCRC(plain)
	for _, tc := range []struct {
		name, want string
		payload    []byte
	}{
		{"unknown codec", "codec 7, which this build does not know", payload(7, len(plain), sum, good)},
		{"too large", "at most 524288 are allowed", payload(wire.CodecS2, 1<<30, sum, good)},
		{"other length", "it holds 6000 bytes", payload(wire.CodecS2, 5000, sum, good)},
		{"other content", "checksum", payload(wire.CodecS2, len(plain), sum+1, good)},
		{"no block", "corrupt", payload(wire.CodecS2, len(plain), sum, bytes.Repeat([]byte{0xff}, 40))},
		{"no frame", "zstd", payload(wire.CodecZstd, len(plain), sum, good)},
		{"nothing", "compressed chunk of 12 bytes", payload(wire.CodecS2, len(plain), sum, nil)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := newReceiver(ReceiverConfig{Subject: "s", ID: "id", Window: 1 << 20}, nil, []link{discard{}}, discard{}, fastTiming)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Abort(nil)
			h := wire.FrameHeader{Type: wire.FramePing, Lanes: 1, Stream: wire.StreamKey("id"), Session: 1}
			r.onFrame(h.Frame(nil))
			h.Type = wire.FrameCompressed
			r.onFrame(h.Frame(tc.payload))
			_, err = r.Recv(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want something about %q", err, tc.want)
			}
		})
	}
}

// FuzzExpand: whatever claims to be a compressed chunk becomes a chunk of the size that it
// says, or an error.
func FuzzExpand(f *testing.F) {
	for _, c := range []wire.Codec{wire.CodecS2, wire.CodecZstd} {
		for _, n := range []int{1, 4096, 70000} {
			p := soft(uint64(n), n)
			if len(p) == 0 {
				p = []byte{1}
			}
			out, err := squeeze(c, make([]byte, encodedMost(len(p))), p)
			if err != nil {
				f.Fatal(err)
			}
			b := make([]byte, wire.CodedHeaderLen)
			wire.CodedHeader{Codec: c, Length: uint32(len(p)), CRC: wire.BodyCRC(p)}.Put(b)
			f.Add(append(b, out...))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		h, body, err := wire.ParseCoded(in, MaxChunkSize)
		if err != nil {
			return
		}
		room := make([]byte, h.Length+8)
		for i := range room[h.Length:] {
			room[int(h.Length)+i] = 0xa5
		}
		if err := expand(h, room[:h.Length], body); err == nil && wire.BodyCRC(room[:h.Length]) != h.CRC {
			t.Error("a chunk that is not what was sent")
		}
		if !bytes.Equal(room[h.Length:], bytes.Repeat([]byte{0xa5}, 8)) {
			t.Error("it wrote beyond the chunk")
		}
	})
}

// TestAdapter plays links and memory of many kinds against the choice.
func TestAdapter(t *testing.T) {
	const mb = 1e6
	for _, tc := range []struct {
		name         string
		link         float64 // bytes per second
		source       float64 // at which memory is there to be sent
		s2, zstd     estimate
		want         wire.Codec
		share        float64 // of memory that must have gone that way
		slowerAtMost float64 // than the best constant choice
	}{
		{"fast link", 2000 * mb, 1e12, estimate{ratio: 0.3, rate: 1000 * mb}, estimate{ratio: 0.2, rate: 300 * mb}, wire.CodecNone, 1, 1.01},
		{"incompressible", 100 * mb, 1e12, estimate{ratio: 1, rate: 9000 * mb}, estimate{ratio: 1, rate: 5000 * mb}, wire.CodecNone, 1, 1.01},
		{"middling link", 400 * mb, 1e12, estimate{ratio: 0.3, rate: 1000 * mb}, estimate{ratio: 0.2, rate: 300 * mb}, wire.CodecS2, 0.9, 1.1},
		{"slow link", 20 * mb, 1e12, estimate{ratio: 0.4, rate: 800 * mb}, estimate{ratio: 0.2, rate: 300 * mb}, wire.CodecZstd, 0.8, 1.2},
		{"slow source", 400 * mb, 100 * mb, estimate{ratio: 0.3, rate: 1000 * mb}, estimate{ratio: 0.2, rate: 300 * mb}, wire.CodecNone, 1, 1.01},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := newAdapter(Compression{Auto: true, Codecs: []wire.Codec{wire.CodecS2, wire.CodecZstd}})
			known := [3]estimate{{ratio: 1, rate: 1e12}, tc.s2, tc.zstd}
			rate := func(c wire.Codec) float64 {
				return min(tc.source, known[c].rate, tc.link/known[c].ratio)
			}
			now := time.Unix(0, 0)
			var by [3]float64
			const chunk, all = 512 << 10, 2 << 30
			for sent := 0; sent < all; sent += chunk {
				for _, c := range a.wants(chunk) {
					a.learn(c, sampleBytes, int(sampleBytes*known[c].ratio), time.Duration(sampleBytes/known[c].rate*1e9))
				}
				c := a.cur
				took := time.Duration(chunk / rate(c) * 1e9)
				now = now.Add(took)
				if rate(c) < tc.source {
					a.wait(took)
				}
				by[c] += chunk
				a.arrived(now, c, chunk, int(chunk*known[c].ratio))
			}
			if got := by[tc.want] / all; got < tc.share {
				t.Errorf("%.2f by %s, want %.2f at least; %s", got, tc.want, tc.share, a.text())
			}
			if best, took := all/max(rate(0), rate(1), rate(2)), now.Sub(time.Unix(0, 0)).Seconds(); took > best*tc.slowerAtMost {
				t.Errorf("it took %.2f s, the best constant choice %.2f s; %s", took, best, a.text())
			}
		})
	}
}

// TestAdapterVain: a codec that promises much and brings nothing is tried less and less.
func TestAdapterVain(t *testing.T) {
	a := newAdapter(Compression{Auto: true, Codecs: []wire.Codec{wire.CodecS2}})
	now := time.Unix(0, 0)
	var by [3]int
	for range 4096 {
		for _, c := range a.wants(512 << 10) {
			a.learn(c, sampleBytes, sampleBytes/4, sampleBytes) // 1 GB/s
		}
		c := a.cur
		now = now.Add(2 * time.Millisecond) // it is the receiver that takes so long
		a.wait(2 * time.Millisecond)
		by[c]++
		a.arrived(now, c, 512<<10, 512<<10>>(2*c))
	}
	if by[wire.CodecS2] == 0 || by[wire.CodecS2] > 4096/10 {
		t.Errorf("%d of 4096 chunks by s2", by[wire.CodecS2])
	}
}

// TestAdapterPauses: memory that comes now and then says nothing of the link.
func TestAdapterPauses(t *testing.T) {
	a := newAdapter(Compression{Auto: true, Codecs: []wire.Codec{wire.CodecS2}})
	a.learn(wire.CodecS2, 100, 30, 100)
	now, rng := time.Unix(0, 0), rand.New(rand.NewPCG(1, 1))
	for range 200 {
		a.pause()
		for range rng.IntN(6) {
			now = now.Add(time.Millisecond)
			a.wait(time.Millisecond)
			a.arrived(now, a.cur, 512<<10, 512<<10)
		}
		now = now.Add(time.Second)
	}
	if a.rate != 0 || a.cur != wire.CodecNone {
		t.Errorf("rate %.0f, codec %s", a.rate, a.cur)
	}
}
