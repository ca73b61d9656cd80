package freeze

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/procfs"
	"godwit/engine/ptrace"
	"godwit/engine/sys"
)

// StandIn is what is left of a tree that runs elsewhere: its root, stopped for good,
// with no memory and no open file, so that whoever waits for the program that he
// started (a shell, script(1), sshd) waits until it ends there. It dies with its tracer.
type StandIn struct {
	tracer *ptrace.Tracer
	proc   *Proc
	insn   uint64
	once   sync.Once
}

// Pid is its process.
func (s *StandIn) Pid() int { return s.proc.Pid }

// KillButRoot ends every process but the root, and makes that a stand-in. If it fails
// nothing of the tree has run: Kill has to follow.
func (t *Tree) KillButRoot() (*StandIn, error) {
	if t.released {
		return nil, errors.New("the tree was let go already")
	}
	root := t.Root()
	s := &StandIn{tracer: t.Tracer, proc: root}
	err := t.Tracer.Do(func() error {
		for _, th := range root.Threads {
			// Before anything else: it must not go on when the tracer dies.
			if err := sys.PtraceSetOptions(th.Tid, sys.PtraceOptionTraceSysGood|sys.PtraceOptionExitKill); err != nil {
				return fmt.Errorf("set options of task %d: %w", th.Tid, err)
			}
		}
		if err := s.empty(); err != nil {
			return fmt.Errorf("empty pid %d (%s): %w", root.Pid, root.Comm, err)
		}
		return killProcs(t.Procs[1:])
	})
	if err != nil {
		return nil, err
	}
	t.released = true
	return s, nil
}

// addressEnd is above every mapping of a program (TASK_SIZE_MAX with four levels of
// page tables; a mapping above it stays).
const addressEnd = 1<<47 - arch.PageSize

// empty closes what the root has open, and takes its memory but the [vdso].
// Preconditions: on the tracer's thread.
func (s *StandIn) empty() error {
	maps, err := procfs.ReadMaps(s.proc.Pid)
	if err != nil {
		return err
	}
	var vdso procfs.Mapping
	for _, m := range maps {
		if m.Path == "[vdso]" {
			vdso = m
		}
	}
	if s.insn, err = ptrace.FindInsn(s.proc.Pid, vdso.Start, vdso.End); err != nil {
		return err
	}
	lead := s.proc.Leader()
	r, err := ptrace.Borrow(lead.Tid, s.insn, lead.Regs, false, 0)
	if err != nil {
		return err
	}
	ignore := make([]byte, 32) // struct kernel_sigaction
	binary.NativeEndian.PutUint64(ignore, 1)
	if err := r.SlowAction(unix.SIGCHLD, ignore); err != nil { // its children are reaped by nobody
		return err
	}
	if q := lead.Rseq; q.Pointer != 0 {
		// The kernel writes there whenever the task has been preempted.
		if _, err := r.Slow(unix.SYS_RSEQ, q.Pointer, uint64(q.Size), 1, uint64(q.Signature)); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		name string
		nr   uintptr
		args []uint64
	}{
		{"close_range", unix.SYS_CLOSE_RANGE, []uint64{0, math.MaxUint32, 0}},
		{"munmap", unix.SYS_MUNMAP, []uint64{0, vdso.Start}},
		{"munmap", unix.SYS_MUNMAP, []uint64{vdso.End, addressEnd - vdso.End}},
	} {
		ret, err := r.Slow(c.nr, c.args...)
		if err == nil {
			err = ptrace.Errno(c.name, ret)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// End lets the stand-in exit with a status, 0 to 255. It may be called again.
func (s *StandIn) End(status int) (err error) {
	s.once.Do(func() {
		err = s.tracer.Do(func() error {
			lead := s.proc.Leader()
			regs, err := ptrace.GetRegs(lead.Tid)
			if err == nil {
				regs.SetSyscall(s.insn, unix.SYS_EXIT_GROUP, [6]uint64{uint64(status & 0xff)})
				err = ptrace.SetRegs(lead.Tid, &regs)
			}
			if err == nil {
				err = sys.PtraceCont(lead.Tid, 0)
			}
			if err != nil { // somebody has killed it, or is about to have
				_ = unix.Kill(s.proc.Pid, unix.SIGKILL)
			}
			return reapThreads(s.proc)
		})
		s.tracer.Close()
	})
	return err
}

// Lives says whether it is there; somebody may have killed it.
func (s *StandIn) Lives() bool {
	st, err := procfs.ReadStat(s.proc.Pid)
	return err == nil && !st.Ended() && st.State != 'X' && st.State != 'Z'
}
