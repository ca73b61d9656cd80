package mem

import (
	"cmp"
	"errors"
	"slices"

	"godwit/engine/image"
)

// within gives the parts of ascending ranges that are in [start, end).
func within(ranges []image.Range, start, end uint64) (out []image.Range) {
	i, _ := slices.BinarySearchFunc(ranges, start+1, func(r image.Range, at uint64) int { return cmp.Compare(r.End, at) })
	for ; i < len(ranges) && ranges[i].Start < end; i++ {
		out = append(out, image.Range{Start: max(ranges[i].Start, start), End: min(ranges[i].End, end)})
	}
	return out
}

// errEnough ends a walk.
var errEnough = errors.New("enough")

// Map finds where in ranges, from an address on, a process has pages of its own, present
// or swapped: at most n runs, ascending, and where to go on; 0: that is all. The process is
// frozen.
func (r *Reader) Map(ranges []image.Range, from uint64, n int) (runs []image.Range, next uint64, err error) {
	for _, x := range within(ranges, from, ^uint64(0)) {
		err := r.runs(x, func(run image.Range) error {
			if len(runs) == n {
				next = run.Start
				return errEnough
			}
			runs = append(runs, run)
			return nil
		})
		if next != 0 {
			return runs, next, nil
		}
		if err != nil {
			return nil, 0, err
		}
	}
	return runs, 0, nil
}

// Take appends what a frozen process has in the parts of ranges in [start, end), but pages that
// are all zeros, to b, and tells which that is.
func (r *Reader) Take(ranges []image.Range, start, end uint64, b []byte) (_ []byte, runs []image.Range, err error) {
	for _, x := range within(ranges, start, end) {
		err := r.runs(x, func(run image.Range) error {
			n := len(b)
			b = slices.Grow(b, int(run.End-run.Start))[:n+int(run.End-run.Start)]
			if _, err := r.mem.ReadAt(b[n:], int64(run.Start)); err != nil {
				return err
			}
			to := n
			err := split(b[n:], func(f, t int, zero bool) error {
				if !zero {
					runs = append(runs, image.Range{Start: run.Start + uint64(f), End: run.Start + uint64(t)})
					to += copy(b[to:], b[n+f:n+t])
				}
				return nil
			})
			b = b[:to]
			return err
		})
		if err != nil {
			return b, nil, err
		}
	}
	return b, runs, nil
}

// runs calls fn for the runs of pages of its own that a process has in a range, until it
// returns an error.
func (r *Reader) runs(x image.Range, fn func(image.Range) error) error {
	for at := x.Start; at < x.End; {
		n, next, err := r.scan(at, x.End)
		if err != nil {
			return err
		}
		for _, run := range r.vec[:n] {
			if err := fn(image.Range{Start: run.Start, End: run.End}); err != nil {
				return err
			}
		}
		if n < len(r.vec) {
			return nil
		}
		at = next
	}
	return nil
}
