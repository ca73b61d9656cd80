package agent

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"godwit/engine/image"
	"godwit/wire"
)

// maxItems bounds the memory of all items of one stream, bytes, encoded: what a
// destination keeps of a tree beside its data. A tree of a thousand processes
// has some 20 MiB.
const maxItems = 64 << 20

// chunkReader is the receiving end of a stream as the source sees it.
type chunkReader interface {
	// Recv returns the next chunk, io.EOF after the verified last.
	Recv(ctx context.Context) ([]byte, error)
	// Release tells that the oldest chunk that Recv gave has been applied.
	Release()
}

// streamSource reads what a streamSink sent. What comes from the other host is
// checked in full before it is used.
type streamSource struct {
	in       chunkReader
	complete func() error // called once when all entries are there; may be nil
	begun    func()       // called when something comes before the images; may be nil

	rest   []byte // of the chunk in hand
	inHand bool
	items  int              // bytes
	part   []byte           // of an item that goes on
	back   *wire.Item       // read, but not taken yet
	early  []image.DataKind // of which data may come before the images; nil: there is none

	set     *image.Set
	sealed  bool
	noData  bool // all data has come
	ended   *wire.StreamEnd
	entries uint64
	bytes   uint64
	pages   atomic.Uint64
}

var _ image.EarlySource = (*streamSource)(nil)

func newStreamSource(in chunkReader) *streamSource {
	return &streamSource{in: in, set: image.NewSet()}
}

// errStream is what a stream that breaks its rules is reported as.
var errStream = errors.New("the stream of the tree is malformed")

// hello waits for the stream's first item, at most so long.
func (s *streamSource) hello(ctx context.Context, patience time.Duration) (*wire.Hello, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, wire.Errorf(wire.Code_CODE_UNAVAILABLE, "the source did not start within %s", patience))
	defer cancel()
	it, _, _, err := s.next(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	h := it.GetHello()
	if h == nil {
		return nil, fmt.Errorf("%w: it does not start with a greeting", errStream)
	}
	return h, nil
}

// Early implements image.EarlySource.
func (s *streamSource) Early(ctx context.Context) (image.Early, error) {
	for {
		it, h, body, err := s.next(ctx)
		switch {
		case errors.Is(err, io.EOF) && s.early == nil:
			return image.Early{}, fmt.Errorf("%w: it ends among the images", errStream)
		case errors.Is(err, io.EOF):
			return image.Early{}, fmt.Errorf("%w: it ends before the images", errStream)
		case err != nil:
			return image.Early{}, err
		case it != nil:
			return s.earlyItem(it)
		case s.early == nil:
			return image.Early{}, fmt.Errorf("%w: data before the images are complete", errStream)
		}
		id, err := s.data(h, body, s.early...)
		if err != nil {
			return image.Early{}, err
		}
		if len(body) > 0 {
			return image.Early{ID: id, Off: h.Offset, Data: body}, nil
		}
	}
}

// earlyItem takes an item that comes before the images, or is the first of them.
func (s *streamSource) earlyItem(whole *wire.Item) (image.Early, error) {
	var x image.Early
	switch it := whole.Item.(type) {
	case *wire.Item_Outline:
		if slices.Contains(s.early, image.Memory) {
			return x, fmt.Errorf("%w: unexpected item %T after another", errStream, it)
		}
		x.Outline = &image.Outline{}
		if err := json.Unmarshal(it.Outline, x.Outline); err != nil {
			return x, fmt.Errorf("%w: outline: %w", errStream, err)
		}
		s.expect(image.Memory, image.Layout)
	case *wire.Item_EarlyFile:
		x.File = &image.EarlyFile{ID: it.EarlyFile.GetId(), Path: it.EarlyFile.GetPath(), MTimeNS: it.EarlyFile.GetMtimeNs(), Size: it.EarlyFile.GetSize()}
		if err := x.File.Check(); err != nil {
			return x, fmt.Errorf("%w: %w", errStream, err)
		}
		s.expect(image.Content, image.Cut, image.Digest)
	default:
		s.back = whole
		return x, io.EOF
	}
	return x, nil
}

// expect notes that data of these kinds may come before the images.
func (s *streamSource) expect(kinds ...image.DataKind) {
	if s.early == nil && s.begun != nil {
		s.begun()
	}
	for _, k := range kinds {
		if !slices.Contains(s.early, k) {
			s.early = append(s.early, k)
		}
	}
}

// data checks a record of data, of one of the kinds that may come now.
func (s *streamSource) data(h wire.DataHeader, body []byte, kinds ...image.DataKind) (image.DataID, error) {
	id := image.DataID{Kind: image.DataKind(h.Kind), ID: h.ID}
	switch {
	case id.Kind > image.Holes && id.Kind != image.Content && id.Kind != image.Cut:
		return id, fmt.Errorf("%w: data of unknown kind %d", errStream, h.Kind)
	case !slices.Contains(kinds, id.Kind):
		return id, fmt.Errorf("%w: data of kind %d at the wrong time", errStream, h.Kind)
	}
	switch id.Kind {
	case image.Memory, image.Shmem:
		if h.Offset%pageSize != 0 || len(body)%pageSize != 0 {
			return id, fmt.Errorf("%w: %d bytes of %s at %#x are not whole pages", errStream, len(body), id, h.Offset)
		}
		s.pages.Add(uint64(len(body) / pageSize))
	case image.Digest:
		if len(body) != sha256.Size {
			return id, fmt.Errorf("%w: %s has %d bytes", errStream, id, len(body))
		}
	}
	s.bytes += uint64(len(body))
	return id, nil
}

// Images implements image.Source.
func (s *streamSource) Images(ctx context.Context) (*image.Set, error) {
	for !s.sealed {
		it, err := s.imageItem(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.take(it); err != nil {
			return nil, err
		}
	}
	if s.complete != nil {
		done := s.complete
		s.complete = nil
		if err := done(); err != nil {
			return nil, err
		}
	}
	return s.set, nil
}

// imageItem reads the next item before the seal.
func (s *streamSource) imageItem(ctx context.Context) (*wire.Item, error) {
	it, _, _, err := s.next(ctx)
	switch {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%w: it ends among the images", errStream)
	case err != nil:
		return nil, err
	case it == nil:
		return nil, fmt.Errorf("%w: data before the images are complete", errStream)
	}
	return it, nil
}

// take adds one item to the images.
func (s *streamSource) take(it *wire.Item) error {
	switch it := it.Item.(type) {
	case *wire.Item_Facts:
		if s.set.Facts != nil {
			return fmt.Errorf("%w: facts come twice", errStream)
		}
		f := &image.Facts{}
		if err := json.Unmarshal(it.Facts, f); err != nil {
			return fmt.Errorf("%w: facts: %w", errStream, err)
		}
		s.set.Facts = f
	case *wire.Item_Entry:
		e := image.Entry{File: it.Entry.File, Magic: it.Entry.Magic, Extra: it.Entry.Extra}
		if e.Magic != image.MagicRaw {
			var err error
			if e.Msg, err = image.NewMessage(it.Entry.Magic); err == nil {
				err = proto.Unmarshal(it.Entry.Message, e.Msg)
			}
			if err != nil {
				return fmt.Errorf("%w: image %q: %w", errStream, it.Entry.File, err)
			}
		}
		if err := e.Check(); err != nil {
			return fmt.Errorf("%w: %w", errStream, err)
		}
		s.set.Add(e)
		s.entries++
	case *wire.Item_ImagesDone:
		if it.ImagesDone.GetEntries() != s.entries {
			return fmt.Errorf("%w: %d entries of %d", errStream, s.entries, it.ImagesDone.GetEntries())
		}
		s.sealed = true
	case *wire.Item_End:
		return s.finish(it.End)
	default:
		return fmt.Errorf("%w: unexpected item %T among the images", errStream, it)
	}
	return nil
}

// finish checks the sums.
func (s *streamSource) finish(end *wire.StreamEnd) error {
	if end == nil {
		return fmt.Errorf("%w: an empty end", errStream)
	}
	if err := end.Error.Err(); err != nil {
		return fmt.Errorf("the source gave up: %w", err)
	}
	if !s.sealed {
		return fmt.Errorf("%w: it ends among the images", errStream)
	}
	if end.DataBytes != s.bytes {
		return fmt.Errorf("%w: %d bytes of data arrived, %d were sent", errStream, s.bytes, end.DataBytes)
	}
	s.ended = end
	return nil
}

// Next implements image.Source. It returns io.EOF at the end of the data, and when it is
// called again, at the verified end of the stream.
func (s *streamSource) Next(ctx context.Context) (image.DataID, uint64, []byte, error) {
	none := image.DataID{}
	if !s.sealed {
		return none, 0, nil, fmt.Errorf("%w: data is read before the images", errStream)
	}
	for {
		it, h, body, err := s.next(ctx)
		switch {
		case errors.Is(err, io.EOF):
			if s.ended == nil {
				return none, 0, nil, fmt.Errorf("%w: it ends without an end", errStream)
			}
			return none, 0, nil, io.EOF
		case err != nil:
			return none, 0, nil, err
		case s.ended != nil:
			return none, 0, nil, fmt.Errorf("%w: it goes on after its end", errStream)
		case it != nil:
			switch it := it.Item.(type) {
			case *wire.Item_DataDone:
				if s.noData {
					return none, 0, nil, fmt.Errorf("%w: its data is done twice", errStream)
				}
				s.noData = true
				return none, 0, nil, io.EOF
			case *wire.Item_End:
				if err := s.finish(it.End); err != nil {
					return none, 0, nil, err
				}
				continue
			}
			return none, 0, nil, fmt.Errorf("%w: unexpected item %T among the data", errStream, it.Item)
		case s.noData:
			return none, 0, nil, fmt.Errorf("%w: data after all data", errStream)
		}
		id, err := s.data(h, body, image.Memory, image.Shmem, image.Ghost, image.Digest, image.Holes, image.Cut)
		if err != nil {
			return none, 0, nil, err
		}
		if len(body) == 0 {
			continue
		}
		return id, h.Offset, body, nil
	}
}

// next returns the next whole item, or the next record of data. body is valid
// until the next call: only then is the chunk that holds it released.
func (s *streamSource) next(ctx context.Context) (it *wire.Item, h wire.DataHeader, body []byte, err error) {
	if it, s.back = s.back, nil; it != nil {
		return it, h, nil, nil
	}
	for {
		if len(s.rest) == 0 {
			if s.inHand {
				s.inHand = false
				s.in.Release()
			}
			if s.rest, err = s.in.Recv(ctx); err != nil {
				if errors.Is(err, io.EOF) && s.part != nil {
					err = fmt.Errorf("%w: it ends inside an item", errStream)
				}
				return nil, h, nil, err
			}
			s.inHand = true
			continue
		}
		if h, body, s.rest, err = wire.NextRecord(s.rest); err != nil {
			return nil, h, nil, fmt.Errorf("%w: %w", errStream, err)
		}
		if h.Type == wire.RecordData {
			if s.part != nil {
				return nil, h, nil, fmt.Errorf("%w: data inside an item", errStream)
			}
			return nil, h, body, nil
		}
		if s.items += len(body); s.items > maxItems {
			return nil, h, nil, fmt.Errorf("%w: its images have more than %d MiB", errStream, maxItems>>20)
		}
		if h.Flags&wire.FlagMore != 0 {
			if len(body) == 0 {
				return nil, h, nil, fmt.Errorf("%w: an empty part of an item", errStream)
			}
			s.part = append(s.part, body...)
			continue
		}
		if s.part != nil {
			body = append(s.part, body...)
			s.part = nil
		}
		// Unmarshal copies what it keeps, so the chunk may go.
		it = &wire.Item{}
		if err := proto.Unmarshal(body, it); err != nil {
			return nil, h, nil, fmt.Errorf("%w: an item: %w", errStream, err)
		}
		if it.Item == nil {
			return nil, h, nil, fmt.Errorf("%w: an item of a kind that this release does not know", errStream)
		}
		return it, h, nil, nil
	}
}
