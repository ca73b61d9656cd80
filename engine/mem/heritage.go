package mem

import (
	"bytes"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
)

// Inherit finds the mappings of a process that it has from the one out of which it
// was cloned, whose mappings were parent: memory that is private to both and that
// they share until one of them writes. It notes them in Kept and KeptProt. huge tells
// whether a mapped file consists of huge pages, which are not kept.
func Inherit(vmas, parent []*VMA, huge func(*VMA) bool) {
	for _, v := range vmas {
		i := sort.Search(len(parent), func(i int) bool { return parent[i].End > v.Start })
		if i < len(parent) && inherits(v, parent[i]) && !(v.Mapped() && huge(v)) {
			v.Kept, v.KeptProt = min(v.End, parent[i].End), parent[i].Prot
		}
	}
}

// Common tells whether a process could have any memory by Inherit.
func Common(vmas, parent []*VMA) bool {
	return slices.ContainsFunc(vmas, func(v *VMA) bool {
		i := sort.Search(len(parent), func(i int) bool { return parent[i].End > v.Start })
		return i < len(parent) && inherits(v, parent[i])
	})
}

// inherits tells whether v can be made of what is there of p after a clone.
func inherits(v, p *VMA) bool {
	const never = unix.MAP_HUGETLB | Droppable
	const notCloned = 1<<unix.MADV_DONTFORK | 1<<unix.MADV_WIPEONFORK
	switch {
	// A clone is not locked.
	case !v.HasPages(), v.Start < p.Start, v.Flags != p.Flags&^unix.MAP_LOCKED, v.Status != p.Status, v.Flags&never != 0,
		v.ShmID != p.ShmID, v.OpenFlags != p.OpenFlags, v.Madvise != p.Madvise, v.Madvise&notCloned != 0, v.Name != p.Name:
		return false
	case v.Mapped() && (v.End > p.End || v.Offset-p.Offset != v.Start-p.Start):
		return false
	}
	inside := func(g image.Range) bool { return g.End <= v.Start || g.Start >= v.End }
	return slices.Equal(v.Guards, slices.DeleteFunc(slices.Clone(p.Guards), inside))
}

// differing writes those pages of b alone that are not there already.
func (w *Writer) differing(v *VMA, addr uint64, b []byte) error {
	if w.old == nil {
		w.old = make([]byte, ChunkSize)
	}
	for len(b) > 0 {
		part := b[:min(len(b), len(w.old))]
		old := w.old[:len(part)]
		if !w.read(addr, old) {
			return w.write(v, addr, b)
		}
		equal := func(i int) bool { return bytes.Equal(part[i:i+arch.PageSize], old[i:i+arch.PageSize]) }
		for i := 0; i < len(part); {
			same, j := equal(i), i+arch.PageSize
			for j < len(part) && equal(j) == same {
				j += arch.PageSize
			}
			if same {
				w.Shared += uint64(j-i) / arch.PageSize
			} else if err := w.write(v, addr+uint64(i), part[i:j]); err != nil {
				return err
			}
			i = j
		}
		w.Compared += uint64(len(part)) / arch.PageSize
		addr += uint64(len(part))
		b = b[len(part):]
	}
	return nil
}

// read goes through /proc/PID/mem: process_vm_readv would make shared pages the
// reader's own (gup_must_unshare, mm/internal.h).
func (w *Writer) read(addr uint64, b []byte) bool {
	_, err := w.mem.ReadAt(b, int64(addr))
	return err == nil
}
