package transport

import (
	"fmt"
	"time"

	"godwit/wire"
)

// coder is what a lane compresses into; it is made when it is first needed.
type coder struct{ scratch []byte }

func (c *coder) room(n int) []byte {
	if m := encodedMost(n); len(c.scratch) < m {
		c.scratch = make([]byte, encodedMost(max(n, MaxChunkSize)))
	}
	return c.scratch
}

// compress makes the chunk of e smaller, if the adapter says so and it becomes
// smaller. It is done once for a chunk: what is sent again is the same.
//
// Preconditions: e is busy, so that its frame is the caller's alone.
func (s *Sender) compress(c *coder, e *entry) {
	if e.typ != wire.FrameData || e.coded {
		return
	}
	s.mu.Lock()
	codec, samples := s.adapt.cur, s.adapt.wants(e.n)
	s.mu.Unlock()
	p := e.frame[wire.FrameHeaderLen : wire.FrameHeaderLen+e.n]
	for _, sample := range samples {
		s.encode(c, sample, p[:min(len(p), sampleBytes)])
	}
	var frame, body []byte
	var crc uint32
	if codec != wire.CodecNone && e.n >= leastCoded {
		coded := s.encode(c, codec, p)
		if n := wire.CodedHeaderLen + len(coded); coded != nil && n <= e.n-e.n/16 {
			frame = getFrame(wire.FrameHeaderLen + n)
			wire.CodedHeader{Codec: codec, Length: uint32(e.n), CRC: e.crc}.Put(frame[wire.FrameHeaderLen:])
			body = frame[wire.FrameHeaderLen:]
			copy(body[wire.CodedHeaderLen:], coded)
			crc = wire.BodyCRC(body)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.coded, e.codec = true, codec
	if frame == nil {
		return
	}
	putFrame(e.frame)
	e.typ, e.frame, e.n, e.crc = wire.FrameCompressed, frame, len(body), crc
	s.used -= e.cost - cost(e.n)
	e.cost = cost(e.n)
	s.broadcast()
}

// encode compresses p and lets the adapter know how that went; nil: it cannot.
func (s *Sender) encode(c *coder, codec wire.Codec, p []byte) []byte {
	begin := time.Now()
	out, err := squeeze(codec, c.room(len(p)), p)
	took := time.Since(begin)
	if err != nil {
		s.log.Warn("chunks are not compressed", "error", err)
		return nil
	}
	s.mu.Lock()
	s.adapt.learn(codec, len(p), len(out), took)
	s.mu.Unlock()
	return out
}

// heardCut takes in what the receiver says of the direct connections. If there are
// others the stream goes on over these, from what the receiver has.
//
// Preconditions: mu is held.
func (s *Sender) heardCut(cut bool, now time.Time) {
	switch {
	case !cut:
		s.cut = time.Time{}
		return
	case s.cut.IsZero():
		s.cut = now
	}
	if s.only || len(s.spare) == 0 {
		return
	}
	s.idling, s.data, s.spare = s.data, s.spare, nil
	s.livesSum = livesOf(s.data)
	s.log.Warn("the direct connections are lost, going on over the cluster", "peer", s.peer, "chunk", s.base)
	s.rewind(fmt.Sprint(ErrCut))
}
