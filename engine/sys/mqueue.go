package sys

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MqAttr is struct mq_attr (include/uapi/linux/mqueue.h).
type MqAttr struct {
	Flags, MaxMsg, MsgSize, CurMsgs int64
	_                               [4]int64
}

// MqueueMagic is the type of the file system of POSIX message queues (ipc/mqueue.c
// has it as MQUEUE_MAGIC).
const MqueueMagic = 0x19800202

// MqOpen opens a POSIX message queue that exists. The name is the kernel's, without a
// slash before it. O_CLOEXEC stays in the flags of the description, so that it must not
// be added; the descriptor has it anyway.
func MqOpen(name string, flags int) (int, error) {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	n, _, e := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(p)), uintptr(flags), 0, 0, 0, 0)
	if e != 0 {
		return -1, os.NewSyscallError("mq_open", e)
	}
	unix.CloseOnExec(int(n))
	return int(n), nil
}

// MqGetAttr reads the attributes of a POSIX message queue.
func MqGetAttr(fd int) (MqAttr, error) {
	var a MqAttr
	_, _, e := unix.Syscall(unix.SYS_MQ_GETSETATTR, uintptr(fd), 0, uintptr(unsafe.Pointer(&a)))
	if e != 0 {
		return a, os.NewSyscallError("mq_getsetattr", e)
	}
	return a, nil
}

// IsMqueue says whether a descriptor leads into the file system of POSIX message queues.
func IsMqueue(fd int) (bool, error) {
	var st unix.Statfs_t
	for {
		switch err := unix.Fstatfs(fd, &st); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, os.NewSyscallError("fstatfs", err)
		default:
			return st.Type == MqueueMagic, nil
		}
	}
}
