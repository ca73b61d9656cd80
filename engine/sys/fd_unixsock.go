package sys

import (
	"bytes"
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

// SendmsgUnix sends a message, with control messages, to a name, or to the peer if
// name is empty. It returns how many bytes of a stream were taken.
func SendmsgUnix(fd int, p, control []byte, flags int, name []byte) (int, error) {
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	h := unix.Msghdr{Iov: &iov, Control: unsafe.SliceData(control)}
	h.SetIovlen(1)
	h.SetControllen(len(control))
	if len(name) > 0 {
		a, n, err := unixAddr(name)
		if err != nil {
			return 0, err
		}
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(a)), uint32(n)
	}
	for {
		n, _, e := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), uintptr(flags))
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		}
		return 0, os.NewSyscallError("sendmsg", e)
	}
}

// PeerGroups gives the supplementary groups of the process at the other end of a
// unix socket (SO_PEERGROUPS); ENODATA if it has no such peer.
func PeerGroups(fd int) ([]uint32, error) {
	for buf := make([]uint32, 64); ; {
		n := uint32(len(buf) * 4)
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS, uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
		switch {
		case e == 0:
			return buf[:n/4], nil
		case e == unix.ERANGE && int(n/4) > len(buf) && n <= 65536*4: // NGROUPS_MAX
			buf = make([]uint32, n/4)
		default:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", e)
		}
	}
}

// addrName takes the name out of an address of n bytes: a path without the NUL
// behind it, an abstract name with all of its own.
func addrName(a *unix.RawSockaddrUnix, n uint32) []byte {
	base := uint32(unsafe.Sizeof(a.Family))
	if n <= base || a.Family != unix.AF_UNIX {
		return nil
	}
	name := make([]byte, min(n-base, UnixPathMax))
	for i := range name {
		name[i] = byte(a.Path[i])
	}
	if name[0] != 0 {
		name = bytes.TrimRight(name, "\x00")
	}
	return name
}

// UnixPeerName gives the name of the peer of a unix socket, nil if it has none.
func UnixPeerName(fd int) ([]byte, error) {
	var a unix.RawSockaddrUnix
	n := uint32(unsafe.Sizeof(a))
	if _, _, e := unix.Syscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(&a)), uintptr(unsafe.Pointer(&n))); e != 0 {
		return nil, os.NewSyscallError("getpeername", e)
	}
	return addrName(&a, n), nil
}

// RecvmsgUnix is recvmsg(2) on a unix socket: n bytes of data, which may be more
// than fit into p with MSG_TRUNC, oobn of control messages, and the name of the
// sender. p must not be empty.
func RecvmsgUnix(fd int, p, oob []byte, flags int) (n, oobn, recvflags int, from []byte, err error) {
	var a unix.RawSockaddrUnix
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	for {
		h := unix.Msghdr{Name: (*byte)(unsafe.Pointer(&a)), Namelen: uint32(unsafe.Sizeof(a)), Iov: &iov, Control: unsafe.SliceData(oob)}
		h.SetIovlen(1)
		h.SetControllen(len(oob))
		r, _, e := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), uintptr(flags))
		switch e {
		case 0:
			return int(r), int(h.Controllen), int(h.Flags), addrName(&a, h.Namelen), nil
		case unix.EINTR:
			continue
		}
		return 0, 0, 0, nil, os.NewSyscallError("recvmsg", e)
	}
}
