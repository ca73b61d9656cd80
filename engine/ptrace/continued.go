package ptrace

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/procfs"
	"godwit/engine/sys"
)

// continuedPatience is how long a call that goes on may take to wait again, on a
// host where others want the CPU, too.
const continuedPatience = 100 * time.Millisecond

// NameContinued completes the registers of a task that was interrupted more than
// once in the same system call. The kernel goes on with such a call by
// restart_syscall(2), and the number of the call itself is in no register any
// more; without it nobody can make the call again in a new task. So the task is
// let into the kernel, until it waits in a function that tells, and no further:
// it executes no instruction of its program. If the call ends meanwhile, regs
// become those with its result, and the same goes for a task that the kernel has just
// sent back to the call and that has not made it yet. stopped says that a SIGSTOP came, which the
// caller sends again.
// Preconditions: the task pid/tid is in an event stop, with these registers; seccomp
// is suspended.
func NameContinued(pid, tid int, regs *arch.Regs) (stopped bool, err error) {
	mask, err := BlockSignals(tid)
	if err != nil {
		return false, err
	}
	r := Remote{Tid: tid, Base: *regs}
	defer func() {
		stopped = r.Stopped
		if merr := sys.PtraceSetSigMask(tid, mask); merr != nil && err == nil {
			err = fmt.Errorf("put back signal mask of task %d: %w", tid, merr)
		}
	}()
	if err := r.resumeUntil(sys.PtraceSyscall, "entry to an interrupted system call", func(s Stop) bool { return s.Sysc }); err != nil {
		return false, err
	}
	if err := sys.PtraceSyscall(tid, 0); err != nil {
		return false, fmt.Errorf("resume task %d: %w", tid, gone(err))
	}
	named := *regs
	named.OrigRax = unix.SYS_RESTART_SYSCALL
	var s Stop
	ended := false
	for until := time.Now().Add(continuedPatience); !ended && time.Now().Before(until); time.Sleep(20 * time.Microsecond) {
		place, err := procfs.ReadAll(procfs.TaskPath(pid, tid, "wchan"))
		if err == nil && named.NameContinued(string(place)) {
			break
		}
		if s, ended, err = TryWait(tid); err != nil {
			return false, err
		}
	}
	if !ended {
		if err := sys.PtraceInterrupt(tid); err != nil {
			return false, fmt.Errorf("interrupt task %d: %w", tid, gone(err))
		}
		if s, err = Wait(tid); err != nil {
			return false, err
		}
	}
	if !s.Sysc {
		return false, &StopError{Want: "exit from an interrupted system call", Got: s}
	}
	// Any stop takes an interrupt off; the next one is to be before the program goes on.
	if err := sys.PtraceInterrupt(tid); err != nil {
		return false, fmt.Errorf("interrupt task %d: %w", tid, gone(err))
	}
	if err := r.resumeUntil(sys.PtraceCont, "an event stop", func(s Stop) bool { return s.Event == sys.PtraceEventStop }); err != nil {
		return false, err
	}
	now, err := GetRegs(tid)
	if err != nil {
		return false, err
	}
	if now.ContinuesUnnamed() {
		now.OrigRax = named.OrigRax
	}
	*regs = now
	return false, nil
}
