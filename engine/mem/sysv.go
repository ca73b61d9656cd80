package mem

import (
	"fmt"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/sys"
)

// Attachment is one shmat(2): all VMAs that it consists of, ascending, which
// mprotect(2) and munmap(2) may have made several. Start and End are those of the
// whole segment.
type Attachment struct {
	Start, End uint64
	Segment    uint64
	VMAs       []*VMA
	shown      uint64 // bytes that are mapped
}

// Write tells whether it was attached for writing.
func (a *Attachment) Write() bool {
	for _, v := range a.VMAs {
		if v.Prot&unix.PROT_WRITE != 0 || v.OpenFlags&unix.O_ACCMODE == unix.O_RDWR {
			return true
		}
	}
	return false
}

// Flags are those of the shmat call and the protection that it gives.
func (a *Attachment) Flags() (flags, prot int) {
	prot = unix.PROT_READ | unix.PROT_WRITE
	if !a.Write() {
		flags, prot = sys.ShmRdonly, unix.PROT_READ
	}
	for _, v := range a.VMAs {
		if v.Prot&unix.PROT_EXEC != 0 {
			flags |= sys.ShmExec
			prot |= unix.PROT_EXEC
			break
		}
	}
	return flags, prot
}

// Attachments groups the System V mappings of a process. size gives the bytes of a
// segment.
func Attachments(vmas []*VMA, size func(id uint64) (uint64, error)) (out []*Attachment, err error) {
	type place struct{ segment, base uint64 }
	known := map[place]*Attachment{}
	for _, v := range vmas {
		if !v.Is(Sysvipc) {
			continue
		}
		n, err := size(v.ShmID)
		if err != nil {
			return nil, err
		}
		whole := (n + arch.PageSize - 1) / arch.PageSize * arch.PageSize
		if v.Offset > whole || v.Len() > whole-v.Offset {
			return nil, fmt.Errorf("%s reaches past the end of System V segment %d", v, v.ShmID)
		}
		k := place{v.ShmID, v.Start - v.Offset}
		a := known[k]
		if a == nil {
			a = &Attachment{Start: k.base, End: k.base + whole, Segment: v.ShmID}
			known[k] = a
			out = append(out, a)
		}
		a.VMAs = append(a.VMAs, v)
		a.shown += v.Len()
	}
	return out, nil
}

// Whole tells whether all of the segment is there: parts of it may have been unmapped.
func (a *Attachment) Whole() bool { return a.shown == a.End-a.Start }
