package agent

import (
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// ownTerminal is the terminal that a restore with --shell-job puts in the place of
// the tree's: the standard input of the command.
type ownTerminal struct {
	file    *os.File
	termios unix.Termios
	pgrp    int // in the foreground; 0: it is not this session's terminal
}

// openTerminal looks at standard input; nil if it is no terminal.
func openTerminal() (*ownTerminal, error) {
	t, err := unix.IoctlGetTermios(unix.Stdin, unix.TCGETS2)
	if err != nil {
		return nil, nil
	}
	fd, err := unix.FcntlInt(uintptr(unix.Stdin), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("use the terminal on standard input: %w", err)
	}
	o := &ownTerminal{file: os.NewFile(uintptr(fd), "standard input"), termios: *t}
	if o.pgrp, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP); err != nil {
		o.pgrp = 0
	}
	// The tree may take the foreground; settings must be changed all the same.
	signal.Ignore(unix.SIGTTOU)
	return o, nil
}

// back gives the terminal the settings and the foreground that it had.
func (o *ownTerminal) back() error {
	if o == nil {
		return nil
	}
	fd := int(o.file.Fd())
	err := unix.IoctlSetTermios(fd, unix.TCSETS2, &o.termios)
	if now, gerr := unix.IoctlGetInt(fd, unix.TIOCGPGRP); o.pgrp > 0 && gerr == nil && now != o.pgrp {
		err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, o.pgrp))
	}
	if err != nil {
		return fmt.Errorf("put the terminal on standard input back: %w", err)
	}
	return nil
}
