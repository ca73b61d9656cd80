package sys

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IovMax is UIO_MAXIOV: the vectors that one process_vm call takes.
const IovMax = 1024

// ProcessVMRead reads n ranges of another process into dst, which they fill in
// order; it returns the bytes read before the first unreadable page.
func ProcessVMRead(pid int, dst []byte, ranges []unix.RemoteIovec) (int, error) {
	local := []unix.Iovec{{Base: unsafe.SliceData(dst), Len: uint64(len(dst))}}
	n, err := unix.ProcessVMReadv(pid, local, ranges, 0)
	return n, os.NewSyscallError("process_vm_readv", err)
}

// ProcessVMWrite writes src to one address of another process.
func ProcessVMWrite(pid int, addr uint64, src []byte) (int, error) {
	local := []unix.Iovec{{Base: unsafe.SliceData(src), Len: uint64(len(src))}}
	n, err := unix.ProcessVMWritev(pid, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(src)}}, 0)
	return n, os.NewSyscallError("process_vm_writev", err)
}

// Page categories of PAGEMAP_SCAN (include/uapi/linux/fs.h, Linux 6.7).
const (
	PageIsWritten = 1 << 1
	PageIsFile    = 1 << 2
	PageIsPresent = 1 << 3
	PageIsSwapped = 1 << 4
	PageIsPfnZero = 1 << 5
	PageIsGuard   = 1 << 8 // Linux 6.17
)

// PageRegion is struct page_region: a run of pages with equal categories.
type PageRegion struct {
	Start, End uint64
	Categories uint64
}

type pmScanArg struct {
	size, flags, start, end, walkEnd   uint64
	vec, vecLen, maxPages              uint64
	inverted, mask, anyofMask, retMask uint64
}

const ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

// PagemapScan walks [start, end) on an open /proc/PID/pagemap and fills vec with
// runs of pages that match: (categories ^ inverted) has all of mask and one of
// anyof. It returns how many runs there are and where to go on; n < len(vec)
// means that the walk is finished.
func PagemapScan(fd int, start, end uint64, inverted, mask, anyof, ret uint64, vec []PageRegion) (n int, next uint64, err error) {
	return pagemapScan(fd, 0, start, end, inverted, mask, anyof, ret, vec)
}

// PagemapWritten is PagemapScan of memory that is under UffdWatch, all of it: else it
// fails with EPERM. With begin set, what it finds counts as not written from
// then on, atomically.
func PagemapWritten(fd int, begin bool, start, end uint64, inverted, mask, anyof, ret uint64, vec []PageRegion) (n int, next uint64, err error) {
	flags := uint64(pmScanChecked)
	if begin {
		flags |= pmScanWP
	}
	return pagemapScan(fd, flags, start, end, inverted, mask, anyof, ret, vec)
}

func pagemapScan(fd int, flags, start, end uint64, inverted, mask, anyof, ret uint64, vec []PageRegion) (n int, next uint64, err error) {
	arg := pmScanArg{
		flags: flags, start: start, end: end,
		vec: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(vec)))), vecLen: uint64(len(vec)),
		inverted: inverted, mask: mask, anyofMask: anyof, retMask: ret,
	}
	arg.size = uint64(unsafe.Sizeof(arg))
	for {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlPagemapScan, uintptr(unsafe.Pointer(&arg)))
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, 0, os.NewSyscallError("ioctl PAGEMAP_SCAN", e)
		}
		n = int(r)
		break
	}
	// Linux 6.18 may leave walk_end stale when the vector is full: never go
	// back behind the last run.
	next = arg.walkEnd
	if n > 0 && vec[n-1].End > next {
		next = vec[n-1].End
	}
	return n, next, nil
}

// RobustList reads the head and length of the robust futex list of a task.
func RobustList(tid int) (head, length uint64, err error) {
	_, _, e := unix.Syscall(unix.SYS_GET_ROBUST_LIST, uintptr(tid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&length)))
	if e != 0 {
		return 0, 0, os.NewSyscallError("get_robust_list", e)
	}
	return head, length, nil
}

// SharedAnon makes size bytes of shared anonymous memory and returns a
// descriptor of it, the same object that mmap(MAP_SHARED|MAP_ANONYMOUS) makes:
// it shows as "/dev/zero (deleted)" in maps, unlike a memfd. The open goes
// through /proc/self/map_files, which needs CAP_CHECKPOINT_RESTORE. flags are
// those of mmap that say which huge pages it consists of, 0 for none.
func SharedAnon(size uint64, flags int) (*os.File, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|flags)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	start := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	path := "/proc/self/map_files/" + hex(start) + "-" + hex(start+uintptr(size))
	f, ferr := os.OpenFile(path, os.O_RDWR, 0)
	if err := unix.Munmap(b); err != nil && ferr == nil {
		_ = f.Close()
		return nil, os.NewSyscallError("munmap", err)
	}
	return f, ferr
}

// HugePages tells whether a file consists of huge pages, and their size in bytes.
func HugePages(f *os.File) (size uint64, ok bool, err error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return 0, false, os.NewSyscallError("fstatfs", err)
	}
	return uint64(fs.Bsize), uint32(fs.Type) == unix.HUGETLBFS_MAGIC, nil
}

// WriteHuge writes to a file of huge pages of a size, which knows no write(2),
// through a mapping. It fails with ENOMEM if there are not enough huge pages.
func WriteHuge(f *os.File, b []byte, off, page uint64) error {
	start := off / page * page
	end := (off + uint64(len(b)) + page - 1) / page * page
	m, err := unix.Mmap(int(f.Fd()), int64(start), int(end-start), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	// By a system call: a page that is not there after all is no SIGBUS.
	at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m)))) + off - start
	n, err := ProcessVMWrite(os.Getpid(), at, b)
	if err == nil && n != len(b) {
		err = os.NewSyscallError("process_vm_writev", unix.ENOMEM)
	}
	return errors.Join(err, os.NewSyscallError("munmap", unix.Munmap(m)))
}

func hex(v uintptr) string {
	const digits = "0123456789abcdef"
	var b [16]byte
	i := len(b)
	for {
		i--
		b[i] = digits[v&15]
		v >>= 4
		if v == 0 {
			return string(b[i:])
		}
	}
}

// SchedAttr is struct sched_attr (include/uapi/linux/sched/types.h).
type SchedAttr = unix.SchedAttr

// Affinity reads the CPU mask of a task as words, lowest first.
func Affinity(tid int) ([]uint64, error) {
	var mask [128]uint64 // 8192 CPUs
	n, _, e := unix.RawSyscall(unix.SYS_SCHED_GETAFFINITY, uintptr(tid), unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask)))
	if e != 0 {
		return nil, os.NewSyscallError("sched_getaffinity", e)
	}
	words := append([]uint64(nil), mask[:n/8]...)
	for len(words) > 1 && words[len(words)-1] == 0 {
		words = words[:len(words)-1]
	}
	return words, nil
}

// SetAffinity replaces the CPU mask of a task.
func SetAffinity(tid int, words []uint64) error {
	if len(words) == 0 {
		return nil
	}
	_, _, e := unix.RawSyscall(unix.SYS_SCHED_SETAFFINITY, uintptr(tid), uintptr(len(words)*8), uintptr(unsafe.Pointer(unsafe.SliceData(words))))
	if e != 0 {
		return os.NewSyscallError("sched_setaffinity", e)
	}
	return nil
}

// IOPrio reads the I/O priority of a task; 0 means none was set.
func IOPrio(tid int) (uint32, error) {
	r, _, e := unix.RawSyscall(unix.SYS_IOPRIO_GET, 1, uintptr(tid), 0)
	if e != 0 {
		return 0, os.NewSyscallError("ioprio_get", e)
	}
	return uint32(r), nil
}

// SetIOPrio replaces the I/O priority of a task.
func SetIOPrio(tid int, prio uint32) error {
	_, _, e := unix.RawSyscall(unix.SYS_IOPRIO_SET, 1, uintptr(tid), uintptr(prio))
	if e != 0 {
		return os.NewSyscallError("ioprio_set", e)
	}
	return nil
}

// MMMapSize asks the kernel for the size of struct prctl_mm_map.
func MMMapSize() (uint32, error) {
	var size uint32
	_, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP_SIZE, uintptr(unsafe.Pointer(&size)), 0, 0, 0)
	if e != 0 {
		return 0, os.NewSyscallError("prctl PR_SET_MM_MAP_SIZE", e)
	}
	return size, nil
}
