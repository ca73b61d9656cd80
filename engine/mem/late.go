package mem

import (
	"slices"

	"godwit/engine/arch"
	"godwit/engine/image"
)

// Map finds, from an address on, where a process has pages of its own, present or swapped:
// at most n runs, ascending, and where to go on; 0: that is all. The process is frozen.
func (r *Reader) Map(from uint64, n int) (runs []image.Range, next uint64, err error) {
	for at := from; at < arch.TaskSize; {
		k, to, err := r.scan(at, arch.TaskSize)
		if err != nil {
			return nil, 0, err
		}
		for _, x := range r.vec[:k] {
			if len(runs) == n {
				return runs, x.Start, nil
			}
			runs = append(runs, image.Range{Start: x.Start, End: x.End})
		}
		if k < len(r.vec) {
			break
		}
		at = to
	}
	return runs, 0, nil
}

// Take appends the pages of its own that a frozen process has in [start, end), but
// those that are all zeros, to b, and tells which they are.
func (r *Reader) Take(start, end uint64, b []byte) (_ []byte, runs []image.Range, err error) {
	for at := start; at < end; {
		k, next, err := r.scan(at, end)
		if err != nil {
			return b, nil, err
		}
		for _, x := range r.vec[:k] {
			n := len(b)
			b = slices.Grow(b, int(x.End-x.Start))[:n+int(x.End-x.Start)]
			if _, err := r.mem.ReadAt(b[n:], int64(x.Start)); err != nil {
				return b, nil, err
			}
			to := n
			err := split(b[n:], func(f, t int, zero bool) error {
				if zero {
					return nil
				}
				runs = append(runs, image.Range{Start: x.Start + uint64(f), End: x.Start + uint64(t)})
				to += copy(b[to:], b[n+f:n+t])
				return nil
			})
			if err != nil {
				return b, nil, err
			}
			b = b[:to]
		}
		if k < len(r.vec) {
			break
		}
		at = next
	}
	return b, runs, nil
}
