package sys

import (
	"time"

	"golang.org/x/sys/unix"
)

// Yield lets others that wait for this processor have it.
func Yield() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// Nap sleeps on this OS thread, for about d; a signal may end it early.
func Nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil)
}
