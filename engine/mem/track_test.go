package mem

import (
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
)

// TestLay compares lists of regions with what is known of each page.
func TestLay(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	const pages = 200
	var list []image.Region
	model := map[uint64]uint32{}
	for round := range 2000 {
		var news []image.Region
		for at := rng.Uint64N(40); at < pages; at += rng.Uint64N(60) {
			end := min(at+1+rng.Uint64N(30), pages)
			flags := uint32(rng.IntN(3) + 1)
			news = append(news, image.Region{Range: image.Range{Start: at * arch.PageSize, End: end * arch.PageSize}, Flags: flags, Prot: uint32(round)})
			for p := at; p < end; p++ {
				model[p] = flags
			}
			at = end
		}
		before := slices.Clone(list)
		got := Lay(list, news)
		if !slices.Equal(before, list) {
			t.Fatal("the list that was given has changed")
		}
		list = got
		seen, last := map[uint64]uint32{}, uint64(0)
		for _, r := range list {
			if r.Start >= r.End || r.Start < last {
				t.Fatalf("region %x-%x after %x", r.Start, r.End, last)
			}
			last = r.End
			for p := r.Start / arch.PageSize; p < r.End/arch.PageSize; p++ {
				seen[p] = r.Flags
			}
		}
		for p := range uint64(pages) {
			if seen[p] != model[p] {
				t.Fatalf("round %d: page %d has %d, want %d: %v", round, p, seen[p], model[p], list)
			}
		}
		// What a mapping lacks is what the list does not have as such.
		v := &VMA{Start: 20 * arch.PageSize, End: 150 * arch.PageSize, Flags: 1 | unix.MAP_LOCKED}
		lacks := map[uint64]bool{}
		i := slices.IndexFunc(list, func(r image.Region) bool { return r.End > v.Start })
		if i < 0 {
			i = len(list)
		}
		for _, r := range unknown(v, list[i:]) {
			for p := r.Start / arch.PageSize; p < r.End/arch.PageSize; p++ {
				lacks[p] = true
			}
		}
		for p := uint64(20); p < 150; p++ {
			if lacks[p] != (model[p] != 1) {
				t.Fatalf("round %d: page %d is lacking: %v, it has %d", round, p, lacks[p], model[p])
			}
		}
		if len(list) > 60 {
			list, model = nil, map[uint64]uint32{}
		}
	}
}
