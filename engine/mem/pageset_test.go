package mem

import (
	"math/rand/v2"
	"testing"

	"godwit/engine/arch"
)

// TestPageSet compares the set with a map of pages.
func TestPageSet(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const base, pages = 0x7f00_0000_0000 - 700*arch.PageSize, 3000
	var s PageSet
	model := map[uint64]bool{}
	for range 400 {
		a := rng.Uint64N(pages)
		b := a + rng.Uint64N(min(pages-a, 1<<rng.UintN(12))+1)
		start, end := base+a*arch.PageSize, base+b*arch.PageSize
		put := rng.IntN(2) == 0
		if put {
			s.Add(start, end)
		} else {
			s.Remove(start, end)
		}
		for p := start; p < end; p += arch.PageSize {
			model[p] = put
		}
		a = rng.Uint64N(pages)
		start, end = base+a*arch.PageSize, base+(a+rng.Uint64N(pages-a+1))*arch.PageSize
		if rng.IntN(10) == 0 {
			start, end = 0, arch.TaskSize
		}
		seen := map[uint64]bool{}
		last := uint64(0)
		s.Runs(start, end, func(from, to uint64) {
			if from >= to || from < start || to > end || last != 0 && from <= last {
				t.Fatalf("run %x-%x of %x-%x after one up to %x", from, to, start, end, last)
			}
			last = to
			for p := from; p < to; p += arch.PageSize {
				seen[p] = true
			}
		})
		lo, hi := max(start, base), min(end, base+pages*arch.PageSize)
		for p := lo; p < hi; p += arch.PageSize {
			if seen[p] != model[p] {
				t.Fatalf("page %x is in the set: %v, want %v", p, seen[p], model[p])
			}
		}
		n := uint64(0)
		s.Absent(lo, hi, func(from, to uint64) {
			for p := from; p < to; p += arch.PageSize {
				if model[p] {
					t.Fatalf("page %x is absent", p)
				}
				n++
			}
		})
		if want := (hi-lo)/arch.PageSize - uint64(len(seen)); lo < hi && n != want {
			t.Fatalf("%d pages are absent, want %d", n, want)
		}
	}
	c := s.Clone()
	s.Remove(0, arch.TaskSize)
	if len(s.blocks) != 0 {
		t.Errorf("%d blocks are left", len(s.blocks))
	}
	n := 0
	for at := uint64(0); ; {
		from, to, ok := c.Next(at)
		if !ok {
			break
		}
		if from < at || from >= to {
			t.Fatalf("next run %x-%x from %x on", from, to, at)
		}
		for p := from; p < to; p, n = p+arch.PageSize, n+1 {
			if !model[p] {
				t.Fatalf("page %x is in the clone", p)
			}
		}
		at = to
	}
	want := 0
	for _, in := range model {
		if in {
			want++
		}
	}
	if n != want {
		t.Errorf("the clone has %d pages, want %d", n, want)
	}
}
