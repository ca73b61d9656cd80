package paging

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/mem"
	"godwit/engine/sys"
)

// Space is an address space of which pages are yet to come.
type Space struct {
	// Pid is that of its process in the images: by it the other side knows whose
	// memory is meant, whatever becomes of the process.
	Pid uint32
	// Host is the pid that the process has on this host when it begins to run.
	Host int
	// Uffd serves its missing pages (sys.UffdServe), Pagemap is its /proc/PID/pagemap.
	Uffd, Pagemap *os.File
	// Ranges are the memory that may have missing pages, ascending. A page that is
	// there is not missing.
	Ranges []image.Range
}

// segment is memory of a process: what is at start now was at origin when the tree was
// frozen.
type segment struct {
	start, end, origin uint64
}

func (g segment) from(at uint64) uint64 { return at - g.start + g.origin }

// space is a Space that is being filled. All addresses in sets are those that the tree
// had when it was frozen; the addresses that it has now are translated by segments.
//
// Whoever changes the memory of the process waits, by the kernel's doing, until the event
// that tells of it is read; and while it waits nothing can be put into that memory. So
// an event is read and taken note of under mu, and so is everything else that hangs
// on where memory is.
type space struct {
	pid uint32

	uffd *os.File
	conn syscall.RawConn // of uffd: it is closed while others wait for it

	mu      sync.Mutex
	pagemap *os.File  // nil: what is there has been looked at
	segs    []segment // ascending by start, apart
	// settled are pages that are not to be asked for: put, empty, or taken away by
	// the program. What misses one of them gets zeros.
	settled mem.PageSet
	// there are the pages that the other side is known to have something in, below
	// mapped, and all of them if whole is set.
	there  mem.PageSet
	mapped uint64
	whole  bool
	left   uint64 // bytes of there that are not settled
	// waits are the faults that wait for a page, by its address now.
	waits map[uint64]time.Time
	// asked are the windows that are under way for faults.
	asked map[uint64]bool
	over  bool // nothing is missing any more, or the process is gone
}

func newSpace(x Space) (*space, error) {
	s := &space{pid: x.Pid, uffd: x.Uffd, pagemap: x.Pagemap, waits: map[uint64]time.Time{}, asked: map[uint64]bool{}}
	var err error
	if s.conn, err = x.Uffd.SyscallConn(); err != nil {
		return nil, err
	}
	for _, r := range x.Ranges {
		s.segs = append(s.segs, segment{start: r.Start, end: r.End, origin: r.Start})
	}
	return s, nil
}

// heir is the space of a child that has just been forked.
// Preconditions: mu is held.
func (s *space) heir(uffd *os.File) (*space, error) {
	c, err := newSpace(Space{Pid: s.pid, Uffd: uffd})
	if err != nil {
		return nil, err
	}
	c.segs, c.settled, c.there, c.mapped, c.whole, c.left = slices.Clone(s.segs), s.settled.Clone(), s.there.Clone(), s.mapped, s.whole, s.left
	return c, nil
}

// do calls fn with the userfaultfd. It is an os.ErrClosed if that is closed.
func (s *space) do(fn func(fd int) error) error {
	var err error
	if cerr := s.conn.Control(func(fd uintptr) { err = fn(int(fd)) }); cerr != nil {
		return fmt.Errorf("%w: %w", os.ErrClosed, cerr) // there is no other reason
	}
	return err
}

func (s *space) closed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// find gives the segment of an address; false: it is not memory that was missing.
func (s *space) find(at uint64) (segment, bool) {
	i, _ := slices.BinarySearchFunc(s.segs, at, func(g segment, at uint64) int {
		if g.end <= at {
			return -1
		}
		if g.start > at {
			return 1
		}
		return 0
	})
	if i < len(s.segs) && s.segs[i].start <= at {
		return s.segs[i], true
	}
	return segment{}, false
}

// settle notes that pages, by their first addresses, are not to be asked for.
func (s *space) settle(start, end uint64) {
	s.settled.Absent(start, end, func(a, b uint64) {
		s.there.Runs(a, b, func(a, b uint64) { s.left -= b - a })
	})
	s.settled.Add(start, end)
}

// know notes what the other side has in [mapped, to).
func (s *space) know(runs []image.Range, to uint64, whole bool) {
	for _, r := range runs {
		s.places(r.Start, r.End, func(_, origin, n uint64) {
			s.there.Add(origin, origin+n)
			s.settled.Absent(origin, origin+n, func(a, b uint64) { s.left += b - a })
		})
	}
	s.mapped, s.whole = to, whole
}

// empty tells whether nothing is known to be in a page, by its first address.
func (s *space) empty(page uint64) bool {
	end := page + arch.PageSize
	if s.settled.Any(page, end) {
		return true
	}
	return (s.whole || page < s.mapped) && !s.there.Any(page, end)
}

// cut calls fn for the parts of segments in [start, end) of now.
func (s *space) cut(start, end uint64, fn func(segment)) {
	for _, g := range s.segs {
		if g.start >= end {
			break
		}
		if g.end <= start {
			continue
		}
		a, b := max(g.start, start), min(g.end, end)
		fn(segment{start: a, end: b, origin: g.from(a)})
	}
}

// drop forgets that [start, end) of now is memory that was missing.
func (s *space) drop(start, end uint64) {
	var out []segment
	for _, g := range s.segs {
		if g.end <= start || g.start >= end {
			out = append(out, g)
			continue
		}
		if g.start < start {
			out = append(out, segment{start: g.start, end: start, origin: g.origin})
		}
		if g.end > end {
			out = append(out, segment{start: end, end: g.end, origin: g.from(end)})
		}
	}
	s.segs = out
}

// note takes note of an event that is no fault and no fork.
func (s *space) note(e sys.UffdEvent) error {
	switch e.Kind {
	case sys.UffdRemove:
		s.cut(e.Start, e.End, func(g segment) { s.settle(g.origin, g.origin+g.end-g.start) })
	case sys.UffdUnmap:
		s.cut(e.Start, e.End, func(g segment) { s.settle(g.origin, g.origin+g.end-g.start) })
		s.drop(e.Start, e.End)
	case sys.UffdRemap:
		var moved []segment
		s.cut(e.Start, e.End, func(g segment) {
			to := e.To + g.start - e.Start
			moved = append(moved, segment{start: to, end: to + g.end - g.start, origin: g.origin})
		})
		s.drop(e.Start, e.End)
		s.drop(e.To, e.To+e.End-e.Start) // what was there has been unmapped
		s.segs = append(s.segs, moved...)
		slices.SortFunc(s.segs, func(a, b segment) int {
			if a.start < b.start {
				return -1
			}
			return 1
		})
	}
	// Whoever waits there looks again at what is there now.
	for at := range s.waits {
		if at >= e.Start && at < e.End {
			delete(s.waits, at)
		}
	}
	return s.do(func(fd int) error { return sys.UffdWake(fd, e.Start, e.End) })
}

// look settles what is there already of [start, end), by addresses of now.
func (s *space) look(vec []sys.PageRegion) error {
	if s.pagemap == nil {
		return nil
	}
	for _, g := range s.segs {
		for at := g.start; at < g.end; {
			n, next, err := sys.PagemapScan(int(s.pagemap.Fd()), at, g.end, 0, 0, sys.PageIsPresent|sys.PageIsSwapped, 0, vec)
			if err != nil {
				return err
			}
			for _, r := range vec[:n] {
				s.settle(g.from(r.Start), g.from(r.End))
			}
			if n < len(vec) {
				break
			}
			at = next
		}
	}
	err := s.pagemap.Close()
	s.pagemap = nil
	return err
}

// places calls fn for where pages of [start, end), by their first addresses, are now.
func (s *space) places(start, end uint64, fn func(at, origin, n uint64)) {
	for _, g := range s.segs {
		oend := g.origin + g.end - g.start
		if a, b := max(g.origin, start), min(oend, end); a < b {
			fn(g.start+a-g.origin, a, b-a)
		}
	}
}

// errBusy: an event is to be read first.
var errBusy = errors.New("the memory is being changed")

// put puts pages, or zeros if b is nil, where they are missing. Preconditions: mu is held.
func (s *space) put(at uint64, b []byte, n uint64) error {
	return s.do(func(fd int) error {
		for end, try := at+n, n; at < end; try = end - at {
			for done := 0; done == 0; {
				var err error
				if b != nil {
					done, err = sys.UffdCopy(fd, at, b[:try])
				} else {
					done, err = sys.UffdZero(fd, at, try)
				}
				switch {
				case done > 0:
				case errors.Is(err, unix.EAGAIN):
					return errBusy
				case errors.Is(err, unix.ENOENT) && try > arch.PageSize:
					try = arch.PageSize // the program has made two mappings of it
				case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
					// There already, or no memory of ours any more: whoever waits looks again.
					done = arch.PageSize
					if err := sys.UffdWake(fd, at, at+arch.PageSize); err != nil {
						return err
					}
				default:
					return fmt.Errorf("fill memory of pid %d at %#x: %w", s.pid, at, err)
				}
				at += uint64(done)
				if b != nil {
					b = b[done:]
				}
			}
		}
		return nil
	})
}

// end lets go of the process: nothing is missing, or it is gone.
func (s *space) end() {
	s.mu.Lock()
	was := s.over
	s.over = true
	s.mu.Unlock()
	if was {
		return
	}
	// It waits for whoever uses it, and they for mu.
	_ = s.uffd.Close()
	if s.pagemap != nil {
		_ = s.pagemap.Close()
	}
}

// Close closes the files of a space that nobody serves yet.
func (x *Space) Close() error { return errors.Join(x.Uffd.Close(), x.Pagemap.Close()) }
