package sys

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tfdIocSetTicks is TFD_IOC_SET_TICKS, _IOW('T', 0, __u64)
// (include/uapi/linux/timerfd.h, needs CONFIG_CHECKPOINT_RESTORE).
const tfdIocSetTicks = 0x40085400

// TimerfdSetTicks sets how many expiries of a timerfd wait to be read; n is not 0.
func TimerfdSetTicks(fd int, n uint64) error {
	for {
		_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), tfdIocSetTicks, uintptr(unsafe.Pointer(&n)))
		switch e {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return os.NewSyscallError("ioctl TFD_IOC_SET_TICKS", e)
	}
}
