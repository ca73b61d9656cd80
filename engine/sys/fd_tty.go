package sys

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// OpenPTYPeer opens the slave of the pseudoterminal whose master is fd, by open(2)'s
// flags, without looking for its path (TIOCGPTPEER, ioctl_tty(2)). With O_PATH the
// slave only is found: it may be locked, and its open count stays. The descriptor
// is closed by exec in any case; O_CLOEXEC stays visible in the flags of this file.
func OpenPTYPeer(fd, flags int) (int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	n, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, uintptr(flags|unix.O_NOCTTY))
	if e != 0 {
		return -1, os.NewSyscallError("ioctl TIOCGPTPEER", e)
	}
	unix.CloseOnExec(int(n))
	return int(n), nil
}
