package sys

import (
	"errors"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What userfaultfd(2) and ioctl_userfaultfd(2) have (include/uapi/linux/userfaultfd.h).
const (
	UffdUserModeOnly = 1 // flag of userfaultfd(2)

	uffdAPI       = 0xaa
	uffdFeatures  = uffdWPShared | uffdWPUnpopulated | uffdWPAsync
	uffdWPShared  = 1 << 12 // UFFD_FEATURE_WP_HUGETLBFS_SHMEM
	uffdWPAsync   = 1 << 15 // Linux 6.7
	uffdModeWP    = 1 << 1
	ioctlUffdAPI  = 0xc018aa3f
	ioctlUffdReg  = 0xc020aa00
	pmScanWP      = 1 << 0 // PM_SCAN_WP_MATCHING
	pmScanChecked = 1 << 1 // PM_SCAN_CHECK_WPASYNC

	// uffdWPUnpopulated comes with uffdWPAsync: pages that were not there yet count as written.
	uffdWPUnpopulated = 1 << 13
)

// UffdTrack makes a userfaultfd, which may be another process's, one that only
// remembers which pages are written. ErrUnsupported: the kernel cannot.
func UffdTrack(fd int) error { return uffdAPICall(fd, uffdFeatures) }

func uffdAPICall(fd int, features uint64) error {
	api := struct{ api, features, ioctls uint64 }{uffdAPI, features, 0}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlUffdAPI, uintptr(unsafe.Pointer(&api)))
	if e == unix.EINVAL {
		return errors.Join(os.NewSyscallError("ioctl UFFDIO_API", e), errors.ErrUnsupported)
	}
	if e != 0 {
		return os.NewSyscallError("ioctl UFFDIO_API", e)
	}
	return nil
}

// UffdWatch has a userfaultfd of UffdTrack remember the writes to a range of memory.
func UffdWatch(fd int, start, end uint64) error { return uffdRegister(fd, start, end, uffdModeWP) }

func uffdRegister(fd int, start, end, mode uint64) error {
	reg := struct{ start, len, mode, ioctls uint64 }{start, end - start, mode, 0}
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlUffdReg, uintptr(unsafe.Pointer(&reg)))
		if e == unix.EINTR || e == unix.EAGAIN {
			continue
		}
		if e != 0 {
			return os.NewSyscallError("ioctl UFFDIO_REGISTER", e)
		}
		return nil
	}
}

// UffdProbe says why this kernel cannot do what UffdTrack wants; nil: it can.
var UffdProbe = sync.OnceValue(func() error {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|UffdUserModeOnly, 0, 0)
	if e != 0 {
		return os.NewSyscallError("userfaultfd", e)
	}
	return errors.Join(UffdTrack(int(fd)), unix.Close(int(fd)))
})
