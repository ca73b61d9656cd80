// Package ptrace owns traced tasks: the OS thread that traces, stops and their
// meaning, and system calls executed in other processes. It must not know what
// a dump or a restore does with them.
package ptrace

import (
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"godwit/engine/sys"
)

// ErrGone says that a traced task has ended.
var ErrGone = errors.New("task has ended")

// Tracer is the one OS thread from which the tasks of a tree are traced: the
// kernel accepts ptrace and wait4 for them from no other.
type Tracer struct {
	work chan func()
	done chan struct{}
}

// NewTracer starts the thread; Close ends it. Tasks that are still traced when
// the thread ends run on, or die if they were seized with PTRACE_O_EXITKILL.
func NewTracer() *Tracer {
	t := &Tracer{work: make(chan func()), done: make(chan struct{})}
	go func() {
		// Never unlocked: the runtime ends the thread with the goroutine, and
		// with it whatever tracing was left.
		runtime.LockOSThread()
		defer close(t.done)
		for f := range t.work {
			f()
		}
	}()
	return t
}

// Do runs f on the tracer's thread and returns its error. It must not be called from inside f.
func (t *Tracer) Do(f func() error) error {
	var err error
	ran := make(chan struct{})
	t.work <- func() { defer close(ran); err = f() }
	<-ran
	return err
}

// Close ends the thread. It may be called once.
func (t *Tracer) Close() {
	close(t.work)
	<-t.done
}

// Stop is a decoded wait status of a traced task.
type Stop struct {
	Tid    int
	Signal unix.Signal // 0 if the task has ended
	Event  int         // PTRACE_EVENT_*, 0 for a signal or system-call stop
	Sysc   bool        // a system-call stop
	Status unix.WaitStatus
}

// Ended tells whether the task is no more.
func (s Stop) Ended() bool { return s.Status.Exited() || s.Status.Signaled() }

func (s Stop) String() string {
	switch {
	case s.Status.Exited():
		return fmt.Sprintf("task %d exited with status %d", s.Tid, s.Status.ExitStatus())
	case s.Status.Signaled():
		return fmt.Sprintf("task %d was killed by %s", s.Tid, unix.SignalName(s.Status.Signal()))
	case s.Sysc:
		return fmt.Sprintf("task %d is in a system-call stop", s.Tid)
	case s.Event == sys.PtraceEventStop:
		return fmt.Sprintf("task %d is in an event stop with %s", s.Tid, unix.SignalName(s.Signal))
	case s.Event != 0:
		return fmt.Sprintf("task %d reported ptrace event %d", s.Tid, s.Event)
	}
	return fmt.Sprintf("task %d is about to receive %s", s.Tid, unix.SignalName(s.Signal))
}

// StopError says that a task did something else than was expected of it.
type StopError struct {
	Want string
	Got  Stop
}

func (e *StopError) Error() string { return fmt.Sprintf("expected %s, but %s", e.Want, e.Got) }

// Unwrap makes errors.Is(err, ErrGone) hold for a task that has ended.
func (e *StopError) Unwrap() error {
	if e.Got.Ended() {
		return ErrGone
	}
	return nil
}

// TryWait is Wait that does not block; ok is false if nothing has happened.
// Preconditions: on the tracer's thread.
func TryWait(tid int) (s Stop, ok bool, err error) {
	pid, ws, err := sys.Wait4(tid, unix.WALL|unix.WNOHANG)
	if err != nil {
		return Stop{}, false, fmt.Errorf("wait for task %d: %w", tid, err)
	}
	if pid == 0 {
		return Stop{}, false, nil
	}
	return decode(pid, ws), true, nil
}

func decode(tid int, ws unix.WaitStatus) Stop {
	s := Stop{Tid: tid, Status: ws}
	if ws.Stopped() {
		s.Event = int(ws>>16) & 0xff
		sig := int(ws>>8) & 0xff
		s.Sysc = s.Event == 0 && sig == int(unix.SIGTRAP)|0x80
		s.Signal = unix.Signal(sig & 0x7f)
	}
	return s
}
