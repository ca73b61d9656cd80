package mem

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/image"
)

// maxName is ANON_VMA_NAME_MAX_LEN (include/linux/mm.h) without the final NUL.
const maxName = 79

// AddFacts adds what the images of mappings have no field for.
func AddFacts(f *image.MemoryFacts, vmas []*VMA) {
	for _, v := range vmas {
		r := image.Range{Start: v.Start, End: v.End}
		f.Guards = append(f.Guards, v.Guards...)
		if v.Sealed {
			f.Sealed = append(f.Sealed, r)
		}
		if v.OnFault {
			f.OnFault = append(f.OnFault, r)
		}
		if v.Name != "" {
			f.Names = append(f.Names, image.NamedRange{Range: r, Name: v.Name})
		}
	}
}

// HasFacts tells whether there is anything in the facts of a process.
func HasFacts(f *image.MemoryFacts) bool {
	return len(f.Guards)+len(f.Sealed)+len(f.OnFault)+len(f.Names) > 0 || f.LockFuture|f.THPDisable|f.MDWE != 0 || f.Merge
}

// ApplyFacts checks the facts of an image and gives the mappings what they say of them.
func ApplyFacts(vmas []*VMA, f *image.MemoryFacts) error {
	if err := applyGuards(vmas, f.Guards); err != nil {
		return err
	}
	sealed, onFault, named := each(vmas, "sealed range"), each(vmas, "range that is locked on use"), each(vmas, "named range")
	for _, r := range f.Sealed {
		v, err := sealed(r)
		if err != nil {
			return err
		}
		v.Sealed = true
	}
	for _, r := range f.OnFault {
		v, err := onFault(r)
		if err != nil {
			return err
		}
		v.OnFault = true
	}
	for _, r := range f.Names {
		v, err := named(r.Range)
		if err != nil {
			return err
		}
		if r.Name == "" || len(r.Name) > maxName || strings.ContainsFunc(r.Name, badInName) {
			return fmt.Errorf("%q is no name of a mapping", r.Name[:min(len(r.Name), maxName)])
		}
		v.Name = r.Name
	}
	switch {
	case f.LockFuture != 0 && f.LockFuture&^unix.MCL_ONFAULT != unix.MCL_FUTURE:
		return fmt.Errorf("new mappings are locked with unknown flags %#x", f.LockFuture)
	case f.THPDisable&^thpFlags != 0:
		return fmt.Errorf("huge pages are disabled with unknown flags %#x", f.THPDisable)
	case f.MDWE&^mdweFlags != 0:
		return errors.New("memory is denied to be written and executed with unknown flags")
	}
	return nil
}

// badInName tells of bytes that the kernel takes in no name (kernel/sys.c, is_valid_name_char).
func badInName(c rune) bool {
	return c < 0x20 || c > 0x7e || strings.ContainsRune("\\`$[]", c)
}

// each finds VMAs by exact ranges that ascend.
func each(vmas []*VMA, what string) func(image.Range) (*VMA, error) {
	i := 0
	return func(r image.Range) (*VMA, error) {
		for i < len(vmas) && vmas[i].Start < r.Start {
			i++
		}
		if i == len(vmas) || vmas[i].Start != r.Start || vmas[i].End != r.End || vmas[i].Special() {
			return nil, fmt.Errorf("%s %#x-%#x is no mapping", what, r.Start, r.End)
		}
		i++
		return vmas[i-1], nil
	}
}

func applyGuards(vmas []*VMA, guards []image.Range) error {
	i := 0
	for _, g := range guards {
		for i < len(vmas) && vmas[i].End <= g.Start {
			i++
		}
		switch {
		case g.Start%arch.PageSize != 0, g.End%arch.PageSize != 0, g.Start >= g.End:
			return fmt.Errorf("guard region %#x-%#x is not made of whole pages", g.Start, g.End)
		case i == len(vmas), vmas[i].Special(), g.Start < vmas[i].Start, g.End > vmas[i].End:
			return fmt.Errorf("guard region %#x-%#x is not inside one mapping", g.Start, g.End)
		}
		v := vmas[i]
		if n := len(v.Guards); n > 0 && g.Start < v.Guards[n-1].End {
			return fmt.Errorf("guard region %#x-%#x overlaps the one before it", g.Start, g.End)
		}
		v.Guarded, v.Guards = true, append(v.Guards, g)
	}
	return nil
}
