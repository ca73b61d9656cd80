package mem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/sys"
)

// ChunkSize is the most that is read from a process and given to a sink at
// once, in bytes.
const ChunkSize = 256 << 10

// Reader takes the contents of one process.
type Reader struct {
	// Running says that the process runs meanwhile: what goes away is left out.
	Running bool
	// NoZeros leaves out pages of anonymous memory that hold nothing but zeros.
	NoZeros bool

	pid     int
	pagemap *os.File
	mem     *os.File
	buf     []byte
	vec     []sys.PageRegion
}

// NewReader opens the memory of a process.
func NewReader(pid int) (*Reader, error) {
	pm, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	m, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, errors.Join(err, pm.Close())
	}
	return &Reader{pid: pid, pagemap: pm, mem: m, buf: make([]byte, ChunkSize), vec: make([]sys.PageRegion, 512)}, nil
}

// Close closes the memory.
func (r *Reader) Close() error { return errors.Join(r.pagemap.Close(), r.mem.Close()) }

// Dump gives all pages of the VMAs that belong to the process itself to the
// sink and returns how many there were: anonymous pages, and copied pages of
// private file mappings, but none that is still the file's or the zero page.
func (r *Reader) Dump(ctx context.Context, vmas []*VMA, sink image.Sink, id image.DataID) (pages uint64, err error) {
	for _, v := range adjacent(vmas) {
		n, err := r.dumpVMA(ctx, v, sink, id)
		if err != nil {
			return pages, fmt.Errorf("dump %s of pid %d: %w", v, r.pid, err)
		}
		pages += n
	}
	return pages, nil
}

// adjacent gives the ranges whose pages are dumped: VMAs side by side are one,
// so that a process with 65,000 of them is not read page by page.
func adjacent(vmas []*VMA) (out []*VMA) {
	var last *VMA // of out, if it is a copy
	for _, v := range vmas {
		if !v.HasPages() {
			continue
		}
		if len(out) == 0 || out[len(out)-1].End != v.Start || v.Is(AioRing) || out[len(out)-1].Is(AioRing) {
			out, last = append(out, v), nil
			continue
		}
		if last == nil {
			c := *out[len(out)-1]
			c.Guards, c.Path = slices.Clone(c.Guards), ""
			last = &c
			out[len(out)-1] = last
		}
		last.End = v.End
		last.Prot &= v.Prot
		last.Status &= v.Status
		last.Cow = last.Cow || v.Cow
		last.Guards = append(last.Guards, v.Guards...)
	}
	return out
}

// whole gives a mapping whose pages are a file's, which a scan leaves out.
func (r *Reader) whole(ctx context.Context, v *VMA, sink image.Sink, id image.DataID) error {
	for a := v.Start; a < v.End; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := r.buf[:min(v.End-a, ChunkSize)]
		if err := r.read(v, a, b); err != nil {
			return err
		}
		if err := sink.Data(id, a, b); err != nil {
			return err
		}
		a += uint64(len(b))
	}
	return nil
}

func (r *Reader) dumpVMA(ctx context.Context, v *VMA, sink image.Sink, id image.DataID) (pages uint64, err error) {
	if v.Is(AioRing) {
		if err := r.whole(ctx, v, sink, id); err != nil && !r.Running {
			return 0, err
		}
		return v.Len() / arch.PageSize, nil
	}
	for at := v.Start; at < v.End; {
		n, next, err := r.scan(at, v.End)
		if err != nil {
			return pages, err
		}
		for _, run := range r.unguarded(v, n) {
			pages += (run.End - run.Start) / arch.PageSize
			for a := run.Start; a < run.End; {
				if err := ctx.Err(); err != nil {
					return pages, err
				}
				b := r.buf[:min(run.End-a, ChunkSize)]
				if err := r.read(v, a, b); err != nil {
					if !r.Running {
						return pages, err
					}
					if len(b) > arch.PageSize {
						b = b[:arch.PageSize]
						err = r.read(v, a, b)
					}
					if err != nil {
						a += uint64(len(b))
						continue
					}
				}
				err := split(b, func(from, to int, zero bool) error {
					if zero && r.NoZeros && v.Is(AnonPrivate) {
						pages -= uint64(to-from) / arch.PageSize
						return nil
					}
					return sink.Data(id, a+uint64(from), b[from:to])
				})
				if err != nil {
					return pages, err
				}
				a += uint64(len(b))
			}
		}
		if n < len(r.vec) {
			break
		}
		at = next
	}
	return pages, nil
}

// split calls fn for every run of pages in b that are all zeros, or none of which is.
func split(b []byte, fn func(from, to int, zero bool) error) error {
	zero := func(at int) bool { return bytes.Equal(b[at:at+arch.PageSize], zeros[:arch.PageSize]) }
	for from := 0; from < len(b); {
		is, to := zero(from), from+arch.PageSize
		for to < len(b) && zero(to) == is {
			to += arch.PageSize
		}
		if err := fn(from, to, is); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// scan finds runs of pages that are present or swapped and neither the file's
// nor the zero page.
func (r *Reader) scan(start, end uint64) (n int, next uint64, err error) {
	const not = sys.PageIsFile | sys.PageIsPfnZero
	n, next, err = sys.PagemapScan(int(r.pagemap.Fd()), start, end, not, not, sys.PageIsPresent|sys.PageIsSwapped, 0, r.vec)
	if errors.Is(err, unix.ENOTTY) {
		return r.scanPagemap(start, end)
	}
	return n, next, err
}

// scanPagemap is scan for kernels before 6.7: it reads /proc/PID/pagemap
// (Documentation/admin-guide/mm/pagemap.rst), which does not tell zero pages.
func (r *Reader) scanPagemap(start, end uint64) (n int, next uint64, err error) {
	const present, swapped, file = 1 << 63, 1 << 62, 1 << 61
	buf := make([]byte, 8*8192)
	for at := start; at < end; {
		want := min((end-at)/arch.PageSize*8, uint64(len(buf)))
		got, err := r.pagemap.ReadAt(buf[:want], int64(at/arch.PageSize*8))
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, 0, fmt.Errorf("read pagemap: %w", err)
		}
		if got < 8 {
			return 0, 0, fmt.Errorf("read pagemap at %#x: %w", at, io.ErrUnexpectedEOF)
		}
		for i := 0; i+8 <= got; i += 8 {
			var e uint64
			for k := 7; k >= 0; k-- {
				e = e<<8 | uint64(buf[i+k])
			}
			page := at + uint64(i)/8*arch.PageSize
			if e&(present|swapped) == 0 || e&file != 0 {
				continue
			}
			if n > 0 && r.vec[n-1].End == page {
				r.vec[n-1].End += arch.PageSize
				continue
			}
			if n == len(r.vec) {
				return n, page, nil
			}
			r.vec[n] = sys.PageRegion{Start: page, End: page + arch.PageSize}
			n++
		}
		at += uint64(got) / 8 * arch.PageSize
	}
	return n, end, nil
}

func (r *Reader) read(v *VMA, addr uint64, b []byte) error {
	// Faster, but it would give a process pages of its own in place of those that
	// it shares with relatives (gup_must_unshare, mm/internal.h).
	if v.Prot&unix.PROT_READ != 0 && !v.Cow {
		n, err := sys.ProcessVMRead(r.pid, b, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}})
		if err == nil && n == len(b) {
			return nil
		}
		// Past the end of a file, say: /proc/PID/mem decides.
	}
	if _, err := r.mem.ReadAt(b, int64(addr)); err != nil {
		return fmt.Errorf("read %d bytes at %#x: %w", len(b), addr, err)
	}
	return nil
}

// zeros is for comparing.
var zeros [ChunkSize]byte

// DumpFile gives the contents of a file, memfd or shared memory to the sink,
// without its holes; those of huge pages do not tell theirs, so that what is zero
// is left out. size is its length in bytes; with whole set, runs are
// widened to whole pages, as image.Shmem wants them.
func DumpFile(ctx context.Context, f *os.File, size int64, whole bool, sink image.Sink, id image.DataID) (total uint64, err error) {
	buf := make([]byte, ChunkSize)
	// Data is looked for through the descriptor that the program may share:
	// its position must not move, so a description of our own is made.
	own, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return 0, fmt.Errorf("open %s again: %w", f.Name(), err)
	}
	defer func() { _ = own.Close() }()
	_, huge, err := sys.HugePages(own)
	if err != nil {
		return 0, err
	}
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(own.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return total, nil
		case errors.Is(err, unix.EINVAL): // no holes on this file system
			start = at
		case err != nil:
			return total, fmt.Errorf("find data of %s: %w", f.Name(), err)
		}
		end, err := unix.Seek(int(own.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			end = size
		}
		if whole {
			start = start / arch.PageSize * arch.PageSize
			end = (end + arch.PageSize - 1) / arch.PageSize * arch.PageSize
		} else {
			end = min(end, size)
		}
		for a := start; a < end; {
			if err := ctx.Err(); err != nil {
				return total, err
			}
			b := buf[:min(end-a, ChunkSize)]
			n, err := own.ReadAt(b, a)
			if err != nil && !errors.Is(err, io.EOF) {
				return total, fmt.Errorf("read %s: %w", f.Name(), err)
			}
			if whole {
				clear(b[n:]) // past the end of the file, inside its last page
			} else if n < len(b) {
				return total, fmt.Errorf("read %s at %d: %w: it was truncated meanwhile", f.Name(), a, io.ErrUnexpectedEOF)
			}
			at := a
			a += int64(len(b))
			if huge && bytes.Equal(b, zeros[:len(b)]) {
				continue
			}
			if err := sink.Data(id, uint64(at), b); err != nil {
				return total, err
			}
			total += uint64(len(b))
		}
		at = end
	}
	return total, nil
}

// Writer fills the memory of a process that is being built.
type Writer struct {
	pid  int
	mem  *os.File
	vmas []*VMA
	last int    // VMA of the last write: runs ascend
	old  []byte // for comparing
	// Compared counts pages that were compared with what was inherited, Shared those
	// of them that were equal.
	Compared, Shared uint64
}

// NewWriter opens the memory of a process whose mappings are vmas, ascending.
// Preconditions: the calling thread, or its tracer's process, traces pid.
func NewWriter(pid int, vmas []*VMA) (*Writer, error) {
	m, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &Writer{pid: pid, mem: m, vmas: vmas}, nil
}

// Close closes the memory.
func (w *Writer) Close() error { return w.mem.Close() }

// Write puts b at addr. It refuses addresses outside the mappings whose pages
// an image holds.
func (w *Writer) Write(addr uint64, b []byte) error {
	for len(b) > 0 {
		v := w.find(addr)
		if v == nil || !v.HasPages() {
			return fmt.Errorf("image holds pages at %#x of pid %d, where it has no private mapping", addr, w.pid)
		}
		n := min(uint64(len(b)), v.End-addr)
		put := w.write
		if v.Kept != 0 {
			put = w.differing
		}
		if err := put(v, addr, b[:n]); err != nil {
			return err
		}
		addr += n
		b = b[n:]
	}
	return nil
}

func (w *Writer) find(addr uint64) *VMA {
	if w.last < len(w.vmas) && w.vmas[w.last].Start > addr {
		w.last = 0
	}
	for ; w.last < len(w.vmas); w.last++ {
		if v := w.vmas[w.last]; addr < v.End {
			if addr < v.Start {
				return nil
			}
			return v
		}
	}
	w.last = 0
	return nil
}

func (w *Writer) write(v *VMA, addr uint64, b []byte) error {
	if v.Prot&unix.PROT_WRITE != 0 {
		n, err := sys.ProcessVMWrite(w.pid, addr, b)
		if err == nil && n == len(b) {
			return nil
		}
	}
	// Not writable for the process itself: the tracer may write all the same.
	if _, err := w.mem.WriteAt(b, int64(addr)); err != nil {
		return fmt.Errorf("write %d bytes at %#x of pid %d (%s): %w", len(b), addr, w.pid, v, err)
	}
	return nil
}
