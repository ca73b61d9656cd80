// Package freeze owns the stopping of whole process trees: seizing every
// process and thread, forks that race with it included, and letting them go or
// ending them. It must not know what is read from a frozen tree.
package freeze

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/cgroup"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// Thread is one stopped thread.
type Thread struct {
	Tid  int // on this host
	VTid int // in its own pid namespace
	// Regs are the registers with which the thread goes on. They differ from
	// those at the stop only for a thread inside a restartable sequence, which
	// is at its abort address, as after any preemption, and for one in a system
	// call that the stop made fail with EINTR, which is made again.
	Regs arch.Regs
	Rseq sys.RseqConfig
	// Resend says that a SIGSTOP was withheld while the thread worked for us.
	Resend bool
	// stop is the signal of the group stop that the thread takes part in, 0 for none.
	stop unix.Signal
	// filtered: it is under seccomp; waits: a signal waits for it and does something.
	filtered, waits bool
}

// Proc is one process of a frozen tree.
type Proc struct {
	Pid, PPid         int // on this host; PPid of the root is its parent outside the tree
	VPid, VPgid, VSid int // in its own pid namespace
	Comm              string
	Threads           []*Thread // the leader first; none for a zombie
	Zombie            bool
	ExitCode          int // wait status of a zombie
	// Stop is the signal that stopped the process before it was frozen, 0 if it
	// was running. Thawed, it is stopped as before.
	Stop unix.Signal
	// StopSeen says that the parent has been told of that stop by waitpid.
	StopSeen bool
	Parent   *Proc

	held      bool // a SIGSTOP of Hold waits for it
	continues bool // a SIGCONT waited for it before
}

// Leader is the first thread.
func (p *Proc) Leader() *Thread { return p.Threads[0] }

// Tree is a frozen tree.
type Tree struct {
	Tracer *ptrace.Tracer
	Procs  []*Proc // parents before children; the root first
	// FrozenAt is when the first task was told to stop.
	FrozenAt time.Time
	// FreezeDur is from then until all had stopped.
	FreezeDur time.Duration
	// group is the control group by which the tree was stopped, nil if by none.
	group    *cgroup.Freezer
	released bool
}

// Root is the root process.
func (t *Tree) Root() *Proc { return t.Procs[0] }

// Threads counts all threads.
func (t *Tree) Threads() int {
	n := 0
	for _, p := range t.Procs {
		n += len(p.Threads)
	}
	return n
}

// passingError says that a tree cannot be frozen at this moment, but may be at
// the next one.
type passingError struct{ err error }

func (e *passingError) Error() string { return e.err.Error() }
func (e *passingError) Unwrap() error { return e.err }

// Freeze stops the tree below pid. If it fails, whatever was stopped runs on.
// While a vfork is in progress, or a thread of many executes another program,
// the tree is let go for a moment, again and again.
func Freeze(ctx context.Context, pid int, timeout time.Duration) (*Tree, error) {
	return FreezeIn(ctx, pid, timeout, "")
}

// FreezeIn is Freeze that stops all tasks at once by the freezer of control groups:
// group is the directory of a group that all of them are in. It is thawed as soon
// as they are stopped; a tree that is let go is in a group as it was found.
func FreezeIn(ctx context.Context, pid int, timeout time.Duration, group string) (*Tree, error) {
	for until := time.Now().Add(timeout); ; {
		t, err := freeze(ctx, pid, time.Until(until), group)
		var p *passingError
		if !errors.As(err, &p) {
			return t, err
		}
		time.Sleep(passingPause)
		if ctx.Err() != nil || time.Now().After(until) {
			return nil, errors.Join(fmt.Errorf("%w; it was the same for %s", err, timeout), ctx.Err())
		}
	}
}

const (
	// vforkPatience is how long a thread may take to stop before it is taken for
	// one that waits for its child.
	vforkPatience = 3 * time.Millisecond
	passingPause  = 5 * time.Millisecond
)

func freeze(ctx context.Context, pid int, timeout time.Duration, group string) (*Tree, error) {
	t := &Tree{Tracer: ptrace.NewTracer(), FrozenAt: time.Now()}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not all tasks stopped within %s", timeout))
	defer cancel()
	err := t.Tracer.Do(func() (err error) {
		s := &seizer{ctx: ctx, known: map[int]bool{}, told: map[int]bool{}, seized: map[int][]int{}, procs: map[int]*Proc{}}
		if group != "" {
			t.group, err = s.group(pid, group)
		}
		if err == nil {
			err = s.tree(pid)
		}
		t.Procs = s.order
		if err == nil {
			err = s.identify()
		}
		if err != nil {
			s.unnoticed()
		}
		return err
	})
	t.FreezeDur = time.Since(t.FrozenAt)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("freeze the tree of pid %d: %w", pid, err), t.Thaw())
	}
	return t, nil
}

type seizer struct {
	ctx   context.Context
	known map[int]bool // tids that are stopped
	told  map[int]bool // tids that are seized and were told to stop
	// seized are the tids that were seized, by pid.
	seized map[int][]int
	procs  map[int]*Proc
	order  []*Proc
}

// group seizes what is in a control group while that stands still, and thaws it:
// nothing of it runs in between.
func (s *seizer) group(root int, dir string) (*cgroup.Freezer, error) {
	g, err := cgroup.OpenFreezer(dir)
	if err != nil {
		return nil, err
	}
	if err := g.Freeze(s.ctx); err != nil {
		return nil, err
	}
	if err := s.tell(root, g); err != nil {
		return nil, errors.Join(err, g.Restore())
	}
	return g, g.Thaw()
}

// tell seizes all of a tree that stands still, and tells it to stop.
func (s *seizer) tell(root int, g *cgroup.Freezer) error {
	in, err := g.Tids()
	if err != nil {
		return err
	}
	pids, err := procfs.Tree(root)
	if err != nil {
		return fmt.Errorf("list the tree of pid %d: %w", root, err)
	}
	for _, pid := range pids {
		st, err := procfs.ReadStat(pid)
		if procfs.Gone(err) || err == nil && st.Zombie() {
			continue
		}
		if err != nil {
			return fmt.Errorf("read state of pid %d: %w", pid, err)
		}
		tids, err := procfs.Tids(pid)
		if err != nil {
			return fmt.Errorf("list threads of pid %d: %w", pid, err)
		}
		for _, tid := range tids {
			if !in[tid] {
				return fmt.Errorf("task %d of pid %d (%s) is not in the control group %s, which does not stop it", tid, pid, st.Comm, g.Name())
			}
			if s.told[tid], err = s.seize(&Proc{Pid: pid, Comm: st.Comm}, tid); err != nil {
				return err
			}
		}
	}
	return nil
}

// tree seizes until a full pass over the tree finds no task that is not yet
// stopped: a stopped task makes no new ones.
func (s *seizer) tree(root int) error {
	for {
		found := 0
		pids, err := procfs.Tree(root)
		if err != nil && !procfs.Gone(err) {
			return fmt.Errorf("list the tree of pid %d: %w", root, err)
		}
		for _, pid := range pids {
			n, err := s.process(pid)
			if err != nil {
				return err
			}
			found += n
		}
		if len(s.order) == 0 {
			return fmt.Errorf("no process has pid %d: %w", root, unix.ESRCH)
		}
		if found == 0 {
			return s.settle()
		}
	}
}

// settle drops processes that ended between two passes, and lets go those that
// left the tree because their parent ended.
func (s *seizer) settle() error {
	var order []*Proc
	in := map[int]bool{}
	for i, p := range s.order {
		if !p.Zombie && len(p.Threads) == 0 {
			continue
		}
		st, err := procfs.ReadStat(p.Pid)
		if procfs.Gone(err) {
			continue // a zombie that was reaped from outside
		}
		if err != nil {
			return fmt.Errorf("read state of pid %d: %w", p.Pid, err)
		}
		if p.PPid = st.PPid; i > 0 && !in[p.PPid] {
			for _, th := range p.Threads {
				if err := sys.PtraceDetach(th.Tid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("let task %d of pid %d go, which left the tree: %w", th.Tid, p.Pid, err)
				}
			}
			continue
		}
		in[p.Pid] = true
		order = append(order, p)
	}
	s.order = order
	if len(order) == 0 || order[0].Zombie {
		return fmt.Errorf("the root process has exited: %w", unix.ESRCH)
	}
	return nil
}

func (s *seizer) process(pid int) (found int, err error) {
	st, err := procfs.ReadStat(pid)
	if procfs.Gone(err) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read state of pid %d: %w", pid, err)
	}
	p := s.procs[pid]
	if p == nil {
		p = &Proc{Pid: pid, Comm: st.Comm}
		s.procs[pid] = p
		s.order = append(s.order, p)
		found++
	}
	p.PPid = st.PPid
	p.Parent = s.procs[st.PPid]
	if p.Zombie {
		return found, nil
	}
	tids, err := procfs.Tids(pid)
	if procfs.Gone(err) {
		return found, nil
	}
	if err != nil {
		return 0, fmt.Errorf("list threads of pid %d: %w", pid, err)
	}
	if st.State == 'Z' || st.State == 'X' {
		if !st.Ended() {
			// So it is for a moment when another thread executes a program, and when all end.
			return 0, &passingError{fmt.Errorf("pid %d (%s): its first thread has exited while others run, which cannot be rebuilt", pid, st.Comm)}
		}
		p.Zombie = true
		p.Threads = nil
		p.ExitCode = st.ExitCode
		return found, nil
	}
	// All are told to stop before any is waited for: they stop side by side.
	var told []int
	for _, tid := range tids {
		if s.known[tid] {
			continue
		}
		if s.told[tid] {
			told = append(told, tid)
			continue
		}
		ok, err := s.seize(p, tid)
		if err != nil {
			return 0, err
		}
		if ok {
			told = append(told, tid)
		}
	}
	for _, tid := range told {
		stop, alive, err := s.awaitStop(p, tid)
		if err != nil {
			return 0, err
		}
		if !alive {
			continue
		}
		s.known[tid] = true
		found++
		th := &Thread{Tid: tid, stop: stop}
		if tid == pid {
			p.Threads = append([]*Thread{th}, p.Threads...)
		} else {
			p.Threads = append(p.Threads, th)
		}
	}
	return found, nil
}

// seize attaches to one thread and tells it to stop; false if it is no more.
func (s *seizer) seize(p *Proc, tid int) (bool, error) {
	if err := context.Cause(s.ctx); err != nil {
		return false, err
	}
	if err := s.attach(p, tid); err != nil {
		st, serr := procfs.ReadTaskStatus(p.Pid, tid)
		switch {
		case errors.Is(err, unix.ESRCH), procfs.Gone(serr):
			return false, nil
		case serr == nil && (st.State == 'Z' || st.State == 'X'):
			return false, nil // the next pass sees what it was
		case serr == nil && st.TracerPid != 0 && st.TracerPid != unix.Gettid():
			return false, fmt.Errorf("pid %d (%s) is being traced by pid %d; detach that tracer first: %w", p.Pid, p.Comm, st.TracerPid, err)
		}
		err = fmt.Errorf("seize task %d of pid %d (%s): %w", tid, p.Pid, p.Comm, err)
		if errors.Is(err, unix.EPERM) && serr == nil {
			// Another thread, which may be ours, takes its place: it executes a program.
			return false, &passingError{err}
		}
		return false, err
	}
	if err := sys.PtraceInterrupt(tid); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return false, nil
		}
		return false, fmt.Errorf("stop task %d of pid %d (%s): %w", tid, p.Pid, p.Comm, err)
	}
	return true, nil
}

// attach seizes a thread. The kernel lets nobody attach to a process of which a
// thread executes a program, and that thread waits until the others have been
// reaped, by us those that are ours.
func (s *seizer) attach(p *Proc, tid int) error {
	attached, done := make(chan struct{}), make(chan struct{})
	helper := time.AfterFunc(vforkPatience, func() {
		defer close(done)
		for {
			s.bury(p)
			select {
			case <-attached:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	err := sys.PtraceSeize(tid, sys.PtraceOptionTraceSysGood)
	if !helper.Stop() {
		close(attached)
		<-done
	}
	if err == nil {
		s.seized[p.Pid] = append(s.seized[p.Pid], tid)
	}
	return err
}

// bury reaps the threads of a process that have ended since they were seized; true
// if there were any.
func (s *seizer) bury(p *Proc) bool {
	some := false
	s.seized[p.Pid] = slices.DeleteFunc(s.seized[p.Pid], func(tid int) bool {
		ended, err := sys.Reap(tid)
		some = some || ended
		return ended || errors.Is(err, unix.ECHILD)
	})
	return some
}

// awaitStop waits until a thread that was told to stop has stopped; stop is the
// signal of the group stop that it takes part in, 0 for none.
func (s *seizer) awaitStop(p *Proc, tid int) (stop unix.Signal, alive bool, err error) {
	pause := 20 * time.Microsecond
	for told := time.Now(); ; {
		st, ok, err := ptrace.TryWait(tid)
		switch {
		case errors.Is(err, unix.ECHILD):
			return 0, false, nil
		case err != nil:
			return 0, false, err
		case !ok:
			if cause := context.Cause(s.ctx); cause != nil {
				// It stays seized and runs on; ending the tracer's thread lets it go.
				return 0, false, fmt.Errorf("task %d of pid %d (%s) does not stop (%s): %w", tid, p.Pid, p.Comm, waitingIn(p.Pid, tid), cause)
			}
			if time.Since(told) > vforkPatience && procfs.InVfork(p.Pid, tid) {
				return 0, false, &passingError{fmt.Errorf("task %d of pid %d (%s) waits for a child that it made by vfork", tid, p.Pid, p.Comm)}
			}
			if time.Since(told) > vforkPatience && ended(p.Pid, tid) {
				// Nobody is told of a first thread that has ended before all others
				// are reaped, of which some are ours.
				return 0, false, &passingError{fmt.Errorf("task %d of pid %d (%s) is ending", tid, p.Pid, p.Comm)}
			}
			if time.Since(told) > vforkPatience && s.bury(p) {
				return 0, false, &passingError{fmt.Errorf("task %d of pid %d (%s) executes a program, which has ended other threads", tid, p.Pid, p.Comm)}
			}
			time.Sleep(pause)
			pause = min(pause*2, 2*time.Millisecond)
			continue
		case st.Ended():
			return 0, false, nil
		case st.Event == sys.PtraceEventStop && st.Signal == unix.SIGTRAP:
			return 0, true, nil
		case st.Event == sys.PtraceEventStop:
			return st.Signal, true, nil
		case st.Event == 0 && !st.Sysc:
			// A signal was on its way: let it be delivered, then stop.
			if err := sys.PtraceCont(tid, int(st.Signal)); err != nil {
				if errors.Is(err, unix.ESRCH) {
					continue
				}
				return 0, false, err
			}
			if err := sys.PtraceInterrupt(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, false, err
			}
		default:
			return 0, false, &ptrace.StopError{Want: "an event stop", Got: st}
		}
	}
}

func ended(pid, tid int) bool {
	st, err := procfs.ReadTaskStat(pid, tid)
	return procfs.Gone(err) || err == nil && (st.State == 'Z' || st.State == 'X')
}

func waitingIn(pid, tid int) string {
	st, err := procfs.ReadTaskStat(pid, tid)
	if err != nil {
		return "state unknown"
	}
	if ptrace.Frozen(tid, st.State) {
		return "it stands still in a frozen control group"
	}
	return fmt.Sprintf("state %c", st.State)
}

// identify reads what only a stopped tree holds still for.
func (s *seizer) identify() error {
	for _, p := range s.order {
		p.Parent = s.procs[p.PPid]
		st, err := procfs.ReadStatus(p.Pid)
		if err != nil {
			return fmt.Errorf("read status of pid %d (%s): %w", p.Pid, p.Comm, err)
		}
		p.Comm = st.Name
		p.VPid, p.VPgid, p.VSid = inner(st.NSpid), inner(st.NSpgid), inner(st.NSsid)
		if p.Zombie {
			stat, err := procfs.ReadStat(p.Pid)
			if err != nil {
				return fmt.Errorf("read exit status of pid %d (%s): %w", p.Pid, p.Comm, err)
			}
			p.ExitCode = stat.ExitCode
			continue
		}
		if err := s.groupStop(p); err != nil {
			return fmt.Errorf("pid %d (%s): %w", p.Pid, p.Comm, err)
		}
		for _, th := range p.Threads {
			if err := th.identify(p); err != nil {
				return fmt.Errorf("pid %d (%s): %w", p.Pid, p.Comm, err)
			}
		}
	}
	return s.calls()
}

// calls sees to the system calls in which threads were stopped.
func (s *seizer) calls() error {
	var unnamed []*ptrace.Continued
	of := map[*ptrace.Continued]*Thread{}
	for _, p := range s.order {
		for _, th := range p.Threads {
			if th.Regs.ContinuesUnnamed() || th.Regs.AboutToContinue() && th.atSyscall() {
				c := &ptrace.Continued{Pid: p.Pid, Tid: th.Tid, Regs: &th.Regs}
				unnamed, of[c] = append(unnamed, c), th
			}
		}
	}
	err := ptrace.NameContinued(unnamed)
	for c, th := range of {
		th.Resend = th.Resend || c.Stopped
	}
	if err != nil {
		return err
	}
	for _, p := range s.order {
		for _, th := range p.Threads {
			if err := th.again(); err != nil {
				return fmt.Errorf("pid %d (%s): %w", p.Pid, p.Comm, err)
			}
		}
	}
	return nil
}

// unnoticed hides the stop from threads that are let go without having been
// frozen, as far as it can be.
func (s *seizer) unnoticed() {
	for _, p := range s.order {
		for _, th := range p.Threads {
			st, err := procfs.ReadTaskStatus(p.Pid, th.Tid)
			if err != nil || st.State != 't' {
				continue // it runs already, or is no more
			}
			if th.Regs, err = ptrace.GetRegs(th.Tid); err == nil && th.Regs.Native() {
				th.waits = effective(&st) != 0
				_ = th.again()
			}
		}
	}
}

// groupStop finds out whether a signal had stopped a process. One that was
// about to stop has stopped afterwards.
func (s *seizer) groupStop(p *Proc) error {
	if !slices.ContainsFunc(p.Threads, func(th *Thread) bool { return th.stop != 0 }) {
		return nil
	}
	for _, th := range p.Threads {
		if th.stop != 0 {
			continue
		}
		// It stopped for us just before the others met the signal; the interrupt
		// keeps it from running on.
		if err := sys.PtraceInterrupt(th.Tid); err != nil {
			return fmt.Errorf("stop task %d: %w", th.Tid, err)
		}
		if err := sys.PtraceCont(th.Tid, 0); err != nil {
			return fmt.Errorf("have task %d join the stop of its process: %w", th.Tid, err)
		}
		stop, alive, err := s.awaitStop(p, th.Tid)
		if err != nil {
			return err
		}
		if !alive {
			return fmt.Errorf("task %d ended while it was stopped: %w", th.Tid, unix.ESRCH)
		}
		if stop == 0 {
			return nil // a SIGCONT came in between
		}
		th.stop = stop
	}
	st, err := procfs.ReadStat(p.Pid)
	if err != nil {
		return fmt.Errorf("read state of pid %d: %w", p.Pid, err)
	}
	// The code of a stop is cleared when a waitpid of the parent took it
	// (do_task_stat, fs/proc/array.c, 5.17).
	p.Stop, p.StopSeen = p.Leader().stop, st.ExitCode == 0
	return nil
}

func inner(ids []int) int {
	if len(ids) == 0 {
		return 0
	}
	return ids[len(ids)-1]
}

func (th *Thread) identify(p *Proc) error {
	st, err := procfs.ReadTaskStatus(p.Pid, th.Tid)
	if procfs.Gone(err) || err == nil && st.State != 't' {
		// Another thread has executed a program, or somebody killed it.
		return &passingError{fmt.Errorf("task %d is not stopped any more", th.Tid)}
	}
	if err != nil {
		return fmt.Errorf("read status of task %d: %w", th.Tid, err)
	}
	th.VTid = inner(st.NSpid)
	if th.Regs, err = ptrace.GetRegs(th.Tid); err != nil {
		return err
	}
	if !th.Regs.Native() {
		return fmt.Errorf("task %d runs 32-bit code, which cannot be carried", th.Tid)
	}
	if err := th.privileged(); err != nil {
		return err
	}
	if th.Rseq, err = sys.PtraceRseqConfig(th.Tid); err != nil {
		return fmt.Errorf("read rseq registration of task %d: %w", th.Tid, err)
	}
	if err := th.leaveRseq(); err != nil {
		return err
	}
	if st.Seccomp != 0 {
		// What it executes for us is not subject to its filters.
		if err := sys.PtraceSetOptions(th.Tid, sys.PtraceOptionTraceSysGood|sys.PtraceOptionSuspendSeccomp); err != nil {
			return fmt.Errorf("suspend seccomp of task %d (the agent itself must not be under seccomp): %w", th.Tid, err)
		}
	}
	th.filtered, th.waits = st.Seccomp != 0, effective(&st) != 0
	return nil
}

// again makes the call of a thread that the stop made fail, or which the kernel
// would go on with in a way that it may not, a call that is yet to be made.
func (th *Thread) again() error {
	if th.filtered && th.Regs.Continues() {
		// The kernel would go on with the call as restart_syscall, which a
		// filter need not allow.
		th.Regs.RestartInNewTask()
		return ptrace.SetRegs(th.Tid, &th.Regs)
	}
	// The stop itself makes some calls fail with EINTR, which the program
	// should not see; a signal that waits for it is a reason of its own.
	// So is a stop signal that came before us.
	if !th.waits && th.stop == 0 && th.Regs.HideInterrupt() {
		return ptrace.SetRegs(th.Tid, &th.Regs)
	}
	return nil
}

// passing are signals that do nothing unless a program catches them.
const passing = 1<<(unix.SIGCHLD-1) | 1<<(unix.SIGCONT-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGWINCH-1)

// effective are the signals that wait for a thread and do something to it. Those
// that it ignores are queued only because it is traced.
func effective(st *procfs.Status) uint64 {
	return (st.SigPnd | st.ShdPnd) &^ (st.SigBlk | st.SigIgn | passing&^st.SigCgt)
}

// atSyscall says whether the next instruction is a system call.
func (th *Thread) atSyscall() bool {
	b := make([]byte, len(arch.SyscallInsn))
	_, err := readMem(th.Tid, th.Regs.PC(), b)
	return err == nil && bytes.Equal(b, arch.SyscallInsn)
}

// privileged refuses a thread that has access to I/O ports, or breakpoints of
// the CPU that a debugger has left.
func (th *Thread) privileged() error {
	if th.Regs.IOPL() {
		return fmt.Errorf("task %d has raised its I/O privilege level (iopl), which cannot be carried", th.Tid)
	}
	// A kernel without ioperm gives ENODEV, a task without ports nothing.
	var ports [arch.PageSize]byte
	if n, err := sys.PtraceGetRegSet(th.Tid, sys.NT386IOPerm, ports[:]); err == nil && n > 0 {
		return fmt.Errorf("task %d has access to I/O ports (ioperm), which cannot be carried", th.Tid)
	}
	control, err := sys.PtracePeekUser(th.Tid, arch.DebugControl)
	if err != nil {
		return fmt.Errorf("read debug registers of task %d: %w", th.Tid, err)
	}
	if control&arch.DebugEnabled != 0 {
		return fmt.Errorf("task %d has breakpoints in debug registers, which cannot be carried", th.Tid)
	}
	return nil
}

// leaveRseq moves a thread that stands inside a restartable sequence to its
// abort address. The kernel would do that when it runs again, but only as
// long as its registers are its own: a system call executed for us would clear
// the sequence without an abort. (struct rseq and rseq_cs, include/uapi/linux/rseq.h)
func (th *Thread) leaveRseq() error {
	if th.Rseq.Pointer == 0 {
		return nil
	}
	var ptr [8]byte
	if _, err := readMem(th.Tid, th.Rseq.Pointer+8, ptr[:]); err != nil {
		return fmt.Errorf("read rseq area of task %d: %w", th.Tid, err)
	}
	cs := binary.LittleEndian.Uint64(ptr[:])
	if cs == 0 {
		return nil
	}
	var desc [32]byte
	if _, err := readMem(th.Tid, cs, desc[:]); err != nil {
		return fmt.Errorf("read rseq critical section of task %d: %w", th.Tid, err)
	}
	start := binary.LittleEndian.Uint64(desc[8:])
	length := binary.LittleEndian.Uint64(desc[16:])
	abort := binary.LittleEndian.Uint64(desc[24:])
	if pc := th.Regs.PC(); pc-start < length {
		th.Regs.SetPC(abort)
		th.Regs.NoRestart()
	}
	return nil
}

func readMem(tid int, addr uint64, b []byte) (int, error) {
	return sys.ProcessVMRead(tid, b, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}})
}

// Thaw lets every task run on; a process that was stopped by a signal stays stopped.
func (t *Tree) Thaw() error { return t.release(false) }

// ThawStopped lets every task go, but stopped by SIGSTOP before it executes an
// instruction: SIGCONT makes the tree run on.
func (t *Tree) ThawStopped() error { return t.release(true) }

func (t *Tree) release(stopped bool) error {
	if t.released {
		return nil
	}
	t.released = true
	err := t.Tracer.Do(func() error {
		// Before any of them runs.
		errs := []error{t.group.Restore()}
		for _, p := range t.Procs {
			if err := p.withdraw(); err != nil {
				errs = append(errs, err)
			}
			if stopped && !p.Zombie {
				// Queued before the first thread is let go, as below.
				if err := unix.Kill(p.Pid, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("stop pid %d (%s): %w", p.Pid, p.Comm, err))
				}
			}
			for _, th := range p.Threads {
				if th.Resend {
					// Queued before the detach, so that the task stops before it runs.
					if err := unix.Tgkill(p.Pid, th.Tid, unix.SIGSTOP); err != nil {
						errs = append(errs, fmt.Errorf("send SIGSTOP again to task %d: %w", th.Tid, err))
					}
				}
				if err := sys.PtraceDetach(th.Tid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("let task %d of pid %d (%s) go: %w", th.Tid, p.Pid, p.Comm, err))
				}
			}
		}
		return errors.Join(errs...)
	})
	// Ending the thread lets go what could not be detached.
	t.Tracer.Close()
	return err
}

// Kill ends every task; none of them runs another instruction of its own.
func (t *Tree) Kill() error {
	if t.released {
		return errors.New("the tree was let go already")
	}
	t.released = true
	err := t.Tracer.Do(func() error { return killProcs(t.Procs) })
	t.Tracer.Close()
	return err
}

// killProcs ends processes and waits until they are gone.
// Preconditions: on the tracer's thread.
func killProcs(procs []*Proc) error {
	var errs []error
	for _, p := range procs {
		if p.Zombie {
			continue
		}
		if err := unix.Kill(p.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill pid %d (%s): %w", p.Pid, p.Comm, err))
		}
	}
	// Children before their parents: the first process of a pid namespace ends
	// after all others in it.
	for _, p := range slices.Backward(procs) {
		errs = append(errs, reapThreads(p))
	}
	return errors.Join(errs...)
}

// reapThreads waits until the threads of a process that ends are gone. The leader
// comes last: waiting for it while the others are not reaped never returns.
func reapThreads(p *Proc) error {
	var errs []error
	for _, th := range slices.Backward(p.Threads) {
		errs = append(errs, Reap(th.Tid))
	}
	return errors.Join(errs...)
}

// Reap waits until a killed tracee is gone.
// Preconditions: on the tracer's thread.
func Reap(tid int) error {
	for {
		s, err := ptrace.Wait(tid)
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if err != nil || s.Ended() {
			return err
		}
	}
}
