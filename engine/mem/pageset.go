package mem

import (
	"maps"
	"math/bits"
	"slices"

	"godwit/engine/arch"
)

// PageSet is a set of pages of an address space, of which few are near each other or
// many: it takes 64 bytes for 2 MiB that have some.
type PageSet struct {
	blocks map[uint64]*block // by address / blockSize
	order  []uint64          // their keys, ascending; nil: to be made
}

// block are the pages of blockSize bytes, a bit each.
type block [8]uint64

const blockSize = 512 * arch.PageSize

// each calls fn for every block that has pages, or make: might get some, of
// [start, end) with the first of its pages in that range and the one behind the last.
func (s *PageSet) each(start, end uint64, make bool, fn func(key uint64, b *block, from, to uint)) {
	if start >= end {
		return
	}
	visit := func(key uint64) {
		b := s.blocks[key]
		if b == nil {
			if !make {
				return
			}
			b = &block{}
			if s.blocks == nil {
				s.blocks = map[uint64]*block{}
			}
			s.blocks[key], s.order = b, nil
		}
		lo, hi := max(start, key*blockSize), min(end, (key+1)*blockSize)
		fn(key, b, uint(lo%blockSize/arch.PageSize), uint((hi-1)%blockSize/arch.PageSize+1))
	}
	first, last := start/blockSize, (end-1)/blockSize
	if make || last-first < uint64(len(s.blocks)) {
		for key := first; key <= last; key++ {
			visit(key)
		}
		return
	}
	if s.order == nil {
		s.order = slices.Sorted(maps.Keys(s.blocks))
	}
	order := s.order
	i, _ := slices.BinarySearch(order, first)
	for ; i < len(order) && order[i] <= last; i++ {
		visit(order[i])
	}
}

// mask has the bits of pages [from, to) that are in word w of a block.
func mask(w int, from, to uint) uint64 {
	lo, hi := uint(w)*64, uint(w)*64+64
	from, to = max(from, lo), min(to, hi)
	if from >= to {
		return 0
	}
	return ^uint64(0) << (from - lo) & (^uint64(0) >> (hi - to))
}

// Add puts the pages of [start, end) in.
func (s *PageSet) Add(start, end uint64) {
	s.each(start, end, true, func(_ uint64, b *block, from, to uint) {
		for w := range b {
			b[w] |= mask(w, from, to)
		}
	})
}

// Remove takes the pages of [start, end) out.
func (s *PageSet) Remove(start, end uint64) {
	var empty []uint64
	s.each(start, end, false, func(key uint64, b *block, from, to uint) {
		for w := range b {
			b[w] &^= mask(w, from, to)
		}
		if *b == (block{}) {
			empty = append(empty, key)
		}
	})
	for _, key := range empty {
		delete(s.blocks, key)
		s.order = nil
	}
}

// Runs calls fn for every run of pages in [start, end) that are in the set.
func (s *PageSet) Runs(start, end uint64, fn func(start, end uint64)) {
	var at, to uint64 // of the run so far, if at < to
	s.each(start, end, false, func(key uint64, b *block, first, last uint) {
		for w := range b {
			for m := b[w] & mask(w, first, last); m != 0; {
				lo := uint(bits.TrailingZeros64(m))
				n := uint(bits.TrailingZeros64(^(m >> lo)))
				a := key*blockSize + (uint64(w)*64+uint64(lo))*arch.PageSize
				if a == to {
					to += uint64(n) * arch.PageSize
				} else {
					if at < to {
						fn(at, to)
					}
					at, to = a, a+uint64(n)*arch.PageSize
				}
				if lo+n == 64 {
					break
				}
				m &= ^uint64(0) << (lo + n)
			}
		}
	})
	if at < to {
		fn(at, to)
	}
}

// Absent calls fn for every run of pages in [start, end) that are not in the set.
func (s *PageSet) Absent(start, end uint64, fn func(start, end uint64)) {
	at := start
	s.Runs(start, end, func(a, b uint64) {
		if a > at {
			fn(at, a)
		}
		at = b
	})
	if at < end {
		fn(at, end)
	}
}

// Any tells whether a page of [start, end) is in the set.
func (s *PageSet) Any(start, end uint64) (found bool) {
	s.Runs(start, end, func(uint64, uint64) { found = true })
	return found
}

// Clone returns a set that has the same pages.
func (s *PageSet) Clone() PageSet {
	c := PageSet{blocks: make(map[uint64]*block, len(s.blocks))}
	for key, b := range s.blocks {
		own := *b
		c.blocks[key] = &own
	}
	return c
}

// Next gives the first run of pages at or behind an address, up to the end of the 2 MiB
// that it begins in.
func (s *PageSet) Next(from uint64) (start, end uint64, ok bool) {
	if s.order == nil {
		s.order = slices.Sorted(maps.Keys(s.blocks))
	}
	i, _ := slices.BinarySearch(s.order, from/blockSize)
	for ; i < len(s.order) && !ok; i++ {
		key := s.order[i]
		s.Runs(max(from, key*blockSize), (key+1)*blockSize, func(a, b uint64) {
			if !ok {
				start, end, ok = a, b, true
			}
		})
	}
	return start, end, ok
}
