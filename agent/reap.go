package agent

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// waitChild waits until a process of a restored tree that is a child of this one
// (engine.Standing.Child) has ended, and reaps it. It sleeps in the poller, not in wait4: that call would also take
// the stops that a tracer in this process waits for, when the tree is moved on.
// An exit signal other than SIGCHLD needs __WALL (wait(2)).
func waitChild(pid int) (unix.WaitStatus, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return 0, os.NewSyscallError(fmt.Sprintf("pidfd_open pid %d", pid), err)
	}
	file := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid))
	defer func() { _ = file.Close() }()
	conn, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	exited := false
	err = conn.Read(func(fd uintptr) bool {
		exited = readable(int(fd))
		return exited
	})
	if err != nil {
		return 0, fmt.Errorf("wait for pid %d: %w", pid, err)
	}
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(pid, &ws, unix.WALL|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, os.NewSyscallError(fmt.Sprintf("wait4 pid %d", pid), err)
		case got == pid && (ws.Exited() || ws.Signaled()):
			return ws, nil
		default:
			time.Sleep(5 * time.Millisecond) // its last thread is on its way out
		}
	}
}

// readable says whether a pidfd tells that its process has exited.
func readable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0 || err != nil
	}
}

// exitStatus is a wait status as a shell reports it.
func exitStatus(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
