package engine

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

// NewTerminal makes a pseudoterminal for a tree to land on (RestoreOptions.Terminal).
// The caller closes both ends.
func NewTerminal(size *unix.Winsize) (master, slave *os.File, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a terminal: %w", err)
			if master != nil {
				err = errors.Join(err, master.Close())
			}
		}
	}()
	// Not among Go's pollable files: they would be left in non-blocking mode, or not.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return master, nil, os.NewSyscallError("ioctl TIOCSPTLCK", err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size); err != nil {
		return master, nil, os.NewSyscallError("ioctl TIOCSWINSZ", err)
	}
	n, err := sys.OpenPTYPeer(fd, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if err != nil {
		return master, nil, err
	}
	return master, os.NewFile(uintptr(n), "the terminal"), nil
}
