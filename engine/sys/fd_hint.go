package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FcntlUint64 is fcntl(2) with commands that take a pointer to 64 bits; it gives
// what is there afterwards.
func FcntlUint64(fd, cmd int, v uint64) (uint64, error) {
	for {
		_, _, e := unix.Syscall(unix.SYS_FCNTL, uintptr(fd), uintptr(cmd), uintptr(unsafe.Pointer(&v)))
		switch e {
		case 0:
			return v, nil
		case unix.EINTR:
			continue
		}
		return 0, os.NewSyscallError("fcntl", e)
	}
}
