package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Modes of seccomp (include/uapi/linux/seccomp.h).
const (
	seccompStrict = 1
	seccompFilter = 2
)

// Filters are the seccomp filters of a tree as they go into one image: each
// with the one that it was installed upon. What several threads have is in it once.
type Filters struct {
	list  []*seccomp.SeccompFilter
	known map[string]uint32
}

// Image is the image of all filters that were read, nil if there are none.
func (f *Filters) Image() *seccomp.SeccompEntry {
	if len(f.list) == 0 {
		return nil
	}
	return &seccomp.SeccompEntry{SeccompFilters: f.list}
}

// read reads the filters of a stopped thread and gives the number of its last.
func (f *Filters) read(tid int) (last uint32, err error) {
	var prev *uint32
	for n := 0; ; n++ {
		prog, flags, err := sys.PtraceSeccompFilter(tid, n)
		if errors.Is(err, unix.ENOENT) && prev != nil {
			return *prev, nil
		}
		if err != nil {
			return 0, fmt.Errorf("read seccomp filter %d: %w", n, err)
		}
		if asksSupervisor(prog) {
			return 0, errors.New("its seccomp filter leaves decisions to a supervisor (SECCOMP_RET_USER_NOTIF), which cannot be carried")
		}
		prev = proto.Uint32(f.add(prog, uint32(flags), prev))
	}
}

func (f *Filters) add(prog []byte, flags uint32, prev *uint32) uint32 {
	key := fmt.Sprintf("%d %v %s", flags, prev == nil, prog)
	e := &seccomp.SeccompFilter{Filter: prog, Flags: &flags}
	if prev != nil {
		key = fmt.Sprintf("%d on %d %s", flags, *prev, prog)
		e.Prev = prev
	}
	if id, ok := f.known[key]; ok {
		return id
	}
	if f.known == nil {
		f.known = map[string]uint32{}
	}
	id := uint32(len(f.list))
	f.list, f.known[key] = append(f.list, e), id
	return id
}

// asksSupervisor tells whether a program has a return of SECCOMP_RET_USER_NOTIF.
func asksSupervisor(prog []byte) bool {
	const retConst, userNotif, action = 0x06, 0x7fc00000, 0xffff0000
	for insn := range slices.Chunk(prog, sys.SeccompInsnSize) {
		if binary.LittleEndian.Uint16(insn) == retConst && binary.LittleEndian.Uint32(insn[4:])&action == userNotif {
			return true
		}
	}
	return false
}

// maxChain bounds how many filters a thread can have: each counts at least 5
// of the 32768 instructions that the kernel allows (MAX_INSNS_PER_PATH,
// kernel/seccomp.c).
const maxChain = 32768 / 5

// Chain gives the filters of a thread whose last is number last, the oldest first.
func Chain(e *seccomp.SeccompEntry, last uint32) ([]*seccomp.SeccompFilter, error) {
	var chain []*seccomp.SeccompFilter
	for id := last; ; {
		if uint64(id) >= uint64(len(e.GetSeccompFilters())) {
			return nil, fmt.Errorf("image refers to seccomp filter %d of %d", id, len(e.GetSeccompFilters()))
		}
		f := e.GetSeccompFilters()[id]
		if n := len(f.GetFilter()); n == 0 || n%sys.SeccompInsnSize != 0 || n > sys.SeccompMaxInsns*sys.SeccompInsnSize {
			return nil, fmt.Errorf("image holds a seccomp filter of %d bytes", n)
		}
		if chain = append(chain, f); len(chain) > maxChain {
			return nil, fmt.Errorf("image holds more than %d seccomp filters on one thread", maxChain)
		}
		if f.Prev == nil {
			slices.Reverse(chain)
			return chain, nil
		}
		id = f.GetPrev()
	}
}

// FilterCall installs a filter in the thread that makes the call, or, with all,
// in every thread of its process as one that they share.
// Preconditions: the thread has CAP_SYS_ADMIN.
func FilterCall(f *seccomp.SeccompFilter, all bool) *ptrace.Call {
	const setModeFilter, tsync = 1, 1 // SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC
	flags := f.GetFlags()
	if all {
		flags |= tsync
	}
	// struct sock_fprog: length, padding, pointer; the program is behind it.
	prog := put64(uint64(len(f.GetFilter())/sys.SeccompInsnSize), 0)
	at := len(prog)
	return ptrace.NewCall(fmt.Sprintf("install a seccomp filter of %d instructions", len(f.GetFilter())/sys.SeccompInsnSize), unix.SYS_SECCOMP,
		ptrace.Int(setModeFilter), ptrace.Int(flags), ptrace.Arg{In: append(prog, f.GetFilter()...), Rel: []ptrace.Rel{{At: 8, To: at}}})
}

// StrictCall puts the thread that makes it under strict seccomp.
func StrictCall() *ptrace.Call {
	return ptrace.NewCall("enter strict seccomp", unix.SYS_PRCTL, ptrace.Int(unix.PR_SET_SECCOMP), ptrace.Int(seccompStrict))
}
