package sys

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// UnixPathMax is the size of sun_path.
const UnixPathMax = 108

// unixAddr builds the address whose sun_path is exactly name: golang.org/x/sys
// takes a path that begins with '@' for an abstract name. A path may fill
// sun_path without a NUL behind it.
func unixAddr(name []byte) (*unix.RawSockaddrUnix, uintptr, error) {
	if len(name) == 0 || len(name) > UnixPathMax {
		return nil, 0, fmt.Errorf("a unix socket name has 1 to %d bytes, not %d", UnixPathMax, len(name))
	}
	a := &unix.RawSockaddrUnix{Family: unix.AF_UNIX}
	for i, c := range name {
		a.Path[i] = int8(c)
	}
	return a, unsafe.Sizeof(a.Family) + uintptr(len(name)), nil
}

// BindUnix binds a unix socket to a name: a path, or an abstract one that begins with NUL.
func BindUnix(fd int, name []byte) error {
	a, n, err := unixAddr(name)
	if err != nil {
		return err
	}
	if _, _, e := unix.Syscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(a)), n); e != 0 {
		return os.NewSyscallError("bind", e)
	}
	return nil
}

// ConnectUnix connects a unix socket to a name.
func ConnectUnix(fd int, name []byte) error {
	a, n, err := unixAddr(name)
	if err != nil {
		return err
	}
	for {
		_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(a)), n)
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return os.NewSyscallError("connect", e)
	}
}

// SendtoUnix sends one datagram to a name.
func SendtoUnix(fd int, p []byte, flags int, name []byte) error {
	a, n, err := unixAddr(name)
	if err != nil {
		return err
	}
	var ptr unsafe.Pointer
	if len(p) > 0 {
		ptr = unsafe.Pointer(&p[0])
	}
	for {
		_, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(ptr), uintptr(len(p)), uintptr(flags), uintptr(unsafe.Pointer(a)), n)
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return os.NewSyscallError("sendto", e)
	}
}
