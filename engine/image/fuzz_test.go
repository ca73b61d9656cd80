package image

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// FuzzDecode: no file makes Decode panic, and what it reads it can write and
// read again.
func FuzzDecode(f *testing.F) {
	byFile := map[string][]byte{}
	for _, e := range testEntries() {
		b := byFile[e.File]
		if b == nil {
			b = messages(f, e.Magic)
		}
		b, err := AppendEntry(b, e)
		if err != nil {
			f.Fatal(err)
		}
		byFile[e.File] = b
	}
	for _, b := range byFile {
		f.Add(b)
	}
	f.Add(list(f, 1, pages(0x1000, 1)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		magic, entries, err := Decode("x", bytes.NewReader(b), int64(len(b)))
		if err != nil || magic == "" {
			return
		}
		out, err := AppendHead(nil, magic)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if out, err = AppendEntry(out, e); err != nil {
				t.Fatal(err)
			}
		}
		magic2, entries2, err := Decode("x", bytes.NewReader(out), int64(len(out)))
		if err != nil || magic2 != magic || len(entries2) != len(entries) {
			t.Fatalf("second reading: %s, %d entries, %v; first: %s, %d", magic2, len(entries2), err, magic, len(entries))
		}
		for i := range entries {
			// Encoded once more, since a NaN or an unknown field compares unequal to itself.
			a, err1 := AppendEntry(nil, entries[i])
			b, err2 := AppendEntry(nil, entries2[i])
			if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
				t.Fatalf("entry %d changed: %x, %x, %v, %v", i, a, b, err1, err2)
			}
		}
	})
}

// FuzzPages: no list makes the reader panic, give bytes that the pages do not
// have, or go backwards.
func FuzzPages(f *testing.F) {
	f.Add(list(f, 1, pages(0x1000, 1), pages(0x3000, 2, nr(2), flags(4))), uint16(3*PageSize))
	f.Add(list(f, 1, pages(0x1000, 1, flags(2))), uint16(0))
	f.Add(list(f, 1, pages(0x1000, 1, inParent)), uint16(PageSize))
	f.Add(list(f, 1), uint16(0))
	f.Fuzz(func(t *testing.T, l []byte, n uint16) {
		data := fill(int(n), 1)
		s := &inSet{
			id:   DataID{Memory, 1},
			list: newReader("pagemap-1", bytes.NewReader(l), int64(len(l))),
			data: newReader("pages-1", bytes.NewReader(data), int64(n)),
		}
		if _, err := s.start(); err != nil {
			return
		}
		walk(t, s, data, func(off, n uint64) bool { return off%PageSize == 0 && n%PageSize == 0 })
	})
}

// FuzzGhost: the same for a ghost file.
func FuzzGhost(f *testing.F) {
	f.Add(append(messages(f, MagicGhostFile, ghostEntry(true, 9), chunk(0, 5)), "hello"...))
	f.Add(append(messages(f, MagicGhostFile, ghostEntry(false, 9)), "hello"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &inSet{id: DataID{Ghost, 1}, list: newReader("ghost-file-1", bytes.NewReader(b), int64(len(b)))}
		if _, err := s.start(); err != nil {
			return
		}
		walk(t, s, b, func(off, n uint64) bool { return off <= s.limit && n <= s.limit-off })
	})
}

// walk reads a set in small pieces to its end.
func walk(t *testing.T, s *inSet, data []byte, sound func(off, n uint64) bool) {
	buf := make([]byte, 3*PageSize)
	var sum, low uint64
	for {
		off, p, err := s.next(buf)
		if errors.Is(err, io.EOF) || err != nil {
			return
		}
		n := uint64(len(p))
		if n == 0 || off < low || off+n < off || !sound(off, n) || !bytes.Contains(data, p) {
			t.Fatalf("piece at %#x of %d bytes, after %#x", off, n, low)
		}
		low = off + n
		if sum += n; sum > uint64(len(data)) {
			t.Fatalf("%d bytes out of %d", sum, len(data))
		}
	}
}

func FuzzFacts(f *testing.F) {
	f.Add([]byte(`{"version":1,"host":"a","tasks":[{"tid":1}],"sums":{"core-1.img":{"size":1,"crc32c":2}}}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		facts, _, err := parseFacts(b)
		if err == nil && facts == nil {
			t.Fatal("neither facts nor an error")
		}
	})
}
