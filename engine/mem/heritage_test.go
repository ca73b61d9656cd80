package mem

import (
	"testing"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
)

func TestInherit(t *testing.T) {
	const (
		p    = arch.PageSize
		rw   = unix.PROT_READ | unix.PROT_WRITE
		anon = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	)
	private := func(start, end uint64, change ...func(*VMA)) *VMA {
		v := &VMA{Start: start * p, End: end * p, Prot: rw, Flags: anon, Status: Regular | AnonPrivate}
		for _, c := range change {
			c(v)
		}
		return v
	}
	file := func(start, end, off uint64) *VMA {
		return &VMA{Start: start * p, End: end * p, Offset: off * p, Prot: rw, Flags: unix.MAP_PRIVATE, Status: Regular | FilePrivate, ShmID: 3}
	}
	guards := func(pages ...uint64) func(*VMA) {
		return func(v *VMA) {
			for _, g := range pages {
				v.Guards = append(v.Guards, image.Range{Start: g * p, End: (g + 1) * p})
			}
		}
	}
	flag := func(f int) func(*VMA) { return func(v *VMA) { v.Flags |= f } }
	advice := func(a int) func(*VMA) { return func(v *VMA) { v.Madvise |= 1 << a } }
	for _, c := range []struct {
		name          string
		child, parent *VMA
		kept          uint64 // page, 0: nothing
	}{
		{"same", private(10, 20), private(10, 20), 20},
		{"grown", private(10, 25), private(10, 20), 20},
		{"shrunk", private(10, 15), private(10, 20), 15},
		{"a part", private(12, 15), private(10, 20), 15},
		{"grown downwards", private(8, 20), private(10, 20), 0},
		{"elsewhere", private(30, 40), private(10, 20), 0},
		{"other protection", private(10, 20, func(v *VMA) { v.Prot = 0 }), private(10, 20), 20},
		{"locked", private(10, 20, flag(unix.MAP_LOCKED)), private(10, 20, flag(unix.MAP_LOCKED)), 0},
		{"locked in the parent", private(10, 20), private(10, 20, flag(unix.MAP_LOCKED)), 20},
		{"huge pages", private(10, 20, flag(unix.MAP_HUGETLB)), private(10, 20, flag(unix.MAP_HUGETLB)), 0},
		{"other flags", private(10, 20, flag(unix.MAP_NORESERVE)), private(10, 20), 0},
		{"other advice", private(10, 20, advice(unix.MADV_HUGEPAGE)), private(10, 20), 0},
		{"not cloned", private(10, 20, advice(unix.MADV_DONTFORK)), private(10, 20, advice(unix.MADV_DONTFORK)), 0},
		{"wiped", private(10, 20, advice(unix.MADV_WIPEONFORK)), private(10, 20, advice(unix.MADV_WIPEONFORK)), 0},
		{"same guards", private(10, 20, guards(11, 12)), private(10, 20, guards(11, 12)), 20},
		{"guards of a part", private(14, 20, guards(15)), private(10, 20, guards(11, 15)), 20},
		{"more guards", private(10, 20, guards(11, 12)), private(10, 20, guards(11)), 0},
		{"fewer guards", private(10, 20, guards(11)), private(10, 20, guards(11, 12)), 0},
		{"other name", private(10, 20, func(v *VMA) { v.Name = "x" }), private(10, 20), 0},
		{"file", file(10, 20, 5), file(10, 20, 5), 20},
		{"part of a file", file(12, 18, 7), file(10, 20, 5), 18},
		{"other part of a file", file(12, 18, 5), file(10, 20, 5), 0},
		{"more of a file", file(10, 22, 5), file(10, 20, 5), 0},
		{"file and memory", file(10, 20, 0), private(10, 20), 0},
		{"huge file", func() *VMA { v := file(10, 20, 5); v.Path = "huge"; return v }(), file(10, 20, 5), 0},
		{"shared", &VMA{Start: 10 * p, End: 20 * p, Flags: unix.MAP_SHARED, Status: Regular | AnonShared}, &VMA{Start: 10 * p, End: 20 * p, Flags: unix.MAP_SHARED, Status: Regular | AnonShared}, 0},
		{"[vdso]", &VMA{Start: 10 * p, End: 20 * p, Status: Regular | Vdso | AnonPrivate}, &VMA{Start: 10 * p, End: 20 * p, Status: Regular | Vdso | AnonPrivate}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			parent := []*VMA{private(1, 2), c.parent, private(100, 110)}
			Inherit([]*VMA{c.child}, parent, func(v *VMA) bool { return v.Path == "huge" })
			if c.child.Kept != c.kept*p {
				t.Errorf("%#x is kept, want %#x", c.child.Kept, c.kept*p)
			}
			if c.kept != 0 && c.child.KeptProt != rw {
				t.Errorf("protection there is %d", c.child.KeptProt)
			}
			if got := Common([]*VMA{c.child}, parent); got != (c.kept != 0) && c.child.Path != "huge" {
				t.Errorf("in common: %v", got)
			}
		})
	}
}
