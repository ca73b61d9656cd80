package sys

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// GetSockopt reads an option into b and tells how many bytes it filled.
func GetSockopt(fd, level, opt int, b []byte) (int, error) {
	n, err := GetSockoptSize(fd, level, opt, b)
	return min(n, len(b)), err
}

// GetSockoptSize reads an option into b and tells how many bytes it has, which may
// be more than there was room for.
func GetSockoptSize(fd, level, opt int, b []byte) (int, error) {
	n := uint32(len(b))
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(unsafe.Pointer(&n)), 0); e != 0 {
		return 0, os.NewSyscallError("getsockopt", e)
	}
	return int(n), nil
}

// SetSockopt sets an option to the bytes of b.
func SetSockopt(fd, level, opt int, b []byte) error {
	if _, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0); e != 0 {
		return os.NewSyscallError("setsockopt", e)
	}
	return nil
}

// maxFilter is BPF_MAXINSNS (include/uapi/linux/bpf_common.h).
const maxFilter = 4096

// GetFilter reads the classic filter of a socket; EACCES: it is an eBPF program.
func GetFilter(fd int) ([]unix.SockFilter, error) {
	// The length of this option counts instructions. With no room it only tells
	// how many there are, and the number is SO_ATTACH_FILTER's.
	var n uint32
	read := func(p unsafe.Pointer) error {
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER, uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
		if e != 0 {
			return os.NewSyscallError("getsockopt SO_GET_FILTER", e)
		}
		return nil
	}
	if err := read(nil); err != nil || n == 0 {
		return nil, err
	}
	if n > maxFilter {
		return nil, fmt.Errorf("a socket filter of %d instructions", n)
	}
	prog := make([]unix.SockFilter, n)
	if err := read(unsafe.Pointer(&prog[0])); err != nil {
		return nil, err
	}
	return prog[:min(int(n), len(prog))], nil
}

// SetFilter attaches a classic filter.
func SetFilter(fd int, prog []unix.SockFilter) error {
	if len(prog) == 0 || len(prog) > maxFilter {
		return fmt.Errorf("a socket filter of %d instructions", len(prog))
	}
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &p))
}

// Disconnect takes the peer of a datagram socket away, and what it was not bound
// to for good.
func Disconnect(fd int) error {
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)); e != 0 {
		return os.NewSyscallError("connect", e)
	}
	return nil
}
