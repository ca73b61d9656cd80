package ptrace

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"godwit/engine/arch"
	"godwit/engine/sys"
)

// AreaSize is the memory that a Remote borrows in its target: one page of
// code, the rest table and buffers.
const AreaSize = 256 << 10

// Remote executes system calls in one stopped task. Its methods are called on
// the tracer's thread.
//
// A borrowed Remote (Borrow) leaves the target as it was found: the area is
// mapped through the system-call instruction of the target's own [vdso], so
// that no byte of the target is changed, and is unmapped the same way.
type Remote struct {
	Tid int
	// Insn is the address of a system-call instruction in the target.
	Insn uint64
	// Area is the start of the borrowed memory, 0 if there is none.
	Area uint64
	// Base are registers to start from: segments and flags of the target.
	Base arch.Regs
	// Stopped says that a SIGSTOP came while the target was busy for us; the
	// holder sends it again.
	Stopped bool
	// Born are tasks that the target created during the last Run, traced and
	// stopped before their first instruction; host pids.
	Born []int
}

const allSignals = ^uint64(0)

// BlockSignals blocks all signals of a stopped task but SIGTRAP, which ends
// each batch, and returns the mask that it had.
func BlockSignals(tid int) (old uint64, err error) {
	if old, err = sys.PtraceGetSigMask(tid); err != nil {
		return 0, fmt.Errorf("read signal mask of task %d: %w", tid, err)
	}
	if err := sys.PtraceSetSigMask(tid, allSignals&^(1<<(uint(unix.SIGTRAP)-1))); err != nil {
		return 0, fmt.Errorf("block signals of task %d: %w", tid, err)
	}
	return old, nil
}

// GetRegs reads the general registers of a stopped task.
func GetRegs(tid int) (arch.Regs, error) {
	var r arch.Regs
	var buf [arch.RegsSize]byte
	n, err := sys.PtraceGetRegSet(tid, sys.NTPrstatus, buf[:])
	if err != nil {
		return r, fmt.Errorf("read registers of task %d: %w", tid, err)
	}
	if err := r.Decode(buf[:n]); err != nil {
		return r, fmt.Errorf("task %d: %w", tid, err)
	}
	return r, nil
}

// SetRegs writes the general registers of a stopped task.
func SetRegs(tid int, r *arch.Regs) error {
	if err := sys.PtraceSetRegSet(tid, sys.NTPrstatus, r.Encode()); err != nil {
		return fmt.Errorf("write registers of task %d: %w", tid, err)
	}
	return nil
}

// FindInsn looks for a system-call instruction in [start, end) of a process: its [vdso].
func FindInsn(pid int, start, end uint64) (uint64, error) {
	if end <= start || end-start > 1<<20 {
		return 0, fmt.Errorf("pid %d has no usable [vdso] (%#x-%#x)", pid, start, end)
	}
	b := make([]byte, end-start)
	n, err := sys.ProcessVMRead(pid, b, []unix.RemoteIovec{{Base: uintptr(start), Len: len(b)}})
	if err != nil {
		return 0, fmt.Errorf("read [vdso] of pid %d: %w", pid, err)
	}
	i := bytes.Index(b[:n], arch.SyscallInsn)
	if i < 0 {
		return 0, fmt.Errorf("[vdso] of pid %d holds no system-call instruction", pid)
	}
	return start + uint64(i), nil
}

// Slow executes one system call by stopping at its entry and its exit; it
// needs no area. The result is raw: -4095..-1 is a negated errno.
func (r *Remote) Slow(nr uintptr, args ...uint64) (int64, error) {
	var a [6]uint64
	copy(a[:], args)
	regs := r.Base
	regs.SetSyscall(r.Insn, nr, a)
	if err := SetRegs(r.Tid, &regs); err != nil {
		return 0, err
	}
	for _, want := range []string{"entry to", "exit from"} {
		if err := r.resumeUntil(sys.PtraceSyscall, fmt.Sprintf("%s system call %d", want, nr), func(s Stop) bool { return s.Sysc }); err != nil {
			return 0, err
		}
	}
	got, err := GetRegs(r.Tid)
	return got.Ret(), err
}

// resumeUntil resumes the target until a stop that is wanted, passing over
// those that tracing itself causes.
func (r *Remote) resumeUntil(resume func(tid, sig int) error, want string, ok func(Stop) bool) error {
	if err := r.resume(resume, 0); err != nil {
		return err
	}
	return r.until(resume, want, ok)
}

func (r *Remote) resume(resume func(tid, sig int) error, signal int) error {
	if err := resume(r.Tid, signal); err != nil {
		return fmt.Errorf("resume task %d: %w", r.Tid, gone(err))
	}
	return nil
}

// until is resumeUntil for a target that has been resumed.
func (r *Remote) until(resume func(tid, sig int) error, want string, ok func(Stop) bool) error {
	for {
		s, err := Wait(r.Tid)
		signal := 0
		switch {
		case err != nil && ok(s):
			return nil // it was told to stop, and that is what is wanted
		case err != nil:
			return err
		case s.Ended():
			return &StopError{Want: want, Got: s}
		case ok(s):
			return nil
		case s.Event == unix.PTRACE_EVENT_FORK, s.Event == unix.PTRACE_EVENT_VFORK, s.Event == unix.PTRACE_EVENT_CLONE:
			child, err := sys.PtraceEventMsg(r.Tid)
			if err != nil {
				return err
			}
			cs, err := Wait(int(child))
			if err != nil {
				return err
			}
			if cs.Ended() {
				return &StopError{Want: "first stop of a new task", Got: cs}
			}
			r.Born = append(r.Born, int(child))
		case s.Event == sys.PtraceEventStop:
			// A left-over interrupt, or a group stop: SIGCONT and SIGSTOP from outside.
		case s.Event == 0 && s.Signal == unix.SIGSTOP:
			r.Stopped = true // cannot be blocked; withheld until the holder sends it again
		case r.faulted(s):
			signal = int(s.Signal)
		default:
			return &StopError{Want: want, Got: s}
		}
		if err := r.resume(resume, signal); err != nil {
			return err
		}
	}
}

// faulted says whether a signal is one of an instruction of the program's own, which
// waited when the target was stopped. Although it is blocked, it comes before the
// breakpoint of ours (dequeue_synchronous_signal, kernel/signal.c); resumed with
// it, the target queues it again, behind that.
func (r *Remote) faulted(s Stop) bool {
	switch s.Signal {
	case unix.SIGSEGV, unix.SIGBUS, unix.SIGILL, unix.SIGFPE, unix.SIGSYS:
	default:
		return false
	}
	if s.Event != 0 || s.Sysc {
		return false
	}
	// A fault of what is executed for us would have unblocked it.
	mask, err := sys.PtraceGetSigMask(r.Tid)
	return err == nil && mask&(1<<(s.Signal-1)) != 0
}

func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return errors.Join(err, ErrGone)
	}
	return err
}

// Map maps an area at addr, or anywhere for 0, and makes it ready for Run.
func (r *Remote) Map(addr uint64) error {
	flags := uint64(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS)
	if addr != 0 {
		flags |= unix.MAP_FIXED_NOREPLACE
	}
	// Never writable and executable at once, nor one after the other: some systems,
	// and programs for themselves (PR_SET_MDWE), forbid it.
	ret, err := r.Slow(unix.SYS_MMAP, addr, AreaSize, unix.PROT_READ|unix.PROT_EXEC, flags, ^uint64(0), 0)
	if err != nil {
		return err
	}
	if err := Errno("mmap", ret); errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("map %d bytes in task %d, which locks all its new memory (mlockall) and may not lock more (RLIMIT_MEMLOCK): %w", AreaSize, r.Tid, err)
	} else if err != nil {
		return fmt.Errorf("map %d bytes in task %d: %w", AreaSize, r.Tid, err)
	}
	area := uint64(ret)
	if err := r.load(area); err != nil {
		_, uerr := r.Slow(unix.SYS_MUNMAP, area, AreaSize)
		return errors.Join(err, uerr)
	}
	r.Area = area
	return nil
}

func (r *Remote) load(area uint64) error {
	code := append([]byte(nil), arch.BatchCode...)
	for len(code)%8 != 0 {
		code = append(code, 0)
	}
	for at := 0; at < len(code); at += 8 {
		if err := sys.PtracePoke(r.Tid, area+uint64(at), binary.LittleEndian.Uint64(code[at:])); err != nil {
			return fmt.Errorf("write code to task %d: %w", r.Tid, err)
		}
	}
	ret, err := r.Slow(unix.SYS_MPROTECT, area+arch.PageSize, AreaSize-arch.PageSize, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return err
	}
	if err := Errno("mprotect", ret); err != nil {
		return fmt.Errorf("make area of task %d writable: %w", r.Tid, err)
	}
	return nil
}

// Unmap gives the area back.
func (r *Remote) Unmap() error {
	if r.Area == 0 {
		return nil
	}
	ret, err := r.Slow(unix.SYS_MUNMAP, r.Area, AreaSize)
	if err != nil {
		return err
	}
	if err := Errno("munmap", ret); err != nil {
		return fmt.Errorf("unmap area of task %d: %w", r.Tid, err)
	}
	r.Area = 0
	return nil
}

// SlowAction sets the action of a signal, a struct kernel_sigaction, without a
// batch. Preconditions: an area is mapped.
func (r *Remote) SlowAction(sig unix.Signal, action []byte) error {
	at := r.Area + arch.PageSize
	if err := r.write(at, action); err != nil {
		return err
	}
	ret, err := r.Slow(unix.SYS_RT_SIGACTION, uint64(sig), at, 0, 8)
	if err != nil {
		return err
	}
	return Errno("rt_sigaction", ret)
}

// slowAction reads the action of a signal, a struct kernel_sigaction, without a
// batch. Preconditions: an area is mapped.
func (r *Remote) slowAction(sig unix.Signal) ([]byte, error) {
	at := r.Area + arch.PageSize
	ret, err := r.Slow(unix.SYS_RT_SIGACTION, uint64(sig), 0, at, 8)
	if err == nil {
		err = Errno("rt_sigaction", ret)
	}
	if err != nil {
		return nil, err
	}
	action := make([]byte, actionSize)
	if _, err := sys.ProcessVMRead(r.Tid, action, []unix.RemoteIovec{{Base: uintptr(at), Len: actionSize}}); err != nil {
		return nil, fmt.Errorf("read action of %s from task %d: %w", unix.SignalName(sig), r.Tid, err)
	}
	return action, nil
}

// actionSize is sizeof(struct kernel_sigaction).
const actionSize = 32

// Errno turns a raw result into an error, nil for success.
func Errno(name string, ret int64) error {
	if ret < 0 && ret >= -4095 {
		return os.NewSyscallError(name, unix.Errno(-ret))
	}
	return nil
}

// CallError is a system call that failed in a target.
type CallError struct {
	What  string
	Tid   int
	Errno unix.Errno
}

func (e *CallError) Error() string {
	return fmt.Sprintf("%s in task %d: %s", e.What, e.Tid, e.Errno.Error())
}

// Unwrap gives the errno.
func (e *CallError) Unwrap() error { return e.Errno }

const bufAlign = 16

func align(n int) int { return (n + bufAlign - 1) &^ (bufAlign - 1) }

func (c *Call) space() int {
	n := arch.BatchEntry
	for i := range c.Args {
		a := &c.Args[i]
		n += align(max(len(a.In), len(a.Out)))
	}
	return n
}

// Extract executes a call that makes a descriptor, and takes that out of the target, which
// has none of it then.
// Preconditions: the target leads its process.
func (r *Remote) Extract(c *Call) (fd int, err error) {
	if err := r.Run(c); err != nil {
		return -1, err
	}
	n := int(c.Ret)
	fd = -1
	defer func() {
		err = errors.Join(err, r.Run(NewCall("close", unix.SYS_CLOSE, Int(n))))
		if err != nil && fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
			fd = -1
		}
	}()
	pidfd, err := unix.PidfdOpen(r.Tid, 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	got, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_getfd", err)
	}
	return got, nil
}

// Run executes the calls in order in the target and fills their results. All
// of them are executed, whatever becomes of one; the first failure of a call
// without MayFail is returned as a *CallError.
// Preconditions: signals are blocked (BlockSignals), an area is mapped.
func (r *Remote) Run(calls ...*Call) error {
	r.Born = nil
	if r.Area == 0 {
		return fmt.Errorf("task %d has no area to run system calls in", r.Tid)
	}
	const room = AreaSize - arch.PageSize - bufAlign
	for start := 0; start < len(calls); {
		end, used := start, 0
		for end < len(calls) {
			n := calls[end].space()
			if used+n > room {
				break
			}
			used += n
			end++
		}
		if end == start {
			return fmt.Errorf("%s: arguments of %d bytes do not fit", calls[start].What, calls[start].space())
		}
		if err := r.batch(calls[start:end], used); err != nil {
			return err
		}
		start = end
	}
	for _, c := range calls {
		if !c.MayFail && c.Ret < 0 && c.Ret >= -4095 {
			return &CallError{What: c.What, Tid: r.Tid, Errno: unix.Errno(-c.Ret)}
		}
	}
	return nil
}

func (r *Remote) batch(calls []*Call, used int) error {
	table := r.Area + arch.PageSize
	buf := make([]byte, used)
	bufs := len(calls) * arch.BatchEntry
	outs := false
	for i, c := range calls {
		e := buf[i*arch.BatchEntry:]
		binary.LittleEndian.PutUint64(e, uint64(c.Nr))
		for j := range c.Args {
			a := &c.Args[j]
			v := a.Val
			if n := max(len(a.In), len(a.Out)); n > 0 {
				v = table + uint64(bufs)
				copy(buf[bufs:], a.In)
				for _, rel := range a.Rel {
					binary.LittleEndian.PutUint64(buf[bufs+rel.At:], v+uint64(rel.To))
				}
				bufs += align(n)
				outs = outs || len(a.Out) > 0
			}
			binary.LittleEndian.PutUint64(e[8+8*j:], v)
		}
	}
	if err := r.write(table, buf); err != nil {
		return err
	}
	regs := r.Base
	regs.SetBatch(r.Area, table, uint64(len(calls)), r.Area+AreaSize-bufAlign)
	if err := SetRegs(r.Tid, &regs); err != nil {
		return err
	}
	err := r.resumeUntil(sys.PtraceCont, "the end of a batch of system calls", func(s Stop) bool {
		return s.Event == 0 && s.Signal == unix.SIGTRAP && !s.Sysc
	})
	if err != nil {
		return fmt.Errorf("run %d system calls in task %d (%s …): %w", len(calls), r.Tid, calls[0].What, err)
	}
	back := len(calls) * arch.BatchEntry
	if outs {
		back = used
	}
	if _, err := sys.ProcessVMRead(r.Tid, buf[:back], []unix.RemoteIovec{{Base: uintptr(table), Len: back}}); err != nil {
		return fmt.Errorf("read results from task %d: %w", r.Tid, err)
	}
	bufs = len(calls) * arch.BatchEntry
	for i, c := range calls {
		c.Ret = int64(binary.LittleEndian.Uint64(buf[i*arch.BatchEntry+56:]))
		for j := range c.Args {
			a := &c.Args[j]
			if n := max(len(a.In), len(a.Out)); n > 0 {
				copy(a.Out, buf[bufs:])
				bufs += align(n)
			}
		}
	}
	return nil
}

func (r *Remote) write(addr uint64, b []byte) error {
	n, err := sys.ProcessVMWrite(r.Tid, addr, b)
	if err == nil && n != len(b) {
		err = fmt.Errorf("only %d of %d bytes", n, len(b))
	}
	if err != nil {
		return fmt.Errorf("write arguments to task %d: %w", r.Tid, err)
	}
	return nil
}

// Borrowed is a stopped task of a source tree that executes system calls for
// us and is then put back exactly as it was.
type Borrowed struct {
	Remote

	regs arch.Regs
	mask uint64
	// trap is the action of SIGTRAP, a struct kernel_sigaction, if it is ignored.
	trap []byte
	sud  sys.SUDConfig
}

// Borrow prepares a stopped task: saves registers and signal mask, blocks
// signals and, for area 0, maps one. insn is an address from FindInsn;
// regs are its registers as they are to be put back; trapIgnored says that the
// process ignores SIGTRAP, which a batch resets and Return sets again.
// Preconditions: tid is in a PTRACE_EVENT_STOP.
func Borrow(tid int, insn uint64, regs arch.Regs, trapIgnored bool, area uint64) (*Borrowed, error) {
	b := &Borrowed{Remote: Remote{Tid: tid, Insn: insn, Base: regs}, regs: regs}
	var err error
	if b.sud, err = sys.PtraceGetSUD(tid); err != nil && !errors.Is(err, unix.EIO) {
		return nil, err
	}
	if b.mask, err = BlockSignals(tid); err != nil {
		return nil, err
	}
	if b.sud.Mode != 0 {
		// Our calls are not for the program's dispatcher.
		if err := sys.PtraceSetSUD(tid, sys.SUDConfig{}); err != nil {
			return nil, errors.Join(err, b.putBack())
		}
	}
	if area != 0 {
		b.Area = area
		return b, nil
	}
	if err := b.Map(0); err != nil {
		return nil, errors.Join(err, b.putBack())
	}
	if trapIgnored {
		if b.trap, err = b.slowAction(unix.SIGTRAP); err != nil {
			return nil, errors.Join(err, b.Return(false))
		}
	}
	return b, nil
}

// Mask is the signal mask that the task had.
func (b *Borrowed) Mask() uint64 { return b.mask }

// SUD is the syscall user dispatch that the task had.
func (b *Borrowed) SUD() sys.SUDConfig { return b.sud }

// Return undoes Borrow; keepArea is for a thread that shares the area of another.
func (b *Borrowed) Return(keepArea bool) error {
	var err error
	if !keepArea {
		if b.trap != nil && b.Area != 0 {
			err = b.SlowAction(unix.SIGTRAP, b.trap)
		}
		err = errors.Join(err, b.Unmap())
	}
	return errors.Join(err, b.putBack())
}

// putBack writes registers and mask. The task must be in a stop from which the
// kernel restarts an interrupted system call, which the exit stop of our last
// call is not: so it is interrupted once more, before any user instruction.
func (b *Borrowed) putBack() error {
	if err := sys.PtraceInterrupt(b.Tid); err != nil {
		return fmt.Errorf("interrupt task %d: %w", b.Tid, gone(err))
	}
	err := b.resumeUntilKeeping("an event stop", func(s Stop) bool { return s.Event == sys.PtraceEventStop })
	if err != nil {
		return err
	}
	if err := SetRegs(b.Tid, &b.regs); err != nil {
		return err
	}
	if b.sud.Mode != 0 {
		if err := sys.PtraceSetSUD(b.Tid, b.sud); err != nil {
			return err
		}
	}
	if err := sys.PtraceSetSigMask(b.Tid, b.mask); err != nil {
		return fmt.Errorf("put back signal mask of task %d: %w", b.Tid, err)
	}
	return nil
}

// resumeUntilKeeping is resumeUntil for a task whose registers may already be
// arbitrary: it must not execute an instruction, which the interrupt sees to.
func (b *Borrowed) resumeUntilKeeping(want string, ok func(Stop) bool) error {
	// From a batch's breakpoint the task would go on behind it; the system-call
	// instruction is a defined place, never reached because of the interrupt.
	regs := b.Base
	regs.NoRestart()
	regs.SetPC(b.Insn)
	if err := SetRegs(b.Tid, &regs); err != nil {
		return err
	}
	return b.resumeUntil(sys.PtraceCont, want, ok)
}
