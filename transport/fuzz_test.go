package transport

import (
	"context"
	"encoding/binary"
	"io"
	"testing"
	"time"

	"godwit/wire"
)

// discard is a link that leads nowhere.
type discard struct{}

func (discard) send(string, []byte) error                      { return nil }
func (discard) subscribe(string, func([]byte)) (func(), error) { return func() {}, nil }
func (discard) lives() uint64                                  { return 0 }
func (discard) up() bool                                       { return true }
func (discard) maxPayload() int                                { return 1 << 20 }
func (discard) close()                                         {}

// FuzzPeer feeds both ends with sound frames whose fields a hostile or broken
// peer chose, 16 bytes of input a frame: no sequence of them may crash an end,
// make it hold more than its window or hand out a chunk that does not belong
// there.
func FuzzPeer(f *testing.F) {
	f.Add([]byte("\x05\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x05\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x01\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00" +
		"\x02\x01\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x04\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	tm := timing{tick: time.Hour, heartbeat: time.Hour, probe: time.Hour, blind: time.Hour, blindMax: time.Hour, idle: time.Hour, open: time.Hour}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := newReceiver(ReceiverConfig{Subject: "s", ID: "id", Window: minWindow}, nil, []link{discard{}}, discard{}, tm)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Abort(nil)
		s := &Sender{
			stream: wire.StreamKey("id"), session: 7, peer: "p", t: tm, log: logger(nil), ctl: discard{},
			stop: make(chan struct{}), changed: make(chan struct{}), window: minWindow, chunk: 4096, tally: newTally(), adapt: newAdapter(Compression{}),
		}
		s.opened(wire.FrameHeader{Session: 9, Lanes: 2}, wire.AckBody{Window: minWindow, Next: []uint64{0, 1}})
		for range 5 {
			if err := s.Write(t.Context(), []byte("some data")); err != nil {
				t.Fatal(err)
			}
		}
		var want uint64
		in = in[:min(len(in), 200*16)] // longer ones only take longer
		for ; len(in) >= 16; in = in[16:] {
			h := wire.FrameHeader{
				Type: wire.FrameType(in[0]), Lane: in[1], Lanes: in[2],
				Stream: wire.StreamKey("id"), Session: uint64(in[3]), Epoch: uint32(in[8]),
				Seq: uint64(binary.LittleEndian.Uint32(in[4:])),
			}
			body := make([]byte, binary.LittleEndian.Uint16(in[12:]))
			switch h.Type {
			case wire.FrameAck:
				h.Session = 9
				a := wire.AckBody{Peer: 7, Window: 1, Resend: in[9]&1 != 0, Done: in[9]&2 != 0}
				for i := range min(int(in[10]), wire.MaxLanes) {
					a.Next = append(a.Next, uint64(in[11])+uint64(i))
				}
				body = a.Append(nil)
			case wire.FrameEnd:
				body = wire.FrameTotal{Chunks: h.Seq}.Append(nil)
			}
			frame := h.Frame(body)
			r.onFrame(frame)
			s.onFrame(frame)
			r.mu.Lock()
			held, end := r.held, r.total
			r.mu.Unlock()
			if held < 0 || held > r.window {
				t.Fatalf("the receiver holds %d of %d", held, r.window)
			}
			s.mu.Lock()
			used := s.used
			s.mu.Unlock()
			if used < 0 || used > s.window {
				t.Fatalf("the sender holds %d of %d", used, s.window)
			}
			// Take one chunk if there is one.
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			switch _, err := r.Recv(ctx); {
			case err == nil:
				want++
				if r.Stats().Chunks != want {
					t.Fatalf("chunk %d was handed out as number %d", want, r.Stats().Chunks)
				}
				r.Release()
			case err == io.EOF && end == nil:
				t.Fatal("the stream ended without an end")
			}
		}
	})
}
