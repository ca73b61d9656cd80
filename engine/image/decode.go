package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// reader reads one image file and knows where it is, for messages, and how
// much is left, so that no size field of a corrupt file makes it allocate more
// than the file has.
type reader struct {
	name string // of the image, without extension
	r    *bufio.Reader
	off  uint64
	size uint64
}

func newReader(name string, r io.Reader, size int64) *reader {
	return &reader{name: name, r: bufio.NewReaderSize(r, 32<<10), size: uint64(size)}
}

// fail makes an error that names file and offset.
func (d *reader) fail(at uint64, format string, a ...any) error {
	return fmt.Errorf("image %s%s, offset %d: %w", d.name, Extension, at, fmt.Errorf(format, a...))
}

func (d *reader) left() uint64 { return d.size - d.off }

// bytes reads n bytes; what they are is for the message.
func (d *reader) bytes(n uint64, what string) ([]byte, error) {
	if n > d.left() {
		return nil, d.fail(d.off, "%s of %d bytes, the file has %d more", what, n, d.left())
	}
	b := make([]byte, n)
	return b, d.into(b, what)
}

// into fills b.
func (d *reader) into(b []byte, what string) error {
	n, err := io.ReadFull(d.r, b)
	at := d.off
	d.off += uint64(n)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return d.fail(at, "the file ends in the middle of %s", what)
	}
	if err != nil {
		return d.fail(at, "read %s: %w", what, err)
	}
	return nil
}

func (d *reader) word(what string) (uint32, error) {
	if d.left() < 4 {
		return 0, d.fail(d.off, "the file ends where %s should be", what)
	}
	var b [4]byte
	if err := d.into(b[:], what); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

// head reads the magic words and returns the name of the image type, "" if the
// file is none of CRIU's own format.
func (d *reader) head() (string, error) {
	if d.left() < 4 {
		return "", nil
	}
	w, err := d.word("a magic")
	if err != nil {
		return "", err
	}
	name, ok := magics().ByValue[uint64(w)]
	switch {
	case !ok:
		return "", nil
	case name == MagicInventory:
		return name, nil
	case name != "IMG_COMMON" && name != "IMG_SERVICE":
		return "", nil
	}
	at := d.off
	if w, err = d.word("a magic"); err != nil {
		return "", err
	}
	if name, ok = magics().ByValue[uint64(w)]; !ok {
		return "", d.fail(at, "unknown image type %#x", w)
	}
	return name, nil
}

// message reads one message; more is false at the end of the file.
func (d *reader) message(m proto.Message) (more bool, err error) {
	if d.left() == 0 {
		return false, nil
	}
	at := d.off
	n, err := d.word("the size of an entry")
	if err != nil {
		return false, err
	}
	if n > MaxMessage {
		return false, d.fail(at, "entry of %d bytes, the largest that can be is %d", n, MaxMessage)
	}
	b, err := d.bytes(uint64(n), "an entry")
	if err != nil {
		return false, err
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return false, d.fail(at, "entry of %d bytes is no %s: %w", n, m.ProtoReflect().Descriptor().FullName(), err)
	}
	return true, nil
}

// entries reads all entries behind the head. Of a ghost file it reads the
// first: the rest is data.
func (d *reader) entries(magic string) ([]Entry, error) {
	var out []Entry
	for {
		msg, err := NewMessage(magic)
		if err != nil {
			return nil, d.fail(d.off, "%w", err)
		}
		more, err := d.message(msg)
		if err != nil {
			return nil, err
		}
		if !more {
			return out, nil
		}
		e := Entry{File: d.name, Magic: magic, Msg: msg}
		if magic == MagicGhostFile {
			return append(out, e), nil
		}
		n, ok := extraLen(magic, msg)
		if !ok {
			n = d.left()
		}
		if n > 0 {
			if e.Extra, err = d.bytes(n, "the data of an entry"); err != nil {
				return nil, err
			}
		}
		out = append(out, e)
	}
}

// Decode reads an image file of size bytes that is called name (without
// extension) and returns its type and entries; of a ghost file only the first.
// The type is "" for a file that is not in CRIU's own format, such as the
// routes of a network namespace. Lists of pages are refused: OpenDir reads them.
func Decode(name string, r io.Reader, size int64) (magic string, entries []Entry, err error) {
	d := newReader(name, r, size)
	magic, err = d.head()
	if err != nil || magic == "" {
		return "", nil, err
	}
	if magic == MagicPagemap {
		return "", nil, d.fail(0, "it is a list of pages, which is no list of entries")
	}
	entries, err = d.entries(magic)
	if err != nil {
		return "", nil, err
	}
	return magic, entries, nil
}
