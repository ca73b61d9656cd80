package mem

import (
	"testing"

	"godwit/engine/arch"
	"godwit/engine/sys"
)

func TestAttachments(t *testing.T) {
	const p = arch.PageSize
	vma := func(start, end, off, id uint64, prot int) *VMA {
		return &VMA{Start: start * p, End: end * p, Offset: off * p, ShmID: id, Prot: prot, Status: Regular | AnonShared | Sysvipc}
	}
	for _, c := range []struct {
		name    string
		vmas    []*VMA
		want    int
		flags   int // of the first
		prot    int
		partly  bool // of the first
		refused bool
	}{
		{name: "none", vmas: []*VMA{{Start: p, End: 2 * p, Status: Regular | AnonPrivate}}},
		{name: "one", vmas: []*VMA{vma(1, 4, 0, 7, 3)}, want: 1, prot: 3},
		{name: "read-only", vmas: []*VMA{vma(1, 4, 0, 7, 1)}, want: 1, prot: 1, flags: sys.ShmRdonly},
		{name: "executable", vmas: []*VMA{vma(1, 4, 0, 7, 7)}, want: 1, prot: 7, flags: sys.ShmExec},
		{name: "split by mprotect", vmas: []*VMA{vma(1, 2, 0, 7, 1), vma(2, 3, 1, 7, 0), vma(3, 4, 2, 7, 3)}, want: 1, prot: 3},
		{name: "twice side by side", vmas: []*VMA{vma(1, 4, 0, 7, 3), vma(4, 7, 0, 7, 3)}, want: 2, prot: 3},
		{name: "head unmapped", vmas: []*VMA{vma(2, 4, 1, 7, 3)}, want: 1, prot: 3, partly: true},
		{name: "tail unmapped", vmas: []*VMA{vma(1, 3, 0, 7, 3)}, want: 1, prot: 3, partly: true},
		{name: "hole", vmas: []*VMA{vma(1, 2, 0, 7, 3), vma(3, 4, 2, 7, 3)}, want: 1, prot: 3, partly: true},
		{name: "another in the hole", vmas: []*VMA{vma(1, 2, 0, 7, 3), vma(2, 3, 0, 8, 3), vma(3, 4, 2, 7, 3)}, want: 2, prot: 3, partly: true},
		{name: "head beyond the start of memory", vmas: []*VMA{vma(1, 2, 2, 7, 3)}, want: 1, prot: 3, partly: true},
		{name: "behind the segment", vmas: []*VMA{vma(9, 10, 3, 7, 3)}, refused: true},
		{name: "longer than the segment", vmas: []*VMA{vma(1, 6, 0, 7, 3)}, refused: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Attachments(c.vmas, func(uint64) (uint64, error) { return 2*p + 1, nil })
			if (err != nil) != c.refused {
				t.Fatalf("got %v, want refusal %v", err, c.refused)
			}
			if len(got) != c.want && !c.refused {
				t.Fatalf("got %d attachments, want %d", len(got), c.want)
			}
			if c.want > 0 {
				if got[0].Whole() == c.partly {
					t.Errorf("whole: %v", got[0].Whole())
				}
				if flags, prot := got[0].Flags(); flags != c.flags || prot != c.prot {
					t.Errorf("flags %#o, protection %d; want %#o and %d", flags, prot, c.flags, c.prot)
				}
			}
		})
	}
}
