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

// Continued is a task that was interrupted more than once in the same system call.
type Continued struct {
	Pid, Tid int
	Regs     *arch.Regs
	// Stopped says that a SIGSTOP came meanwhile, which the caller sends again.
	Stopped bool

	r     Remote
	mask  uint64
	named arch.Regs
	ended bool // the call has
}

// NameContinued completes the registers of tasks that were interrupted more than
// once in the same system call. The kernel goes on with such a call by
// restart_syscall(2), and the number of the call itself is in no register any
// more; without it nobody can make the call again in a new task. So each task is
// let into the kernel, until it waits in a function that tells, and no further:
// it executes no instruction of its program. If the call ends meanwhile, Regs
// become those with its result, and the same goes for a task that the kernel has just
// sent back to the call and that has not made it yet. Each step is made by all
// tasks side by side before the next one.
// Preconditions: the tasks are in event stops, with these registers; seccomp
// is suspended.
func NameContinued(tasks []*Continued) (err error) {
	for i, c := range tasks {
		if c.mask, err = BlockSignals(c.Tid); err != nil {
			tasks = tasks[:i]
			break
		}
		c.r = Remote{Tid: c.Tid, Base: *c.Regs}
		c.named = *c.Regs
		c.named.OrigRax = unix.SYS_RESTART_SYSCALL
	}
	defer func() {
		for _, c := range tasks {
			c.Stopped = c.r.Stopped
			if merr := sys.PtraceSetSigMask(c.Tid, c.mask); merr != nil && err == nil {
				err = fmt.Errorf("put back signal mask of task %d: %w", c.Tid, merr)
			}
		}
	}()
	for _, step := range []func(*Continued) error{
		func(c *Continued) error { return c.r.resume(sys.PtraceSyscall, 0) },
		(*Continued).enter,
		(*Continued).look,
		(*Continued).leave,
		(*Continued).stop,
		(*Continued).finish,
	} {
		for _, c := range tasks {
			if err != nil {
				return err
			}
			err = step(c)
		}
	}
	return err
}

// enter lets a task that is on its way into its call go on.
func (c *Continued) enter() error {
	if err := c.r.until(sys.PtraceSyscall, "entry to an interrupted system call", func(s Stop) bool { return s.Sysc }); err != nil {
		return err
	}
	return c.r.resume(sys.PtraceSyscall, 0)
}

// look waits until the place where a task waits tells of its call, or the call ends.
func (c *Continued) look() error {
	for until := time.Now().Add(continuedPatience); time.Now().Before(until); time.Sleep(20 * time.Microsecond) {
		place, err := procfs.ReadAll(procfs.TaskPath(c.Pid, c.Tid, "wchan"))
		if err == nil && c.named.NameContinued(string(place)) {
			break
		}
		s, ok, err := TryWait(c.Tid)
		if err != nil {
			return err
		}
		if ok {
			c.ended = true
			return c.left(s)
		}
	}
	if err := sys.PtraceInterrupt(c.Tid); err != nil {
		return fmt.Errorf("interrupt task %d: %w", c.Tid, gone(err))
	}
	return nil
}

// leave waits until a task that was interrupted has left its call.
func (c *Continued) leave() error {
	if c.ended {
		return nil
	}
	s, err := Wait(c.Tid)
	if err != nil {
		return err
	}
	return c.left(s)
}

func (c *Continued) left(s Stop) error {
	if !s.Sysc {
		return &StopError{Want: "exit from an interrupted system call", Got: s}
	}
	return nil
}

// stop has a task go on to an event stop.
func (c *Continued) stop() error {
	// Any stop takes an interrupt off; the next one is to be before the program goes on.
	if err := sys.PtraceInterrupt(c.Tid); err != nil {
		return fmt.Errorf("interrupt task %d: %w", c.Tid, gone(err))
	}
	return c.r.resume(sys.PtraceCont, 0)
}

// finish takes the registers of a task when it has stopped.
func (c *Continued) finish() error {
	if err := c.r.until(sys.PtraceCont, "an event stop", func(s Stop) bool { return s.Event == sys.PtraceEventStop }); err != nil {
		return err
	}
	now, err := GetRegs(c.Tid)
	if err != nil {
		return err
	}
	if now.ContinuesUnnamed() {
		now.OrigRax = c.named.OrigRax
	}
	*c.Regs = now
	return nil
}
