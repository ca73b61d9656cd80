package image

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"strings"
)

// A dump of a tree that still runs (pre-copy) gives memory before the images:
// an Outline, then Layout and Memory data of its processes, again and again for
// what was written meanwhile. The images, and what was written last, follow
// when the tree is frozen. In the same way, before, after or between that, it gives
// the content of files that travel with their names: an EarlyFile each, then Content
// and Cut data, with a Digest after each run of it.

// Outline says which processes get memory before the images.
type Outline struct {
	Procs []OutlineProc `json:"procs"` // the root first, parents before children
	// Terminals says that the tree has masters of pseudoterminals.
	Terminals bool `json:"terminals,omitempty"`
	// Free is an address behind which the processes have nothing for a GiB; 0: not known.
	Free uint64 `json:"free,omitempty"`
}

// OutlineProc is one of them.
type OutlineProc struct {
	Pid    uint32 `json:"pid"`              // in the images, as all numbers here
	Parent uint32 `json:"parent,omitempty"` // 0: it is the root
	Sid    uint32 `json:"sid"`
	// ExitSignal is what its parent gets at its end, 0 for nothing.
	ExitSignal uint32 `json:"exit_signal"`
}

// maxOutline bounds the processes of an outline.
const maxOutline = 1 << 16

// maxPid is the largest pid of a 64-bit kernel (include/linux/threads.h).
const maxPid = 4 << 20

// Check refuses what no dump writes.
func (o *Outline) Check() error {
	if len(o.Procs) == 0 || len(o.Procs) > maxOutline {
		return fmt.Errorf("an outline of %d processes", len(o.Procs))
	}
	if o.Free%pageSize != 0 || o.Free >= 1<<47 {
		return fmt.Errorf("an outline with free memory at %#x", o.Free)
	}
	sids := map[uint32]uint32{}
	for i, p := range o.Procs {
		switch parent, known := sids[p.Parent]; {
		case p.Pid < 2 || p.Pid > maxPid || p.Sid > maxPid || p.ExitSignal > 64:
			return fmt.Errorf("an outline with impossible numbers of pid %d", p.Pid)
		case (i == 0) != (p.Parent == 0), i > 0 && !known:
			return fmt.Errorf("an outline in which pid %d has no parent before it", p.Pid)
		case i > 0 && p.Sid != p.Pid && p.Sid != parent:
			return fmt.Errorf("an outline in which pid %d is in another session than its parent", p.Pid)
		}
		if _, twice := sids[p.Pid]; twice {
			return fmt.Errorf("an outline with pid %d twice", p.Pid)
		}
		sids[p.Pid] = p.Sid
	}
	return nil
}

// EarlyFile is a file that travels with its name, and whose content begins to come
// before the images. Those say in the end which of them are of use (NamedFacts.Early).
type EarlyFile struct {
	ID      uint32 // not 0
	Path    string // where it is to be placed
	MTimeNS int64  // since 1970
	Size    uint64 // bytes
}

// Check refuses what no dump gives.
func (f *EarlyFile) Check() error {
	if f.ID == 0 || f.Size > 1<<63-1 || len(f.Path) >= maxPath || !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.IndexByte(f.Path, 0) >= 0 {
		return fmt.Errorf("%w: an early file %d at %q", ErrMalformed, f.ID, f.Path)
	}
	return nil
}

// maxPath is PATH_MAX (include/uapi/linux/limits.h).
const maxPath = 4096

// Early is one thing that comes before the images: an outline, a file, or else a run of data.
type Early struct {
	Outline *Outline
	File    *EarlyFile
	ID      DataID
	Off     uint64
	Data    []byte
}

// EarlySink is a Sink that takes what comes before the images.
type EarlySink interface {
	Sink
	// Outline comes once; Data of kinds Layout and Memory may come before Sealed
	// from then on, at any offset and again.
	Outline(*Outline) error
	// File comes once a file; Data of kinds Content, Cut and Digest of it may come before
	// Sealed from then on.
	File(*EarlyFile) error
}

// EarlySource is a Source that may have something before the images.
type EarlySource interface {
	Source
	// Early returns the next of what comes before the images, or io.EOF at their
	// beginning. Bytes are valid until the next call.
	Early(ctx context.Context) (Early, error)
}

// Region is anonymous memory of a process.
type Region struct {
	Range
	Prot    uint32 // PROT_* with which it is made; what it has in the end is in the images
	Flags   uint32 // MAP_* as they would make it
	Madvise uint64 // bit n for advice n (MADV_*)
}

const (
	regionLen = 32
	rangeLen  = 16
	pageSize  = 4096
)

// ErrMalformed is what data of Layout and Holes is reported as that no dump writes.
var ErrMalformed = errors.New("malformed data")

// AppendRegion appends r as Layout has it.
func AppendRegion(b []byte, r Region) []byte {
	b = AppendRange(b, r.Range)
	b = binary.LittleEndian.AppendUint32(b, r.Prot)
	b = binary.LittleEndian.AppendUint32(b, r.Flags)
	return binary.LittleEndian.AppendUint64(b, r.Madvise)
}

// ParseRegions reads the body of Layout.
func ParseRegions(b []byte) ([]Region, error) {
	if len(b) == 0 || len(b)%regionLen != 0 {
		return nil, fmt.Errorf("%w: %d bytes of a layout", ErrMalformed, len(b))
	}
	var out []Region
	for ; len(b) > 0; b = b[regionLen:] {
		rs, err := ParseRanges(b[:rangeLen])
		if err != nil {
			return nil, err
		}
		out = append(out, Region{Range: rs[0], Prot: binary.LittleEndian.Uint32(b[16:]), Flags: binary.LittleEndian.Uint32(b[20:]), Madvise: binary.LittleEndian.Uint64(b[24:])})
	}
	return out, nil
}

// AppendRange appends r as Holes has it.
func AppendRange(b []byte, r Range) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, r.Start), r.End)
}

// ParseRanges reads the body of Holes.
func ParseRanges(b []byte) ([]Range, error) {
	if len(b) == 0 || len(b)%rangeLen != 0 {
		return nil, fmt.Errorf("%w: %d bytes of ranges", ErrMalformed, len(b))
	}
	var out []Range
	for ; len(b) > 0; b = b[rangeLen:] {
		r := Range{Start: binary.LittleEndian.Uint64(b), End: binary.LittleEndian.Uint64(b[8:])}
		if r.Start >= r.End || r.Start%pageSize != 0 || r.End%pageSize != 0 || r.End > 1<<47 {
			return nil, fmt.Errorf("%w: a range %#x-%#x", ErrMalformed, r.Start, r.End)
		}
		out = append(out, r)
	}
	return out, nil
}
