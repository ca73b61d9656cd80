package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/sys"
)

// AdviseGuard is MADV_GUARD_INSTALL (include/uapi/asm-generic/mman-common.h, Linux 6.13).
const AdviseGuard = 102

// readGuards finds the guard regions of the mappings that may have some.
func readGuards(pid int, vmas []*VMA) (err error) {
	var f *os.File
	for _, v := range vmas {
		if !v.Guarded {
			continue
		}
		if f == nil {
			if f, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", pid)); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, f.Close()) }()
		}
		if v.Guards, err = guards(f, v.Start, v.End); err != nil {
			return fmt.Errorf("find guard regions of %s of pid %d: %w", v, pid, err)
		}
	}
	return nil
}

func guards(pagemap *os.File, start, end uint64) (out []image.Range, err error) {
	vec := make([]sys.PageRegion, 64)
	for at := start; at < end; {
		n, next, err := sys.PagemapScan(int(pagemap.Fd()), at, end, 0, sys.PageIsGuard, 0, sys.PageIsGuard, vec)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
			return guardsPagemap(pagemap, start, end)
		}
		if err != nil {
			return nil, err
		}
		for _, r := range vec[:n] {
			out = addRange(out, r.Start, r.End)
		}
		if n < len(vec) {
			break
		}
		at = next
	}
	return out, nil
}

// guardsPagemap is guards for kernels whose PAGEMAP_SCAN does not know them: bit
// 58 of an entry of /proc/PID/pagemap says so since Linux 6.15.
func guardsPagemap(pagemap io.ReaderAt, start, end uint64) (out []image.Range, err error) {
	buf := make([]byte, 8*8192)
	for at := start; at < end; {
		want := min((end-at)/arch.PageSize*8, uint64(len(buf)))
		got, err := pagemap.ReadAt(buf[:want], int64(at/arch.PageSize*8))
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read pagemap: %w", err)
		}
		if got < 8 {
			return nil, fmt.Errorf("read pagemap at %#x: %w", at, io.ErrUnexpectedEOF)
		}
		for i := 0; i+8 <= got; i += 8 {
			if binary.LittleEndian.Uint64(buf[i:])&(1<<58) != 0 {
				page := at + uint64(i)/8*arch.PageSize
				out = addRange(out, page, page+arch.PageSize)
			}
		}
		at += uint64(got) / 8 * arch.PageSize
	}
	return out, nil
}

// addRange appends a range, or grows the last one that ends where it begins.
func addRange(rs []image.Range, start, end uint64) []image.Range {
	if n := len(rs); n > 0 && rs[n-1].End == start {
		rs[n-1].End = end
		return rs
	}
	return append(rs, image.Range{Start: start, End: end})
}

// unguarded gives the first n runs of the vector without the guard regions of
// v, which a scan takes for swapped pages.
func (r *Reader) unguarded(v *VMA, n int) []sys.PageRegion {
	if len(v.Guards) == 0 {
		return r.vec[:n]
	}
	return without(r.vec[:n], v.Guards)
}

// without takes ranges out of runs; both ascend.
func without(runs []sys.PageRegion, rs []image.Range) (out []sys.PageRegion) {
	for _, run := range runs {
		for len(rs) > 0 && rs[0].End <= run.Start {
			rs = rs[1:]
		}
		for i := 0; i < len(rs) && rs[i].Start < run.End; i++ {
			if rs[i].Start > run.Start {
				out = append(out, sys.PageRegion{Start: run.Start, End: rs[i].Start, Categories: run.Categories})
			}
			run.Start = min(rs[i].End, run.End)
		}
		if run.Start < run.End {
			out = append(out, run)
		}
	}
	return out
}
