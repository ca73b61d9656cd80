package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Objects that kcmp(2) compares (include/uapi/linux/kcmp.h).
const (
	kcmpFile     = 0
	kcmpEpollTFD = 7 // Linux 4.13
)

// Order is what kcmp(2) says of two objects. Less and Greater order the kernel's
// pointers in a scrambled but, until the next boot, constant way.
type Order int

const (
	Equal     Order = 0
	Less      Order = 1
	Greater   Order = 2
	Unordered Order = 3
)

// epollSlot is struct kcmp_epoll_slot.
type epollSlot struct {
	efd, tfd, toff uint32
}

func kcmp(pid1, pid2, typ int, idx1, idx2 uintptr) (Order, error) {
	for {
		r, _, e := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), uintptr(typ), idx1, idx2, 0)
		switch e {
		case 0:
			return Order(r), nil
		case unix.EINTR:
			continue
		}
		return Unordered, os.NewSyscallError("kcmp", e)
	}
}

// KcmpFile compares the open file descriptions behind two descriptors.
func KcmpFile(pid1, fd1, pid2, fd2 int) (Order, error) {
	return kcmp(pid1, pid2, kcmpFile, uintptr(fd1), uintptr(fd2))
}

// KcmpEpoll compares the open file description behind fd of pid with the toff-th
// one that was added to epoll descriptor efd of epid under the number tfd.
func KcmpEpoll(pid, fd, epid, efd, tfd, toff int) (Order, error) {
	slot := epollSlot{efd: uint32(efd), tfd: uint32(tfd), toff: uint32(toff)}
	for {
		r, _, e := unix.Syscall6(unix.SYS_KCMP, uintptr(pid), uintptr(epid), kcmpEpollTFD, uintptr(fd),
			uintptr(unsafe.Pointer(&slot)), 0)
		switch e {
		case 0:
			return Order(r), nil
		case unix.EINTR:
			continue
		}
		return Unordered, os.NewSyscallError("kcmp epoll", e)
	}
}
