package mem

import (
	"fmt"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/sys"
)

// Attachment is one shmat(2): all VMAs that it consists of, ascending, which
// mprotect(2) may have made several.
type Attachment struct {
	Start, End uint64
	Segment    uint64
	VMAs       []*VMA
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

// Attachments groups the System V mappings of a process, ascending. size gives the
// bytes of a segment. One that does not show its whole segment, because parts of
// it were unmapped, cannot be made by shmat and is an error.
func Attachments(vmas []*VMA, size func(id uint64) (uint64, error)) (out []*Attachment, err error) {
	for _, v := range vmas {
		if !v.Is(Sysvipc) {
			continue
		}
		if n := len(out); n > 0 && out[n-1].Segment == v.ShmID && out[n-1].End == v.Start && v.Offset == v.Start-out[n-1].Start {
			out[n-1].End = v.End
			out[n-1].VMAs = append(out[n-1].VMAs, v)
			continue
		}
		if v.Offset != 0 {
			return nil, partly(v)
		}
		out = append(out, &Attachment{Start: v.Start, End: v.End, Segment: v.ShmID, VMAs: []*VMA{v}})
	}
	for _, a := range out {
		n, err := size(a.Segment)
		if err != nil {
			return nil, err
		}
		if whole := (n + arch.PageSize - 1) / arch.PageSize * arch.PageSize; a.End-a.Start != whole {
			return nil, partly(a.VMAs[0])
		}
	}
	return out, nil
}

// PartlyError says that part of an attachment is missing.
type PartlyError struct{ VMA *VMA }

func partly(v *VMA) error { return &PartlyError{v} }

func (e *PartlyError) Error() string {
	return fmt.Sprintf("%s is only a part of System V segment %d", e.VMA, e.VMA.ShmID)
}
