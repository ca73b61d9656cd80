package engine

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/files"
)

// NewTerminal makes a pseudoterminal for a tree to land on (RestoreOptions.Terminal).
// The caller closes both ends.
func NewTerminal(size *unix.Winsize) (master, slave *os.File, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a terminal: %w", err)
		}
	}()
	if master, slave, err = files.NewPTY(); err != nil {
		return nil, nil, err
	}
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, size); err != nil {
		return nil, nil, errors.Join(os.NewSyscallError("ioctl TIOCSWINSZ", err), master.Close(), slave.Close())
	}
	return master, slave, nil
}
