package freeze

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Held is one process of a tree that stays stopped although nobody traces it.
type Held struct {
	Pid   int    `json:"pid"`   // on this host
	Start uint64 `json:"start"` // when it was started, in clock ticks since boot: with Pid, its identity
	// Own says that a signal had stopped the process before the tree was frozen.
	Own bool `json:"own,omitempty"`
}

// Hold keeps a dumped tree stopped even if this process dies, which would let it
// run: a SIGSTOP waits for each process, and stops it as soon as nobody traces it
// any more. Thaw takes the signal back without the program noticing; what is
// left by a tracer that died is for Leftover.
//
// note is told of the processes before any signal is sent, so that none is
// stopped of which nobody knows; if it fails, nothing is held.
// Preconditions: nothing will be executed in the tree any more.
func (t *Tree) Hold(note func([]Held) error) error {
	if t.released {
		return errors.New("the tree was let go already")
	}
	var held []Held
	for _, p := range t.Procs {
		if p.Zombie {
			continue
		}
		st, err := procfs.ReadStat(p.Pid)
		if err != nil {
			return fmt.Errorf("read state of pid %d (%s): %w", p.Pid, p.Comm, err)
		}
		held = append(held, Held{Pid: p.Pid, Start: st.StartTime, Own: p.Stop != 0})
	}
	if err := note(held); err != nil {
		return err
	}
	for _, p := range t.Procs {
		if err := p.hold(); err != nil {
			return fmt.Errorf("hold pid %d (%s): %w", p.Pid, p.Comm, err)
		}
	}
	return nil
}

func (p *Proc) hold() (err error) {
	if p.Zombie || p.held || p.Stop != 0 {
		return nil
	}
	if p.continues, err = waitsToContinue(p); err != nil {
		return err
	}
	p.held = true
	return ignoreGone(unix.Kill(p.Pid, unix.SIGSTOP))
}

// waitsToContinue says whether a SIGCONT waits for a process, which a SIGSTOP
// removes.
func waitsToContinue(p *Proc) (bool, error) {
	for _, th := range p.Threads {
		st, err := procfs.ReadTaskStatus(p.Pid, th.Tid)
		if err != nil {
			return false, fmt.Errorf("read status of task %d: %w", th.Tid, err)
		}
		if (st.SigPnd|st.ShdPnd)&(1<<(unix.SIGCONT-1)) != 0 {
			return true, nil
		}
	}
	return false, nil
}

// withdraw takes the SIGSTOP of Hold back: a thread goes on, inside the kernel, up
// to the point at which its tracer is told of the signal, where a detach drops it.
// Other signals that wait are blocked meanwhile.
func (p *Proc) withdraw() error {
	if !p.held {
		return nil
	}
	p.held = false
	if p.continues {
		// It removes the SIGSTOP and waits for the program, as the one before it.
		return ignoreGone(unix.Kill(p.Pid, unix.SIGCONT))
	}
	if slices.ContainsFunc(p.Threads, func(th *Thread) bool { return th.Resend }) {
		return nil // one that it was to get all the same
	}
	tid := p.Leader().Tid
	mask, err := sys.PtraceGetSigMask(tid)
	if err != nil {
		return ignoreGone(err)
	}
	if err := sys.PtraceSetSigMask(tid, ^uint64(0)); err != nil {
		return ignoreGone(err)
	}
	if err := p.passStop(tid); err != nil {
		return err
	}
	return ignoreGone(sys.PtraceSetSigMask(tid, mask))
}

// passStop lets a thread go on to the delivery of a SIGSTOP.
func (p *Proc) passStop(tid int) error {
	if err := sys.PtraceCont(tid, 0); err != nil {
		return ignoreGone(err)
	}
	for end := time.Now().Add(withdrawPatience); ; {
		st, ok, err := ptrace.TryWait(tid)
		switch {
		case errors.Is(err, unix.ECHILD), err == nil && ok && st.Ended():
			return nil
		case err != nil:
			return err
		case ok && st.Event == 0 && !st.Sysc && st.Signal == unix.SIGSTOP:
			return nil
		case ok: // an interrupt that was left over
			if err := sys.PtraceCont(tid, 0); err != nil {
				return ignoreGone(err)
			}
		case ended(p.Pid, tid):
			return nil // killed; nobody is told of a first thread before all others are reaped
		case time.Now().After(end):
			return fmt.Errorf("the SIGSTOP that held pid %d (%s) did not come within %s", p.Pid, p.Comm, withdrawPatience)
		default:
			time.Sleep(20 * time.Microsecond)
		}
	}
}

// withdrawPatience is how long a thread may take to be told of a signal.
const withdrawPatience = 20 * time.Second

func ignoreGone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// Leftover is a tree that was held when its tracer died: its processes have
// been stopped since by the SIGSTOP that waited for them.
type Leftover struct{ procs []Held }

// NewLeftover takes up a tree that Hold told of, in a process that may have been
// started later. Processes that are no more are left out.
func NewLeftover(held []Held) *Leftover {
	return &Leftover{procs: slices.DeleteFunc(slices.Clone(held), func(h Held) bool { return !h.Lives() })}
}

// Processes counts those that are left.
func (l *Leftover) Processes() int { return len(l.procs) }

// Lives says whether the process is still there, and no zombie.
func (h Held) Lives() bool {
	st, err := procfs.ReadStat(h.Pid)
	return err == nil && st.StartTime == h.Start && st.State != 'Z' && st.State != 'X'
}

// stops says whether a process is stopped or about to be: its tracer may have died
// before it sent the signal.
func (h Held) stops() bool {
	st, err := procfs.ReadStatus(h.Pid)
	return err == nil && (st.State == 'T' || (st.SigPnd|st.ShdPnd)&(1<<(unix.SIGSTOP-1)) != 0)
}

// Thaw lets the tree run on. Its parents have seen the stop, as a shell sees that
// of a job.
func (l *Leftover) Thaw() error {
	var errs []error
	for _, h := range l.procs {
		if h.Own || !h.Lives() || !h.stops() {
			continue
		}
		if err := ignoreGone(unix.Kill(h.Pid, unix.SIGCONT)); err != nil {
			errs = append(errs, fmt.Errorf("continue pid %d: %w", h.Pid, err))
		}
	}
	return errors.Join(errs...)
}

// killPatience is how long a killed process may take to be gone.
const killPatience = 30 * time.Second

// Kill ends the tree; none of it runs again.
func (l *Leftover) Kill() error {
	var errs []error
	for _, h := range l.procs {
		if !h.Lives() {
			continue
		}
		if err := ignoreGone(unix.Kill(h.Pid, unix.SIGKILL)); err != nil {
			errs = append(errs, fmt.Errorf("kill pid %d: %w", h.Pid, err))
		}
	}
	for end := time.Now().Add(killPatience); slices.ContainsFunc(l.procs, Held.Lives); {
		if time.Now().After(end) {
			errs = append(errs, fmt.Errorf("some of the processes are there after %s although they were killed", killPatience))
			break
		}
		time.Sleep(time.Millisecond)
	}
	return errors.Join(errs...)
}
