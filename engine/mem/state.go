package mem

import (
	"errors"
	"fmt"
	"sort"

	"golang.org/x/sys/unix"

	"godwit/engine/image"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
)

// prctl options and commands that golang.org/x/sys/unix may lack
// (include/uapi/linux/prctl.h, membarrier.h).
const (
	prSetMDWE        = 65 // Linux 6.3
	prGetMDWE        = 66
	prSetMemoryMerge = 67 // Linux 6.4
	prGetMemoryMerge = 68

	mdweFlags = 1<<0 | 1<<1 // PR_MDWE_REFUSE_EXEC_GAIN, PR_MDWE_NO_INHERIT
	thpFlags  = 1<<0 | 1<<1 // 1 and PR_THP_DISABLE_EXCEPT_ADVISED (Linux 6.18)

	membarrierGetRegistrations = 1 << 9 // Linux 6.3
)

// membarriers are the commands of membarrier(2) that register a process.
var membarriers = []uint32{1 << 2, 1 << 4, 1 << 6, 1 << 8}

// State is what only a process itself can tell of its address space.
type State struct {
	Facts       image.MemoryFacts // without what is known of mappings
	Membarriers uint32            // bits of commands by which it is registered
}

// ReadState asks a process, whose area for system calls has been mapped just now.
// locked is the amount of locked memory that it had before, in bytes.
// Preconditions: as for r.Run.
func ReadState(r *ptrace.Remote, pid int, locked uint64) (*State, error) {
	prctl := func(what string, option int) *ptrace.Call {
		c := ptrace.NewCall(what, unix.SYS_PRCTL, ptrace.Int(option), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
		c.MayFail = true // with EINVAL: older than Linux 6.4
		return c
	}
	merge, mdwe := prctl("read merging of memory", prGetMemoryMerge), prctl("read denial of written code", prGetMDWE)
	thp := prctl("read huge page setting", unix.PR_GET_THP_DISABLE)
	regs := ptrace.NewCall("read membarrier registrations", unix.SYS_MEMBARRIER, ptrace.Int(membarrierGetRegistrations), ptrace.Int(0), ptrace.Int(0))
	regs.MayFail = true
	if err := r.Run(merge, mdwe, thp, regs); err != nil {
		return nil, err
	}
	s := &State{}
	s.Facts.Merge = merge.Ret == 1
	s.Facts.MDWE = uint32(max(mdwe.Ret, 0))
	if thp.Ret > 1 {
		s.Facts.THPDisable = uint32(thp.Ret)
	}
	s.Membarriers = uint32(max(regs.Ret, 0))
	var err error
	s.Facts.LockFuture, err = lockFuture(r, pid, locked)
	return s, err
}

// lockFuture finds out whether new mappings are locked (MCL_FUTURE), which no
// file tells: the area for system calls is a new mapping.
func lockFuture(r *ptrace.Remote, pid int, locked uint64) (uint32, error) {
	st, err := procfs.ReadStatus(pid)
	if err != nil {
		return 0, err
	}
	if st.VmLck <= locked {
		return 0, nil
	}
	maps, err := procfs.ReadSmaps(pid)
	if err != nil {
		return 0, err
	}
	i := sort.Search(len(maps), func(i int) bool { return maps[i].End > r.Area })
	switch {
	case i == len(maps) || maps[i].Start > r.Area:
		return 0, errors.New("the area for system calls is not among the mappings")
	case !maps[i].Has("lo"):
		return 0, nil
	case maps[i].Has("lf"):
		return unix.MCL_FUTURE | unix.MCL_ONFAULT, nil
	}
	return unix.MCL_FUTURE, nil
}

// THPCall disables huge pages as the image says, nil if it does not; inherited says
// that the process may have the setting of another.
func THPCall(disabled bool, f *image.MemoryFacts, inherited bool) *ptrace.Call {
	value, flags := uint32(0), uint32(0)
	if disabled {
		value = 1
	}
	if f != nil && f.THPDisable != 0 {
		value, flags = 1, f.THPDisable&^1
	}
	if value == 0 && !inherited {
		return nil
	}
	return ptrace.NewCall("disable huge pages", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_THP_DISABLE), ptrace.Int(value), ptrace.Int(flags), ptrace.Int(0), ptrace.Int(0))
}

// NameCall gives anonymous memory its name. It may fail on a kernel without names.
func NameCall(v *VMA) *ptrace.Call {
	c := ptrace.NewCall("name "+v.String(), unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_VMA), ptrace.Int(unix.PR_SET_VMA_ANON_NAME),
		ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Str(v.Name))
	c.MayFail = true
	return c
}

// LastCalls give a process what would be in the way while it is built: they come
// after everything that maps, protects or seals. f may be nil.
func LastCalls(vmas []*VMA, f *image.MemoryFacts, registrations uint32) (calls []*ptrace.Call, err error) {
	add := func(what string, nr uintptr, args ...ptrace.Arg) {
		calls = append(calls, ptrace.NewCall(what, nr, args...))
	}
	for _, v := range vmas {
		if v.Sealed {
			add("seal "+v.String(), unix.SYS_MSEAL, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(0))
		}
	}
	for _, m := range membarriers {
		if registrations&m != 0 {
			add(fmt.Sprintf("register for membarrier command %#x", m), unix.SYS_MEMBARRIER, ptrace.Int(m), ptrace.Int(0), ptrace.Int(0))
			registrations &^= m
		}
	}
	if registrations != 0 {
		return nil, fmt.Errorf("image holds unknown membarrier registrations %#x", registrations)
	}
	if f == nil {
		return calls, nil
	}
	if f.Merge {
		add("merge equal memory", unix.SYS_PRCTL, ptrace.Int(prSetMemoryMerge), ptrace.Int(1), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
		for _, v := range vmas {
			if !v.Special() && v.Madvise&(1<<unix.MADV_MERGEABLE) == 0 {
				add("keep from merging "+v.String(), unix.SYS_MADVISE, ptrace.Int(v.Start), ptrace.Int(v.Len()), ptrace.Int(unix.MADV_UNMERGEABLE))
			}
		}
	}
	if f.LockFuture != 0 {
		add("lock new mappings", unix.SYS_MLOCKALL, ptrace.Int(f.LockFuture))
	}
	if f.MDWE != 0 {
		add("deny memory that was written to be executed", unix.SYS_PRCTL, ptrace.Int(prSetMDWE), ptrace.Int(f.MDWE), ptrace.Int(0), ptrace.Int(0), ptrace.Int(0))
	}
	return calls, nil
}
