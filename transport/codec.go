package transport

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"godwit/wire"
)

// ErrCodec: a chunk cannot be made again of what arrived.
var ErrCodec = errors.New("a compressed chunk cannot be read")

// leastCoded is what is not worth compressing, bytes.
const leastCoded = 4 << 10

// The coders of zstd are made when the first chunk needs one. Chunks are small, so
// are their windows: some 2 MiB for each that works at a time.
var (
	zstdEncoder = sync.OnceValues(func() (*zstd.Encoder, error) {
		return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(DefaultLanes),
			zstd.WithWindowSize(MaxChunkSize), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(false))
	})
	zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
		return zstd.NewReader(nil, zstd.WithDecoderConcurrency(DefaultLanes), zstd.WithDecoderMaxMemory(MaxChunkSize),
			zstd.WithDecoderMaxWindow(MaxChunkSize), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true))
	})
)

// encodedMost is how long a chunk of n bytes becomes at most; codecs that end up
// there are not used for it.
func encodedMost(n int) int { return max(s2.MaxEncodedLen(n), n+n/128+64) }

// squeeze compresses p into scratch, which has at least encodedMost(len(p)) bytes.
func squeeze(c wire.Codec, scratch, p []byte) ([]byte, error) {
	switch c {
	case wire.CodecS2:
		return s2.Encode(scratch, p), nil
	case wire.CodecZstd:
		enc, err := zstdEncoder()
		if err != nil {
			return nil, fmt.Errorf("compress by zstd: %w", err)
		}
		return enc.EncodeAll(p, scratch[:0]), nil
	}
	return nil, fmt.Errorf("compress by %s: there is no such codec", c)
}

// expand undoes squeeze: it fills dst, whose length is that of the chunk, and
// never writes or allocates more than that, whatever body claims. Errors wrap
// ErrCodec.
func expand(h wire.CodedHeader, dst, body []byte) error {
	switch h.Codec {
	case wire.CodecS2:
		n, err := s2.DecodedLen(body)
		if err == nil && n != len(dst) {
			err = fmt.Errorf("it holds %d bytes", n)
		}
		if err == nil {
			_, err = s2.Decode(dst, body)
		}
		if err != nil {
			return fmt.Errorf("%w: %d bytes by %s: %w", ErrCodec, len(dst), h.Codec, err)
		}
	case wire.CodecZstd:
		dec, err := zstdDecoder()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCodec, err)
		}
		out, err := dec.DecodeAll(body, dst[:0:len(dst)])
		if err == nil && len(out) != len(dst) {
			err = fmt.Errorf("it holds %d bytes", len(out))
		}
		if err != nil {
			return fmt.Errorf("%w: %d bytes by %s: %w", ErrCodec, len(dst), h.Codec, err)
		}
	default:
		return fmt.Errorf("%w: it is compressed by %s", ErrCodec, h.Codec)
	}
	if got := wire.BodyCRC(dst); got != h.CRC {
		return fmt.Errorf("%w: checksum %08x, computed %08x", ErrCodec, h.CRC, got)
	}
	return nil
}
