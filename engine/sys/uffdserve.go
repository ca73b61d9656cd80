package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of userfaultfd(2), in the mode in which missing pages are served.
const (
	uffdEventFork   = 1 << 1
	uffdEventRemap  = 1 << 2
	uffdEventRemove = 1 << 3
	uffdEventUnmap  = 1 << 6
	uffdServe       = uffdEventFork | uffdEventRemap | uffdEventRemove | uffdEventUnmap

	uffdModeMissing = 1 << 0
	ioctlUffdWake   = 0x8010aa02
	ioctlUffdCopy   = 0xc028aa03
	ioctlUffdZero   = 0xc020aa04

	uffdMsgLen = 32
)

// UffdServe makes a userfaultfd, which may be another process's, one that tells of
// missing pages, and of everything that moves or takes away memory under it.
func UffdServe(fd int) error { return uffdAPICall(fd, uffdServe) }

// UffdServeProbe says why this kernel, or this process's rights, cannot do what
// UffdServe wants; nil: they can.
var UffdServeProbe = sync.OnceValue(func() error {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if e != 0 {
		return os.NewSyscallError("userfaultfd", e)
	}
	return errors.Join(UffdServe(int(fd)), unix.Close(int(fd)))
})

// UffdMissing has a userfaultfd of UffdServe serve the missing pages of a range.
func UffdMissing(fd int, start, end uint64) error {
	return uffdRegister(fd, start, end, uffdModeMissing)
}

// Kinds of UffdEvent (UFFD_EVENT_*).
const (
	UffdFault  = 0x12
	UffdFork   = 0x13
	UffdRemap  = 0x14
	UffdRemove = 0x15
	UffdUnmap  = 0x16
)

// UffdEvent is what a userfaultfd tells.
type UffdEvent struct {
	Kind uint8
	// Addr is where a page is missing.
	Addr uint64
	// FD is the userfaultfd of the child, of a fork.
	FD int
	// Start and End are what goes or moves, To where it moves.
	Start, End, To uint64
}

// UffdRead reads what a userfaultfd has to tell; none: nothing now. It does not wait.
func UffdRead(fd int, buf []byte) (events []UffdEvent, err error) {
	n, err := unix.Read(fd, buf[:len(buf)/uffdMsgLen*uffdMsgLen])
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("read userfaultfd", err)
	}
	le := binary.LittleEndian
	for b := buf[:n]; len(b) >= uffdMsgLen; b = b[uffdMsgLen:] {
		e := UffdEvent{Kind: b[0]}
		x, y, z := le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])
		switch e.Kind {
		case UffdFault:
			e.Addr = y
		case UffdFork:
			e.FD = int(uint32(x))
		case UffdRemap:
			e.Start, e.End, e.To = x, x+z, y
		case UffdRemove, UffdUnmap:
			e.Start, e.End = x, y
		default:
			return events, fmt.Errorf("a userfaultfd told of an event %#x", e.Kind)
		}
		events = append(events, e)
	}
	return events, nil
}

// UffdCopy puts pages in the place of missing ones and lets go whoever waits for them. It
// returns how many bytes were put, all unless there is an error: EEXIST: the next page is there; ENOENT:
// the range is not under the userfaultfd; EAGAIN: an event is to be read first; ESRCH: the
// process is gone.
func UffdCopy(fd int, at uint64, b []byte) (int, error) {
	arg := struct {
		dst, src, len, mode uint64
		copied              int64
	}{dst: at, src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), len: uint64(len(b))}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlUffdCopy, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(b)
	return uffdDone("ioctl UFFDIO_COPY", e, arg.copied, len(b))
}

// UffdZero is UffdCopy of n bytes that are zero.
func UffdZero(fd int, at, n uint64) (int, error) {
	arg := struct {
		start, len, mode uint64
		zeroed           int64
	}{start: at, len: n}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlUffdZero, uintptr(unsafe.Pointer(&arg)))
	return uffdDone("ioctl UFFDIO_ZEROPAGE", e, arg.zeroed, int(n))
}

func uffdDone(call string, e unix.Errno, done int64, want int) (int, error) {
	if e == 0 {
		return want, nil
	}
	// The field holds how far it came, or the error once more.
	if done > 0 {
		return int(done), unix.EAGAIN
	}
	return 0, os.NewSyscallError(call, e)
}

// UffdWake lets go whoever waits for a page of a range.
func UffdWake(fd int, start, end uint64) error {
	arg := struct{ start, len uint64 }{start, end - start}
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlUffdWake, uintptr(unsafe.Pointer(&arg)))
	if e != 0 {
		return os.NewSyscallError("ioctl UFFDIO_WAKE", e)
	}
	return nil
}
