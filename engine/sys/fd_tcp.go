package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TCPInfo is the beginning of struct tcp_info (include/uapi/linux/tcp.h), with
// the window scales, which golang.org/x/sys has no fields for.
type TCPInfo struct {
	State                uint8
	Options              uint8 // TCPI_OPT_*
	SndWscale, RcvWscale uint8
}

// Bits of TCPInfo.Options (include/uapi/linux/tcp.h).
const (
	TCPOptTimestamps = 1
	TCPOptSACK       = 2
	TCPOptWscale     = 4
)

// GetTCPInfo reads what was negotiated for a connection.
func GetTCPInfo(fd int) (TCPInfo, error) {
	var b [8]byte
	if err := getsockopt(fd, unix.TCP_INFO, unsafe.Pointer(&b), unsafe.Sizeof(b)); err != nil {
		return TCPInfo{}, os.NewSyscallError("getsockopt TCP_INFO", err)
	}
	return TCPInfo{State: b[0], Options: b[5], SndWscale: b[6] & 15, RcvWscale: b[6] >> 4}, nil
}

// TCPWindow is struct tcp_repair_window (include/uapi/linux/tcp.h, Linux 4.8):
// sequence numbers and bytes.
type TCPWindow struct {
	SndWl1, SndWnd, MaxWindow, RcvWnd, RcvWup uint32
}

// GetTCPWindow reads the windows of a connection in repair mode.
func GetTCPWindow(fd int) (TCPWindow, error) {
	var w TCPWindow
	err := getsockopt(fd, unix.TCP_REPAIR_WINDOW, unsafe.Pointer(&w), unsafe.Sizeof(w))
	return w, os.NewSyscallError("getsockopt TCP_REPAIR_WINDOW", err)
}

// SetTCPWindow sets the windows of a connection in repair mode.
func SetTCPWindow(fd int, w TCPWindow) error {
	return os.NewSyscallError("setsockopt TCP_REPAIR_WINDOW", setsockopt(fd, unix.TCP_REPAIR_WINDOW, unsafe.Pointer(&w), unsafe.Sizeof(w)))
}

// SetTCPOptions sets what was negotiated for a connection in repair mode. It must
// be established and have sent nothing yet.
func SetTCPOptions(fd int, opts []unix.TCPRepairOpt) error {
	if len(opts) == 0 {
		return nil
	}
	err := setsockopt(fd, unix.TCP_REPAIR_OPTIONS, unsafe.Pointer(&opts[0]), uintptr(len(opts))*unsafe.Sizeof(opts[0]))
	return os.NewSyscallError("setsockopt TCP_REPAIR_OPTIONS", err)
}

// A socket's sequence numbers and timestamps are 32 bits of which the upper may
// be set: as int, the kernel's type for them, they go through unchanged.

// GetTCPNumber reads a 32-bit option of level SOL_TCP.
func GetTCPNumber(fd, opt int) (uint32, error) {
	n, err := unix.GetsockoptInt(fd, unix.SOL_TCP, opt)
	return uint32(n), os.NewSyscallError("getsockopt", err)
}

// SetTCPNumber sets a 32-bit option of level SOL_TCP.
func SetTCPNumber(fd, opt int, n uint32) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_TCP, opt, int(int32(n))))
}

// MuteSocket makes the kernel drop, silently, every packet for a socket: a classic
// BPF filter of the one instruction "ret 0".
func MuteSocket(fd int) error {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	prog := unix.SockFprog{Len: 1, Filter: &drop[0]}
	return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog))
}

func getsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_TCP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return e
	}
	if uintptr(n) < size {
		return unix.EINVAL
	}
	return nil
}

func setsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	if _, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_TCP, uintptr(opt), uintptr(p), size, 0); e != 0 {
		return e
	}
	return nil
}
