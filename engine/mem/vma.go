// Package mem owns the address space of a process: its mappings as they are
// read, judged, imaged and built again, and the transfer of page contents. It
// must not know descriptors, tasks' other state or where images go.
package mem

import (
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"godwit/engine/arch"
	"godwit/engine/image"
	"godwit/engine/procfs"
)

// Status bits of a VMA in CRIU's images (field status of vma_entry).
const (
	Regular     = 1 << 0
	Stack       = 1 << 1
	Vsyscall    = 1 << 2
	Vdso        = 1 << 3
	Heap        = 1 << 5
	FilePrivate = 1 << 6
	FileShared  = 1 << 7
	AnonShared  = 1 << 8
	AnonPrivate = 1 << 9
	Sysvipc     = 1 << 10
	Socket      = 1 << 11
	Vvar        = 1 << 12
	AioRing     = 1 << 13
	Memfd       = 1 << 14
)

// VMA is one mapping. File mappings are opened through Link.
type VMA struct {
	Start, End uint64 // bytes, page-aligned
	Offset     uint64 // bytes into the file or shared memory
	Prot       int    // PROT_*
	Flags      int    // MAP_* as they would make this mapping
	Status     uint32 // Regular and others
	// ShmID is the id of the file entry for file mappings and memfds, of the
	// shared memory for AnonShared, 0 otherwise.
	ShmID uint64
	// Madvise has bit n set for advice n (MADV_*).
	Madvise uint64
	// OpenFlags are those that the mapped file needs: O_RDONLY or O_RDWR.
	OpenFlags int
	// Guarded says that there may be guard regions, Guards which they are.
	Guarded bool
	Guards  []image.Range
	Sealed  bool // mseal(2)
	// OnFault says that a locked mapping is locked page by page as it is used (mlock2(2)).
	OnFault bool
	// Name was given to anonymous memory by PR_SET_VMA_ANON_NAME.
	Name string
	// Accounted says that it is or was writable, so that the kernel accounts it.
	Accounted bool
	// Cow says that pages of it are mapped elsewhere, too: by relatives, since a fork.
	// Own and Common are how much of its pages are not, and are; bytes.
	Cow         bool
	Own, Common uint64
	// Kept is the end of what a restored process has of it from the process out of
	// which it was cloned, KeptProt its protection there; 0: nothing. See Inherit.
	Kept     uint64
	KeptProt int

	Dev, Ino uint64 // of the mapped object
	Path     string // as /proc/PID/maps shows it
}

// Len is the size in bytes.
func (v *VMA) Len() uint64 { return v.End - v.Start }

// Is tells whether all of the status bits are set.
func (v *VMA) Is(status uint32) bool { return v.Status&status == status }

// Special tells whether the kernel itself provides the contents.
func (v *VMA) Special() bool { return v.Status&(Vdso|Vvar|Vsyscall) != 0 }

// HasPages tells whether the contents, or copied pages of them, are dumped with the process.
func (v *VMA) HasPages() bool {
	return !v.Special() && v.Status&(FilePrivate|AnonPrivate|AioRing) != 0
}

// Mapped tells whether the contents come from a file entry.
func (v *VMA) Mapped() bool { return v.Status&(FilePrivate|FileShared|Memfd) != 0 }

// Link is the /proc path through which the mapped object can be opened.
func (v *VMA) Link(pid int) string {
	return fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, v.Start, v.End)
}

func (v *VMA) String() string {
	s := fmt.Sprintf("mapping %x-%x", v.Start, v.End)
	if v.Path != "" {
		s += " " + v.Path
	}
	return s
}

// madviseFlags are VmFlags that an madvise call made (fs/proc/task_mmu.c).
var madviseFlags = map[string]int{
	"dc": unix.MADV_DONTFORK,
	"dd": unix.MADV_DONTDUMP,
	"mg": unix.MADV_MERGEABLE,
	"hg": unix.MADV_HUGEPAGE,
	"nh": unix.MADV_NOHUGEPAGE,
	"wf": unix.MADV_WIPEONFORK,
	"sr": unix.MADV_SEQUENTIAL,
	"rr": unix.MADV_RANDOM,
}

// refusedFlags are VmFlags of mappings that cannot be carried.
var refusedFlags = map[string]string{
	"io": "device memory",
	"pf": "memory that a driver maps by page frame",
	"um": "memory under the program's own userfaultfd",
	"uw": "memory under the program's own userfaultfd",
	"ui": "memory under the program's own userfaultfd",
	"ss": "a shadow stack",
}

// keyed refuses memory with a protection key (pkey_mprotect(2)), but for the one
// that the kernel itself gives to memory that may only be executed.
func keyed(m *procfs.SmapsEntry) bool {
	return m.ProtKey != 0 && m.Prot() != unix.PROT_EXEC
}

// Classify turns one mapping of /proc/PID/smaps into a VMA. A non-empty reason
// says why it cannot be carried. A nil VMA without a reason is not part of
// what is restored ([vsyscall]).
func Classify(m *procfs.SmapsEntry) (v *VMA, reason string) {
	v = &VMA{
		Start: m.Start, End: m.End, Offset: m.Offset, Prot: int(m.Prot()), Status: Regular,
		Dev: unix.Mkdev(m.Major, m.Minor), Ino: m.Inode, Path: m.Path, Cow: m.Elsewhere > 0, Own: m.Rss - min(m.Rss, m.Elsewhere) + m.Swap, Common: m.Elsewhere,
	}
	switch {
	case m.Path == "[vsyscall]":
		return nil, ""
	case m.Path == "[vdso]":
		v.Status |= Vdso | AnonPrivate
		v.Flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		return v, ""
	case m.Path == "[vvar]", m.Path == "[vvar_vclock]":
		v.Status |= Vvar | AnonPrivate
		v.Flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		return v, ""
	}
	if keyed(m) {
		return v, fmt.Sprintf("memory with protection key %d", m.ProtKey)
	}
	droppable := false
	for _, f := range m.VmFlags {
		if why, ok := refusedFlags[f]; ok {
			return v, why
		}
		if a, ok := madviseFlags[f]; ok {
			v.Madvise |= 1 << uint(a)
		}
		switch f {
		case "gd":
			v.Flags |= unix.MAP_GROWSDOWN
		case "nr":
			v.Flags |= unix.MAP_NORESERVE
		case "lo":
			v.Flags |= unix.MAP_LOCKED
		case "gu":
			v.Guarded = true
		case "sl":
			v.Sealed = true
		case "lf":
			v.OnFault = true
		case "ac":
			v.Accounted = true
		case "dp":
			droppable = true
		}
	}
	switch {
	case m.Shared:
		v.Flags |= unix.MAP_SHARED
		if slices.Contains(m.VmFlags, "mw") {
			v.OpenFlags = os.O_RDWR
		}
	case droppable:
		// The kernel gives it this advice by itself.
		v.Flags |= Droppable
		v.Madvise &^= 1<<unix.MADV_WIPEONFORK | 1<<unix.MADV_DONTDUMP
	default:
		v.Flags |= unix.MAP_PRIVATE
	}
	if m.Has("ht") {
		if v.huge(m) {
			return v, ""
		}
	}
	return v, v.object(m.Shared)
}

// huge fills what is mapped if it is anonymous huge pages, which show the file that
// the kernel makes for them; false for files of hugetlbfs, memfds and segments.
func (v *VMA) huge(m *procfs.SmapsEntry) bool {
	if !m.Deleted || m.Path != "/anon_hugepage" || m.KernelPageSize <= arch.PageSize {
		return false
	}
	v.Flags |= unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | bits.TrailingZeros64(m.KernelPageSize)<<unix.MAP_HUGE_SHIFT
	if m.Shared {
		v.Status |= AnonShared
		return true
	}
	v.Status |= AnonPrivate
	v.Offset = 0
	return true
}

// Droppable is MAP_DROPPABLE (include/uapi/linux/mman.h, Linux 6.11), a type of
// mapping beside MAP_SHARED and MAP_PRIVATE.
const Droppable = 0x08

// HugeFlags are the flags of mmap that say which huge pages it makes.
const HugeFlags = unix.MAP_HUGETLB | unix.MAP_HUGE_MASK<<unix.MAP_HUGE_SHIFT

// object fills what depends on what is mapped.
func (v *VMA) object(shared bool) (reason string) {
	path := v.Path
	switch {
	case v.Ino == 0 && !strings.HasPrefix(path, "/") && !shared:
		if path == "[uprobes]" {
			return "code of probes (uprobes) that somebody set in the program"
		}
		v.Flags |= unix.MAP_ANONYMOUS
		v.Status |= AnonPrivate
		v.Offset = 0
		v.Name, _ = anonName(path, "[anon:")
		switch path {
		case "[heap]":
			v.Status |= Heap
		case "[stack]":
			v.Status |= Stack
		}
	case strings.HasPrefix(path, "/SYSV"):
		v.Flags |= unix.MAP_ANONYMOUS
		v.Status |= AnonShared | Sysvipc
	case strings.HasPrefix(path, "/secretmem"):
		return "memory that is hidden from the kernel (memfd_secret)"
	case strings.HasPrefix(path, "/[aio]"):
		if !shared || v.Prot != unix.PROT_READ|unix.PROT_WRITE || v.Offset != 0 {
			return "a part of a ring of asynchronous I/O (io_setup), or one that was changed"
		}
		v.Status |= AioRing
	case strings.HasPrefix(path, "anon_inode:"), strings.HasPrefix(path, "/anon_inode:"):
		return "memory of " + strings.TrimPrefix(path, "/")
	case strings.HasPrefix(path, "socket:"):
		return "memory of a socket"
	case strings.HasPrefix(path, "/memfd:"):
		v.Status |= Memfd
		if shared {
			v.Status |= FileShared
		} else {
			v.Status |= FilePrivate
		}
	case shared && (strings.HasPrefix(path, "/dev/zero") || strings.HasPrefix(path, "[anon_shmem")):
		v.Flags |= unix.MAP_ANONYMOUS
		v.Status |= AnonShared
		v.Name, _ = anonName(path, "[anon_shmem:")
	case shared:
		v.Status |= FileShared
	default:
		v.Status |= FilePrivate
	}
	return ""
}

// anonName takes the name of anonymous memory out of what /proc/PID/maps shows.
func anonName(path, prefix string) (string, bool) {
	name, ok := strings.CutPrefix(path, prefix)
	if !ok {
		return "", false
	}
	return strings.CutSuffix(name, "]")
}

// ToImage makes CRIU's message.
func (v *VMA) ToImage() *vma.VmaEntry {
	e := &vma.VmaEntry{
		Start:  proto.Uint64(v.Start),
		End:    proto.Uint64(v.End),
		Pgoff:  proto.Uint64(v.Offset),
		Shmid:  proto.Uint64(v.ShmID),
		Prot:   proto.Uint32(uint32(v.Prot)),
		Flags:  proto.Uint32(uint32(v.Flags)),
		Status: proto.Uint32(v.Status),
		Fd:     proto.Int64(-1),
	}
	if v.Madvise != 0 {
		e.Madv = proto.Uint64(v.Madvise)
	}
	if v.Mapped() || v.Is(Sysvipc) {
		e.Fdflags = proto.Uint32(uint32(v.OpenFlags))
	}
	return e
}

// FromImage checks the VMAs of an image: aligned, inside user space,
// ascending, of kinds that can be built.
func FromImage(es []*vma.VmaEntry) ([]*VMA, error) {
	out := make([]*VMA, 0, len(es))
	var last uint64
	for i, e := range es {
		v := &VMA{
			Start: e.GetStart(), End: e.GetEnd(), Offset: e.GetPgoff(), ShmID: e.GetShmid(),
			Prot: int(e.GetProt()), Flags: int(e.GetFlags()), Status: e.GetStatus(),
			Madvise: e.GetMadv(), OpenFlags: int(e.GetFdflags()),
		}
		switch {
		case v.Start%arch.PageSize != 0, v.End%arch.PageSize != 0, v.Offset%arch.PageSize != 0, v.Start >= v.End:
			return nil, fmt.Errorf("VMA %d (%#x-%#x, offset %#x) is not made of whole pages", i, v.Start, v.End, v.Offset)
		case v.Start < last:
			return nil, fmt.Errorf("VMA %d (%#x-%#x) overlaps the one before it", i, v.Start, v.End)
		case v.Is(Vsyscall):
			continue
		case v.End > arch.TaskSize:
			return nil, fmt.Errorf("VMA %d (%#x-%#x) is outside user space", i, v.Start, v.End)
		case v.Is(Socket), v.Is(Sysvipc) != v.Is(Sysvipc|AnonShared):
			return nil, fmt.Errorf("VMA %d (%#x-%#x) is of a kind that cannot be carried (status %#x)", i, v.Start, v.End, v.Status)
		case v.Status&(Vdso|Vvar|FilePrivate|FileShared|AnonShared|AnonPrivate|Memfd|AioRing) == 0:
			return nil, fmt.Errorf("VMA %d (%#x-%#x) is of an unknown kind (status %#x)", i, v.Start, v.End, v.Status)
		}
		if v.Is(AioRing) {
			v.Status, v.Prot = Regular|AioRing, unix.PROT_READ|unix.PROT_WRITE // whatever it is taken for until it is made
		}
		last = v.End
		out = append(out, v)
	}
	return out, nil
}

// Read gives the mappings of a process and those that cannot be carried. t follows
// it; nil: nothing does.
func Read(pid int, t *Tracker) (vmas []*VMA, refused map[*VMA]string, err error) {
	maps, err := procfs.ReadSmaps(pid)
	if err != nil {
		return nil, nil, fmt.Errorf("read mappings of pid %d: %w", pid, err)
	}
	t.remember(maps)
	return classify(pid, maps, t)
}

// ReadFrozen is Read of a frozen process. What was read of it by Read a moment ago is not
// read again if its mappings are the same: the kernel looks at every page for it.
// locked is how much of its memory is locked, bytes.
func ReadFrozen(pid int, t *Tracker, locked uint64) (vmas []*VMA, refused map[*VMA]string, err error) {
	maps, err := t.recall(pid, locked)
	if err != nil {
		return nil, nil, fmt.Errorf("read mappings of pid %d: %w", pid, err)
	}
	if maps == nil {
		return Read(pid, t)
	}
	return classify(pid, maps, t)
}

func classify(pid int, maps []procfs.SmapsEntry, t *Tracker) (vmas []*VMA, refused map[*VMA]string, err error) {
	refused = map[*VMA]string{}
	for i := range maps {
		if t.owns() {
			maps[i].VmFlags = slices.DeleteFunc(maps[i].VmFlags, func(f string) bool { return f == "uw" })
		}
		v, why := Classify(&maps[i])
		if v == nil {
			continue
		}
		if why != "" {
			refused[v] = why
		}
		vmas = append(vmas, v)
	}
	return vmas, refused, readGuards(pid, vmas)
}
