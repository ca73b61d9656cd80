// Package image owns the form of a dumped tree: image files in the format of
// CRIU 4.2 (through go-criu's messages and magics), the facts of ours that
// CRIU has no field for, and the two directions in which they flow: a Sink
// takes them from a dump, a Source gives them to a restore. It must not know
// processes, tracing or networks.
package image

import (
	"context"
	"fmt"
	"sort"

	"google.golang.org/protobuf/proto"
)

// DataKind says what the bytes of a data set belong to.
type DataKind uint8

const (
	// Memory is the private memory of one process; ID is its pid in the
	// images, offsets are virtual addresses.
	Memory DataKind = 1
	// Shmem is the content of shared anonymous memory or of a memfd; ID is
	// its shmid, offsets count from the start of the object.
	Shmem DataKind = 2
	// Ghost is the content of a deleted file; ID is its ghost id.
	Ghost DataKind = 3
	// Digest follows the Ghost data of a file that travels with its name and has
	// the same ID; the data is a SHA-256 of that.
	Digest DataKind = 4
	// Layout is new anonymous memory of a process, before the images: Regions; ID is
	// its pid in the images. What it had there is gone.
	Layout DataKind = 5
	// Holes, after the images, are ranges of a process whose memory came before them
	// (Facts.Precopied) where it has none any more: Ranges; ID is its pid.
	Holes DataKind = 6
	// Content, before the images, is that of a file that travels with its name; ID is
	// that of its EarlyFile. A Digest follows it there, too.
	Content DataKind = 60
	// Cut empties ranges of such a file, whose content comes anew: Ranges; ID is that
	// of its EarlyFile before the images, and its ghost id after them.
	Cut DataKind = 61
)

func (k DataKind) String() string {
	switch k {
	case Memory:
		return "memory"
	case Shmem:
		return "shmem"
	case Ghost:
		return "ghost"
	case Digest:
		return "digest"
	case Layout:
		return "layout"
	case Holes:
		return "holes"
	case Content:
		return "content"
	case Cut:
		return "cut"
	}
	return fmt.Sprintf("data kind %d", uint8(k))
}

// DataID names a data set.
type DataID struct {
	Kind DataKind
	ID   uint32
}

func (d DataID) String() string { return fmt.Sprintf("%s-%d", d.Kind, d.ID) }

// Entry is one protobuf entry of one image file.
type Entry struct {
	// File is the name of the image without ".img", such as "core-12".
	File string
	// Magic is the name of the image type in go-criu's magic table, such as "CORE";
	// MagicRaw for a file that is Extra and nothing else.
	Magic string
	Msg   proto.Message // nil for MagicRaw
	// Extra is what follows the entry outside protobuf (the bytes of a pipe).
	Extra []byte
}

// Sink receives a dumped tree: Facts and every Entry in any order, then Sealed
// once, then Data. Data of one set comes with ascending offsets. Calls are not
// concurrent. Memory and Shmem data comes in whole pages. p is only valid
// during the call.
type Sink interface {
	Facts(*Facts) error
	Entry(Entry) error
	// Sealed says that all entries have been given.
	Sealed() error
	Data(id DataID, off uint64, p []byte) error
}

// Source gives a dumped tree back.
type Source interface {
	// Images waits until all entries are there and returns them.
	Images(ctx context.Context) (*Set, error)
	// Next returns the next run of data, or io.EOF after the last, checked one.
	// The bytes are valid until the next call.
	Next(ctx context.Context) (DataID, uint64, []byte, error)
}

// Orderer is a Source that can give data in an order that is wanted: that of these
// sets first.
type Orderer interface{ Order([]DataID) }

// Set is all entries of a dump in memory; data is not among them.
type Set struct {
	Facts *Facts
	files map[string][]Entry
}

// NewSet returns an empty set.
func NewSet() *Set { return &Set{files: map[string][]Entry{}} }

// Add appends e to its file.
func (s *Set) Add(e Entry) { s.files[e.File] = append(s.files[e.File], e) }

// Files lists the names of all image files, sorted.
func (s *Set) Files() []string {
	names := make([]string, 0, len(s.files))
	for n := range s.files {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// Entries returns the entries of one image file in order, nil if it is absent.
func (s *Set) Entries(file string) []Entry { return s.files[file] }

// All returns the messages of one image file; entries of another type are an error.
func All[T proto.Message](s *Set, file string) ([]T, error) {
	es := s.files[file]
	out := make([]T, 0, len(es))
	for i, e := range es {
		m, ok := e.Msg.(T)
		if !ok {
			return nil, fmt.Errorf("image %s: entry %d is a %T, not a %T", file, i, e.Msg, *new(T))
		}
		out = append(out, m)
	}
	return out, nil
}

// One returns the only message of an image file.
func One[T proto.Message](s *Set, file string) (T, error) {
	ms, err := All[T](s, file)
	if err != nil {
		return *new(T), err
	}
	if len(ms) != 1 {
		return *new(T), fmt.Errorf("image %s: %d entries, want 1", file, len(ms))
	}
	return ms[0], nil
}
