package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/ptrace"
	"godwit/engine/sys"
	"godwit/engine/task"
)

// stops stops the processes that a signal had stopped. They execute system
// calls for us all the same, and are stopped once they are let go: the kernel
// keeps the group stop of a traced process (__ptrace_unlink, kernel/ptrace.c).
// Preconditions: no process has its state yet: parents are sent a SIGCHLD that
// they must not see.
func (t *Tree) stops() error {
	for _, p := range t.model.procs {
		if p.zombie || p.core().GetTc().GetTaskState() != task.Stopped {
			continue
		}
		if err := t.stop(p); err != nil {
			return fmt.Errorf("stop %s: %w", p, err)
		}
		if p.parent == nil {
			continue
		}
		p.parent.reapChild = true
		if p.leader().facts == nil || !p.leader().facts.StopSeen {
			continue
		}
		told := ptrace.NewCall("take the stop of "+p.String(), unix.SYS_WAIT4, ptrace.Int(p.vpid), ptrace.Int(0), ptrace.Int(unix.WUNTRACED|unix.WNOHANG|unix.WALL), ptrace.Int(0))
		if err := p.parent.remote().Run(told); err != nil {
			return err
		}
		if told.Ret != int64(p.vpid) {
			return fmt.Errorf("%s was told nothing of the stop of %s", p.parent, p)
		}
	}
	return nil
}

// stop stops one process by the signal that had stopped it. Where that has no
// effect, because on this host nobody could continue the process (setpgid(2),
// orphaned process groups), it is SIGSTOP.
func (t *Tree) stop(p *process) error {
	sig := unix.Signal(p.core().GetTc().GetStopSigno())
	if sig == 0 {
		sig = unix.SIGSTOP
	}
	ok, err := stopBy(p.remote().Tid, sig)
	if err == nil && !ok && sig != unix.SIGSTOP {
		t.log.Debug("stopped by SIGSTOP in place of another signal, which has no effect here", "pid", p.vpid, "signal", unix.SignalName(sig))
		ok, err = stopBy(p.remote().Tid, unix.SIGSTOP)
	}
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("it does not stop")
	}
	// Its other threads join when they are resumed.
	for _, th := range p.threads[1:] {
		if err := sys.PtraceInterrupt(th.remote.Tid); err != nil {
			return err
		}
		if err := sys.PtraceCont(th.remote.Tid, 0); err != nil {
			return err
		}
		s, err := ptrace.Wait(th.remote.Tid)
		if err != nil {
			return err
		}
		if s.Event != sys.PtraceEventStop || s.Signal == unix.SIGTRAP {
			return &ptrace.StopError{Want: fmt.Sprintf("thread %d to join the stop", th.vtid), Got: s}
		}
	}
	return nil
}

// stopBy makes a traced task, which is stopped for us, meet a stop signal
// without executing an instruction; false if the signal had no effect.
func stopBy(tid int, sig unix.Signal) (bool, error) {
	mask, err := sys.PtraceGetSigMask(tid)
	if err != nil {
		return false, err
	}
	if err := sys.PtraceSetSigMask(tid, mask&^(1<<(uint(sig)-1))); err != nil {
		return false, err
	}
	// A SIGSTOP reaches every task; it is exchanged for the signal that is wanted.
	if err := unix.Tgkill(tid, tid, unix.SIGSTOP); err != nil {
		return false, os.NewSyscallError("tgkill", err)
	}
	stopped, delivered := false, false
	for done := false; !done; {
		with := 0
		if delivered {
			with = int(sig)
			// A signal without effect must not let the task run on.
			if err := sys.PtraceInterrupt(tid); err != nil {
				return false, err
			}
		}
		if err := sys.PtraceCont(tid, with); err != nil {
			return false, err
		}
		s, err := ptrace.Wait(tid)
		switch {
		case err != nil:
			return false, err
		case s.Event == sys.PtraceEventStop:
			stopped = s.Signal == sig
			done = delivered
		case s.Event == 0 && !s.Sysc && s.Signal == unix.SIGSTOP && !delivered:
			delivered = true
		default:
			return false, &ptrace.StopError{Want: "a stop signal", Got: s}
		}
	}
	return stopped, sys.PtraceSetSigMask(tid, mask)
}
